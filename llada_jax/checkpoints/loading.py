"""Opens a model from a Hugging Face style folder or from one of our training checkpoints."""

import argparse
import functools
import json
from typing import Any

import jax
from etils import epath
from jax.tree_util import Partial

from llada_jax import models
from llada_jax import tokenizer as tokenizer_lib
from llada_jax.checkpoints import orbax
from llada_jax.checkpoints.published import floating, param_shapes, read_folder
from llada_jax.files import is_remote
from llada_jax.models import quantized
from llada_jax.parallel import mesh as mesh_lib


def load(path: epath.PathLike, dtype=None, shardings=None, quantize: str | None = None):
    """Opens a model and returns (model, params). The model computes in the type of its parameters.

    path: a Hugging Face style folder (config.json, and model.safetensors or shards with an index),
        or a checkpoint of ours: a workdir (its newest good step) or workdir/checkpoints/<step>.
    dtype: casts the parameters. None keeps their type (the widest, if a file has several).
    shardings: a tree like params, without `quantize`. None puts all parameters on the first device.
    quantize: "int8" makes the matrices of the layers and the head an Int8Kernel while they are
        read, each with one scale for each output (`models.quantized`). Such parameters can be
        sampled from, not trained. `dtype` is then that of all others.

    Raises FileNotFoundError if the path has no model, and one ValueError that lists all weights
    that are missing, unexpected or of the wrong shape.
    """
    quantized.check_kind(quantize)
    path, dtype = epath.Path(path).expanduser(), floating(dtype)
    config = read_config(path)
    if home_of(path) is not None:
        shapes = param_shapes(config)
        if shardings is not None:
            shapes = jax.tree.map(
                lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
            )
        params = orbax.restore_params(path, functools.partial(_kept, dtype, quantize), shapes)
    else:
        params = read_folder(path, config, dtype, shardings, quantize)
    dtype = quantized.dtype_of(params)
    return models.family_of(config).Module(config, dtype=dtype, param_dtype=dtype), params


def _kept(dtype, quantize: str | None, name: str, leaf: jax.Array):
    """What is kept of a parameter of a checkpoint."""
    if quantize and quantized.is_kernel(name):
        shardings = quantized.shardings(leaf.sharding, leaf.ndim)
        return jax.jit(quantized.quantize, out_shardings=shardings)(leaf)
    return leaf if dtype is None else leaf.astype(dtype)


def read_config(path: epath.PathLike) -> Any:
    """Reads the architecture of a model that `load` opens, without its weights.

    Raises FileNotFoundError if the path has no config.json, and ValueError if that is invalid.
    """
    path = epath.Path(path).expanduser()
    file = model_folder(path) / "config.json"
    if not file.exists():
        if home_of(path) is not None:
            raise FileNotFoundError(
                f"{file} does not exist; without it the architecture is unknown"
            )
        raise FileNotFoundError(
            f"{path} has neither config.json (a Hugging Face style folder) nor checkpoints/ "
            "(a checkpoint of ours)"
        )
    try:
        values = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{file} holds no JSON object")
    return models.config_from_dict(values, source=str(file))


def model_folder(path: epath.PathLike) -> epath.Path:
    """Returns the folder that should contain a model's config.json and tokenizer.

    Raises FileNotFoundError if `path` does not exist.
    """
    path = epath.Path(path).expanduser()
    if not path.exists():
        raise FileNotFoundError(
            f"{path} does not exist; give a Hugging Face style folder or a checkpoint of ours"
        )
    return home_of(path) or path


def home_of(path: epath.Path) -> epath.Path | None:
    """Returns the model/ folder of a checkpoint of ours, or None for any other path."""
    if (path / "checkpoints").is_dir():
        return path / "model"
    absolute = path if is_remote(path) else path.absolute()
    is_step = path.name.isdigit() and absolute.parent.name == "checkpoints"
    return absolute.parent.parent / "model" if is_step else None


def add_flags(parser: argparse.ArgumentParser, data_parallel: int | None = None) -> None:
    """Adds the flags of a model that is sampled from: those of `open_model`.

    data_parallel: also adds those of `parallel.mesh.of_rows`, with this default.
    """
    parser.add_argument(
        "--model",
        required=True,
        help="Hugging Face style folder, workdir, or workdir/checkpoints/N",
    )
    parser.add_argument("--dtype", help="cast the parameters, as to bfloat16; default: as stored")
    parser.add_argument(
        "--quantize", choices=quantized.KINDS, help="the weights of layers and head in 8 bits"
    )
    if data_parallel is None:
        return
    for name, default, text in (
        (
            "data_parallel",
            data_parallel,
            "split the rows over so many devices; -1: all there are",
        ),
        ("fsdp", 1, "split the parameters, and the rows, over so many devices"),
        ("tensor", 1, "split the heads and the MLP over so many devices"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=text)


def open_model(
    path: str, dtype=None, quantize: str | None = None, mesh: jax.sharding.Mesh | None = None
):
    """Opens a model for the sampler by `load`; returns (logits_fn, config, tokenizer).

    mesh: the devices over which the parameters are split; None puts all on the first one.
    """
    shardings = None
    if mesh is not None:
        shardings = mesh_lib.shardings(mesh, models.boxed_shapes(read_config(path)))
    model, params = load(path, dtype, shardings, quantize)
    logits_fn = Partial(model.apply, {"params": params})
    return logits_fn, model.config, tokenizer_lib.load(model_folder(path))


def special_ids(config, tokenizer) -> dict[str, int | None]:
    """Returns mask_id, pad_id, eos_id and eot_id as arguments for `sampling.sample_responses`.

    The tokenizer gives an eos_id that the config does not have. pad_id falls back to eos_id, then
    to mask_id.
    """
    eos_id = tokenizer.eos_id if config.eos_token_id is None else config.eos_token_id
    pads = (config.pad_token_id, eos_id, config.mask_token_id)
    return {
        "mask_id": config.mask_token_id,
        "pad_id": next(i for i in pads if i is not None),
        "eos_id": eos_id,
        "eot_id": tokenizer.eot_id,
    }
