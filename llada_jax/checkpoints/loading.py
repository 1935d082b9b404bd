"""Opens a model, from a Hugging Face style folder or from one of our training checkpoints."""

import json

import jax
import jax.numpy as jnp
from etils import epath
from jax.tree_util import Partial

from llada_jax import tokenizer as tokenizer_lib
from llada_jax.checkpoints import orbax
from llada_jax.checkpoints.published import floating, param_shapes, read_folder
from llada_jax.models.llada import LLaDA, ModelConfig


def load(path: epath.PathLike, dtype=None, shardings=None):
    """Opens a model and returns (model, params). The model computes in the type of its parameters.

    path: a Hugging Face style folder (config.json and model.safetensors, or shards with an index),
        or a checkpoint of ours: a workdir (its newest undamaged step) or
        workdir/checkpoints/<step>.
    dtype: casts the parameters. None keeps their type, or takes the widest type if they differ.
    shardings: a tree of shardings like params. None puts everything on the first device.

    Raises FileNotFoundError if there is no model at `path`, and one ValueError that lists every
    weight that is missing, surplus or of the wrong shape.
    """
    path, dtype = epath.Path(path).expanduser(), floating(dtype)
    if not path.exists():
        raise FileNotFoundError(
            f"{path} does not exist; give a Hugging Face style folder or a checkpoint of ours"
        )
    if (home := home_of(path)) is not None:
        config = _read_config(home / "config.json")
        shapes = param_shapes(config)
        if shardings is not None:
            shapes = jax.tree.map(
                lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
            )
        params = orbax.restore_params(path, dtype, shapes)
    elif (path / "config.json").exists():
        config = _read_config(path / "config.json")
        params = read_folder(path, config, dtype, shardings)
    else:
        raise FileNotFoundError(
            f"{path} has neither config.json (a Hugging Face style folder)"
            " nor checkpoints/ (a checkpoint of ours)"
        )
    dtype = jnp.result_type(*jax.tree.leaves(params))
    return LLaDA(config, dtype=dtype, param_dtype=dtype), params


def model_folder(path: epath.PathLike) -> epath.Path:
    """Returns the folder that holds config.json and the tokenizer of whatever `load` opens.

    Raises FileNotFoundError if `path` does not exist.
    """
    path = epath.Path(path).expanduser()
    if not path.exists():
        raise FileNotFoundError(
            f"{path} does not exist; give a Hugging Face style folder or a checkpoint of ours"
        )
    return home_of(path) or path


def read_config(path: epath.PathLike) -> ModelConfig:
    """Returns the architecture of whatever `load` opens, without reading any weight.

    Raises FileNotFoundError if there is no config.json, and ValueError if it is invalid.
    """
    return _read_config(model_folder(path) / "config.json")


def home_of(path: epath.Path) -> epath.Path | None:
    """Returns the folder with config and tokenizer, or None if `path` is no checkpoint of ours.

    For a workdir or workdir/checkpoints/<step> the folder is workdir/model.
    """
    if (path / "checkpoints").is_dir():
        return path / "model"
    absolute = path if "://" in str(path) else path.absolute()
    return (
        absolute.parent.parent / "model"
        if path.name.isdigit() and absolute.parent.name == "checkpoints"
        else None
    )


def _read_config(file: epath.Path) -> ModelConfig:
    if not file.exists():
        raise FileNotFoundError(f"{file} does not exist; without it the architecture is unknown")
    try:
        values = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{file} holds no JSON object")
    return ModelConfig.from_dict(values, source=str(file))


def open_model(path: str, dtype=None):
    """Returns (logits_fn, ModelConfig, Tokenizer) of whatever `load` opens, with its `dtype`."""
    model, params = load(path, dtype)
    return (
        Partial(model.apply, {"params": params}),
        model.config,
        tokenizer_lib.load(model_folder(path)),
    )


def special_ids(config, tokenizer) -> dict[str, int | None]:
    """Returns mask_id, pad_id, eos_id and eot_id for `sample_responses`.

    They come from the model's config and its tokenizer. The pad id is the config's pad_token_id;
    if there is none it is EOS, and without EOS the mask.
    """
    eos_id = tokenizer.eos_id if config.eos_token_id is None else config.eos_token_id
    pads = (config.pad_token_id, eos_id, config.mask_token_id)
    pad_id = next(i for i in pads if i is not None)
    return {
        "mask_id": config.mask_token_id,
        "pad_id": pad_id,
        "eos_id": eos_id,
        "eot_id": tokenizer.eot_id,
    }
