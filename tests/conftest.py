"""Eight CPU devices for every test, types checked at run time, and the optional shared files."""

import json
import os
import pathlib

# Tests compile far longer than they run, so LLVM is told not to optimise.
FLAGS = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} {FLAGS} --xla_llvm_disable_expensive_passes=true"
)
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["PJRT_NPROC"] = "64"  # as parallel.hosts.initialize would

import jax
import pytest
from jaxtyping import install_import_hook

# House rule 6: annotations are checked under pytest only.
install_import_hook("llada_jax", "beartype.beartype")

ROOT = pathlib.Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session", autouse=True)
def eight_devices():
    assert len(jax.devices()) == 8, "the tests need eight forced CPU devices"


@pytest.fixture(scope="module", autouse=True)
def programs_of_one_file():
    """Frees the compiled programs of a file of tests.

    Those of all files together need more memory maps than Linux gives a process, and the compiler
    then ends with a segmentation fault.
    """
    yield
    jax.clear_caches()


@pytest.fixture(scope="session")
def shared():
    """The folder of golden outputs and real data beside the checkout, where it is there."""
    path = ROOT.parent / "shared"
    if not path.is_dir():
        pytest.skip("the folder ../shared (golden outputs, real data) is not beside this checkout")
    return path


@pytest.fixture(scope="session")
def golden(shared):
    """The authors' PyTorch outputs on a tiny checkpoint."""
    return shared / "golden" / "llada_mha"


@pytest.fixture
def write(tmp_path):
    """Writes records (or raw lines) as jsonl, returns the source."""

    def write(records, name="data.jsonl", opener=open):
        with opener(tmp_path / name, "wt") as f:
            f.writelines((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records)
        return f"jsonl:{tmp_path / name}"

    return write
