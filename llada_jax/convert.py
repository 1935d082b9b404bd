"""Published weights <-> ours: Hugging Face style folders of safetensors, and checkpoints of this library.

python -m llada_jax.convert import HF_DIR OUT      OUT becomes a checkpoint of ours
python -m llada_jax.convert export CKPT HF_DIR     HF_DIR becomes a folder in the published layout
"""

import argparse
import contextlib
import functools
import itertools
import json
import math
import os
import shutil
import sys
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from llada_jax import checkpoint
from llada_jax.model import LLaDA, ModelConfig


class Row(NamedTuple):
    """One parameter: where it is in our tree, its published name ({i}: the layer), whether its matrix is transposed."""

    path: str
    name: str
    transpose: bool


_BLOCK = "model.transformer.blocks.{i}."
_LINEAR = ("q_proj", "k_proj", "v_proj", "attn_out", "ff_proj", "up_proj", "ff_out")
TABLE = (
    Row("wte/embedding", "model.transformer.wte.weight", False),
    Row("blocks/attn_norm/scale", _BLOCK + "attn_norm.weight", False),
    Row("blocks/ff_norm/scale", _BLOCK + "ff_norm.weight", False),
    *(Row(f"blocks/{name}/kernel", f"{_BLOCK}{name}.weight", True) for name in _LINEAR),
    Row("ln_f/scale", "model.transformer.ln_f.weight", False),
    Row("ff_out/kernel", "model.transformer.ff_out.weight", True),
)
_TYPES = {"F32": jnp.float32, "F16": jnp.float16, "BF16": jnp.bfloat16}  # as a safetensors header spells them
_TOKENIZER = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json")


def load(path: epath.PathLike, dtype=None, shardings=None):
    """Opens a model: (model, params), computing in the type of its parameters.

    `path` is a Hugging Face style folder (config.json, model.safetensors or shards with an index) or a checkpoint of
    ours (a workdir: its newest good step; or workdir/checkpoints/<step>). `dtype` casts the parameters; None keeps
    their type (the widest, where a file mixes them). `shardings` is a tree like params; None: the first device. Raises
    FileNotFoundError, or one ValueError that lists every weight that is missing, surplus or of another shape.
    """
    path, dtype = epath.Path(path).expanduser(), _floating(dtype)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; give a Hugging Face style folder or a checkpoint of ours")
    if (home := _home(path)) is not None:
        config = _read_config(home / "config.json")
        shapes = _shapes(config)
        if shardings is not None:
            shapes = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)
        params = checkpoint.restore_params(path, dtype, shapes)
    elif (path / "config.json").exists():
        config = _read_config(path / "config.json")
        params = _read_folder(path, config, dtype, shardings)
    else:
        raise FileNotFoundError(
            f"{path} has neither config.json (a Hugging Face style folder) nor checkpoints/ (a checkpoint of ours)"
        )
    dtype = jnp.result_type(*jax.tree.leaves(params))
    return LLaDA(config, dtype=dtype, param_dtype=dtype), params


def export(
    model: LLaDA,
    params,
    directory: epath.PathLike,
    *,
    tokenizer_from: epath.PathLike | None = None,
    dtype=None,
    max_shard_bytes: int = 5_000_000_000,
):
    """Writes a folder in the published layout: config.json, safetensors (with an index beyond one shard), tokenizer.

    The folder appears complete or not at all. `tokenizer_from` is a folder with tokenizer files to copy; `dtype` casts.
    Raises ValueError if `directory` (a local path) has content already, or if params are not those of the model.
    """
    dtype = _floating(dtype)
    leaves, shapes = _flat(params), _flat(_shapes(model.config))
    problems = [
        f"{name} is {list(leaves[name].shape) if name in leaves else 'missing'}, the model's is "
        f"{list(shapes[name].shape) if name in shapes else 'absent'}"
        for name in {**shapes, **leaves}
        if name not in leaves or name not in shapes or leaves[name].shape != shapes[name].shape
    ]
    if problems:
        raise ValueError(f"the parameters are not those of the model: {'; '.join(problems)}")
    types = {path: np.dtype(dtype or leaf.dtype) for path, leaf in leaves.items()}

    shards, size = [[]], 0
    for tensor in sorted(_tensors(shapes), key=lambda tensor: -1 if tensor.layer is None else tensor.layer):
        nbytes = math.prod(tensor.shape) * types[tensor.row.path].itemsize
        if shards[-1] and size + nbytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += nbytes

    with _new_folder(_local(directory)) as folder:
        weight_map, total = {}, 0
        for number, shard in enumerate(shards, 1):
            file = "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
            arrays = {}
            for name, row, layer, _ in shard:
                leaf = leaves[row.path] if layer is None else leaves[row.path][layer]
                leaf = jnp.asarray(leaf, types[row.path])
                arrays[name] = np.ascontiguousarray(leaf.T if row.transpose else leaf)
                weight_map[name] = file
            total += sum(array.nbytes for array in arrays.values())
            save_file(arrays, folder / file, metadata={"format": "pt"})
        if len(shards) > 1:
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
        config = {**model.config.to_dict(), "torch_dtype": str(np.result_type(*types.values()))}
        (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
        if tokenizer_from is not None:
            _copy_tokenizer(epath.Path(tokenizer_from), folder, required=True)


def import_folder(source: epath.PathLike, out: epath.PathLike, dtype=None):
    """Makes `out` a checkpoint of ours (model/ and checkpoints/0) of a Hugging Face style folder."""
    source = epath.Path(source).expanduser()
    if source.is_dir() and _home(source) is not None:
        raise ValueError(f"{source} is a checkpoint of ours already; import takes a Hugging Face style folder")
    with _new_folder(epath.Path(out).expanduser()) as folder:
        _, params = load(source, dtype)
        (folder / "model").mkdir(parents=True)
        (source / "config.json").copy(folder / "model" / "config.json")
        _copy_tokenizer(source, folder / "model", required=False)
        with checkpoint.Checkpoints(folder / "checkpoints") as checkpoints:
            checkpoints.save(0, {"params": params}, {"imported_from": str(source)})


def model_folder(path: epath.PathLike) -> epath.Path:
    """The folder with config.json and the tokenizer of a Hugging Face style folder or a checkpoint of ours."""
    path = epath.Path(path).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; give a Hugging Face style folder or a checkpoint of ours")
    return _home(path) or path


def read_config(path: epath.PathLike) -> ModelConfig:
    """The architecture of whatever `load` opens, without reading a weight; FileNotFoundError or ValueError."""
    return _read_config(model_folder(path) / "config.json")


def published_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The name and shape of every published tensor of an architecture."""
    return {tensor.name: tensor.shape for tensor in _tensors(_flat(_shapes(config)))}


def _home(path: epath.Path) -> epath.Path | None:
    """The folder of config and tokenizer of a checkpoint of ours, or None where path is no such checkpoint."""
    if (path / "checkpoints").is_dir():
        return path / "model"
    absolute = path if "://" in str(path) else path.absolute()
    return absolute.parent.parent / "model" if path.name.isdigit() and absolute.parent.name == "checkpoints" else None


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


def _shapes(config: ModelConfig):
    """The parameter tree as ShapeDtypeStructs, of no particular type."""
    tokens = jnp.zeros((1, 1), jnp.int32)
    # Unboxed under eval_shape: under a mesh that constrains the sharding, which shapes alone do not take.
    return jax.eval_shape(lambda key: nn.unbox(LLaDA(config).init(key, tokens)), jax.random.key(0))["params"]


def _flat(tree) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(keys, simple=True, separator="/"): leaf for keys, leaf in leaves}


class _Tensor(NamedTuple):
    name: str  # as published
    row: Row
    layer: int | None
    shape: tuple[int, ...]  # as published


def _tensors(shapes) -> list[_Tensor]:
    """Every tensor of a model, in the order of our parameters and their layers."""
    rows, tensors = {row.path: row for row in TABLE}, []
    for path, leaf in shapes.items():
        row = rows[path]
        stacked = "{i}" in row.name
        shape = leaf.shape[1:] if stacked else leaf.shape
        shape = shape[::-1] if row.transpose else shape
        for layer in range(leaf.shape[0]) if stacked else (None,):
            tensors.append(_Tensor(row.name.format(i=layer), row, layer, shape))
    return tensors


def _read_folder(folder: epath.Path, config: ModelConfig, dtype, shardings):
    shapes = _shapes(config)
    flat = _flat(shapes)
    tensors = _tensors(flat)
    with contextlib.ExitStack() as stack:
        folder = _local(folder)
        files, problems = _open(folder, stack)
        types = []
        for name, _, _, shape in tensors:
            if name not in files:
                problems.append(f"{name} {list(shape)} is missing")
                continue
            file, weights = files[name]
            found = weights.get_slice(name)
            if tuple(found.get_shape()) != shape:
                problems.append(f"{name} is {found.get_shape()}, expected {list(shape)} ({file})")
            if found.get_dtype() not in _TYPES:
                problems.append(f"{name} is of type {found.get_dtype()}, not {', '.join(_TYPES)} ({file})")
            types.append(_TYPES.get(found.get_dtype(), jnp.float32))
        known = {tensor.name for tensor in tensors}
        problems += [f"{name} is surplus ({file})" for name, (file, _) in files.items() if name not in known]
        if problems:
            raise ValueError(f"{folder}: the weights do not fit config.json: {'; '.join(problems)}")

        dtype = dtype or jnp.result_type(*types)
    placed = {} if shardings is None else _flat(shardings)
    one_device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    params, last = {}, None
    for row, members in itertools.groupby(tensors, key=lambda tensor: tensor.row):
        shape, sharding = flat[row.path].shape, placed.get(row.path, one_device)
        stacked = "{i}" in row.name
        as_ours = _of_one(sharding, len(shape), stacked, False)
        as_published = _of_one(sharding, len(shape), stacked, row.transpose)
        array = None
        for name, _, layer, published in members:
            piece = _read(os.fspath(folder / files[name][0]), name, published, as_published)
            jax.block_until_ready(last)  # one piece is read while the one before is placed, and no more
            if row.transpose:
                piece = last = _transposer(as_ours, dtype)(piece)
            if stacked or not row.transpose:
                if array is None:
                    array = jax.jit(functools.partial(jnp.zeros, shape, dtype), out_shardings=sharding)()
                array = last = _placer(sharding)(array, piece, layer or 0)
            else:
                array = piece
        params[row.path] = array
    return jax.tree.unflatten(jax.tree.structure(shapes), [params[path] for path in flat])


# Bytes of a file that are mapped at a time: what has been read of a mapping counts as the process's own.
_BLOCK_BYTES = 64 * 2**20


def _read(file: str, name: str, shape: tuple[int, ...], sharding) -> jax.Array:
    """One tensor as published, of which this host reads what its devices hold, each slice once."""
    found = {}

    def read(index):
        spans = tuple(span.indices(size)[:2] for span, size in zip(index, shape, strict=True))
        if spans in found:
            return found[spans]
        (first, end), rest = spans[0], tuple(slice(*span) for span in spans[1:])
        block = max(_BLOCK_BYTES * shape[0] // (math.prod(shape) * 4), 1)
        out = None
        for start in range(first, end, block):
            stop = min(start + block, end)
            with safe_open(file, framework="numpy") as weights:
                part = weights.get_slice(name)[slice(start, stop), *rest]
            if out is None:
                out = _aligned((end - first, *part.shape[1:]), part.dtype)
            out[start - first : stop - first] = part
        return found.setdefault(spans, out)

    return jax.make_array_from_callback(shape, sharding, read)


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An empty array that a CPU device takes as it is: 64 bytes is what XLA asks for, else it copies."""
    memory = np.empty(math.prod(shape) * dtype.itemsize + 64, np.uint8)
    return memory[-memory.ctypes.data % 64 :][: memory.size - 64].view(dtype).reshape(shape)


def _of_one(sharding, ndim: int, stacked: bool, transpose: bool):
    """The sharding of one tensor, as it is or transposed, of a parameter with `sharding` and `ndim` axes."""
    if isinstance(sharding, jax.sharding.SingleDeviceSharding):
        return sharding
    if not isinstance(sharding, jax.sharding.NamedSharding):
        raise ValueError(f"shardings: {sharding} is neither a NamedSharding nor a SingleDeviceSharding")
    axes = (*sharding.spec, *(None,) * (ndim - len(sharding.spec)))[1 if stacked else 0 :]
    return jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec(*axes[:: -1 if transpose else 1]))


@functools.cache
def _transposer(sharding, dtype):
    """Compiles the transpose. On its own: fused with `_placer`, XLA's CPU backend does it on one core."""
    return jax.jit(lambda piece: piece.T.astype(dtype), out_shardings=sharding)


@functools.cache
def _placer(sharding):
    """Compiles (parameter, one tensor, layer) -> parameter, cast and stacked in place."""

    def place(array, piece, layer):
        piece = piece.astype(array.dtype).reshape((-1, *array.shape[1:]))
        return jax.lax.dynamic_update_slice(array, piece, (layer, *(0,) * (array.ndim - 1)))

    return jax.jit(place, donate_argnums=0, out_shardings=sharding)


def _open(folder: epath.Path, stack: contextlib.ExitStack):
    """({tensor name: (file name, open file)}, problems) of one safetensors file, or of the shards of an index."""
    index = folder / "model.safetensors.index.json"
    listed = {}
    if (folder / "model.safetensors").exists():
        names = ["model.safetensors"]
    elif index.exists():
        try:
            listed = json.loads(index.read_text())["weight_map"]
            names = sorted(set(listed.values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{index} is not an index of shards with a weight_map: {error!r}") from None
    else:
        raise FileNotFoundError(f"{folder} has neither model.safetensors nor model.safetensors.index.json")
    absent = [name for name in names if not (folder / name).exists()]
    if absent:
        raise FileNotFoundError(f"{index} names shards that are not there: {', '.join(absent)}")
    files, problems = {}, []
    for name in names:
        try:
            weights = stack.enter_context(safe_open(os.fspath(folder / name), framework="numpy"))
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{folder / name} is no readable safetensors file, fetch it again: {error}") from None
        for tensor in weights.keys():
            if tensor in files:
                problems.append(f"{tensor} is in both {files[tensor][0]} and {name}")
            files[tensor] = (name, weights)
    return files, problems


def _floating(dtype):
    """The dtype, if it is one that weights can have; None stays None."""
    if dtype is None:
        return None
    with contextlib.suppress(TypeError):
        if np.dtype(dtype) in {np.dtype(known) for known in _TYPES.values()}:
            return np.dtype(dtype)
    raise ValueError(f"dtype {dtype!r} is not float32, float16 or bfloat16")


def _local(path: epath.PathLike) -> epath.Path:
    path = epath.Path(path).expanduser()
    if "://" in str(path):
        raise ValueError(f"{path}: safetensors are read and written on a local disk only; copy the folder there")
    return path


@contextlib.contextmanager
def _new_folder(directory: epath.Path):
    """A folder to write in that becomes `directory` when the block ends well; refuses to overwrite content."""
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ValueError(f"{directory} exists and is not empty; remove it or give another folder")
    if "://" in str(directory):  # a bucket cannot rename; there it is the checkpoint that commits as a whole
        yield directory
        return
    directory = directory.absolute()
    partial = directory.with_name(f".{directory.name}.{os.getpid()}.partial")
    partial.mkdir(parents=True)
    try:
        yield partial
        partial.rename(directory)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _copy_tokenizer(source: epath.Path, folder: epath.Path, required: bool):
    names = [name for name in _TOKENIZER if (source / name).exists()]
    if required and not {"tokenizer.json", "tokenizer.model"} & set(names):
        raise FileNotFoundError(f"{source} has neither tokenizer.json nor tokenizer.model")
    for name in names:
        (source / name).copy(folder / name)


def main(argv=None):
    about = f"{__doc__.splitlines()[0]} Runs on the CPU: the model has to fit the host's memory."
    parser = argparse.ArgumentParser(prog="python -m llada_jax.convert", description=about)
    commands = parser.add_subparsers(dest="command", required=True)
    into = commands.add_parser("import", help="a Hugging Face style folder becomes a checkpoint of ours")
    into.add_argument("hf_dir", metavar="HF_DIR", help="config.json, safetensors, tokenizer files")
    into.add_argument("out", metavar="OUT", help="new workdir: OUT/model and OUT/checkpoints/0")
    out = commands.add_parser("export", help="a checkpoint of ours becomes a Hugging Face style folder")
    out.add_argument("checkpoint", metavar="CKPT", help="a workdir (newest step) or workdir/checkpoints/<step>")
    out.add_argument("hf_dir", metavar="HF_DIR", help="new folder")
    out.add_argument(
        "--max_shard_bytes", type=lambda x: int(float(x)), default=5_000_000_000, help="default: 5e9 bytes a file"
    )
    for command in (into, out):
        command.add_argument("--dtype", choices=[np.dtype(t).name for t in _TYPES.values()], help="default: as it is")
    args = parser.parse_args(argv)
    try:
        if args.command == "import":
            import_folder(args.hf_dir, args.out, args.dtype)
        else:
            source = epath.Path(args.checkpoint).expanduser()
            model, params = load(source, args.dtype)
            home = _home(source) or source
            tokenizer = home if any((home / name).exists() for name in _TOKENIZER[:2]) else None
            export(model, params, args.hf_dir, tokenizer_from=tokenizer, max_shard_bytes=args.max_shard_bytes)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")  # the whole model goes to one device
    sys.exit(main())
