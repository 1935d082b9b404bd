"""The published Hugging Face layout: reads safetensors slice by slice, writes them by shards."""

import contextlib
import functools
import itertools
import json
import math
import os
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from llada_jax.files import local, new_folder
from llada_jax.models import family_of, quantized
from llada_jax.models.family import Row

# The keys are the type names of a safetensors header.
DTYPES = {
    "F32": jnp.float32,
    "F16": jnp.float16,
    "BF16": jnp.bfloat16,
}
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)


def export(
    model: nn.Module,
    params,
    directory: epath.PathLike,
    *,
    tokenizer_from: epath.PathLike | None = None,
    dtype=None,
    max_shard_bytes: int = 5_000_000_000,
):
    """Writes a model in the published layout: config.json, safetensors and tokenizer files.

    The folder appears complete or not at all. Several shards get an index file.

    directory: a local path, without content.
    tokenizer_from: a folder whose tokenizer files are copied.
    dtype: casts the parameters; None keeps their types.
    max_shard_bytes: a shard holds at most this many bytes, or a single larger tensor.

    Raises ValueError if `directory` has content, or if params do not fit the model or are
    quantised.
    """
    if quantized.is_quantized(params):
        raise ValueError("the parameters are quantised: load them without quantize to export them")
    dtype = floating(dtype)
    leaves, shapes = _flat(params), _flat(param_shapes(model.config))
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
    for tensor in sorted(
        _tensors(model.config, shapes),
        key=lambda tensor: -1 if tensor.layer is None else tensor.layer,
    ):
        nbytes = math.prod(tensor.shape) * types[tensor.row.path].itemsize
        if shards[-1] and size + nbytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += nbytes

    with new_folder(local(directory)) as folder:
        weight_map, total = {}, 0
        for number, shard in enumerate(shards, 1):
            file = (
                "model.safetensors"
                if len(shards) == 1
                else f"model-{number:05}-of-{len(shards):05}.safetensors"
            )
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
            copy_tokenizer(epath.Path(tokenizer_from), folder, required=True)


def published_shapes(config: Any) -> dict[str, tuple[int, ...]]:
    """The name and shape of every published tensor of an architecture."""
    return {tensor.name: tensor.shape for tensor in _tensors(config, _flat(param_shapes(config)))}


def param_shapes(config: Any):
    """The parameter tree as ShapeDtypeStructs, of no particular type."""
    tokens = jnp.zeros((1, 1), jnp.int32)
    # Unbox inside eval_shape: under a mesh, unboxing constrains the sharding, and that needs an
    # array that is being traced.
    module = family_of(config).Module(config)
    shapes = jax.eval_shape(lambda key: nn.unbox(module.init(key, tokens)), jax.random.key(0))
    return shapes["params"]


def _flat(tree) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(keys, simple=True, separator="/"): leaf for keys, leaf in leaves}


class _Tensor(NamedTuple):
    name: str  # as published
    row: Row
    layer: int | None
    shape: tuple[int, ...]  # as published


def _tensors(config: Any, shapes) -> list[_Tensor]:
    """Every tensor of a model, in the order of our parameters and their layers."""
    rows, tensors = {row.path: row for row in family_of(config).rows}, []
    for path, leaf in shapes.items():
        if (row := rows.get(path)) is None:
            raise ValueError(f"the family {config.model_type!r} has no row for {path}: add one")
        stacked = "{i}" in row.name
        shape = leaf.shape[1:] if stacked else leaf.shape
        shape = shape[::-1] if row.transpose else shape
        for layer in range(leaf.shape[0]) if stacked else (None,):
            tensors.append(_Tensor(row.name.format(i=layer), row, layer, shape))
    return tensors


def read_folder(folder: epath.Path, config: Any, dtype, shardings, quantize: str | None = None):
    """Reads the parameters of a folder in the published layout.

    `dtype` casts; None takes the widest type in the files. `shardings` is a tree like params
    without `quantize`; None puts everything on the first device. `quantize` makes kernels an
    Int8Kernel, tensor by tensor. A host reads only what its devices hold. Raises FileNotFoundError
    if files are missing, and one ValueError that lists all weights that do not fit config.json.
    """
    shapes = param_shapes(config)
    flat = _flat(shapes)
    tensors = _tensors(config, flat)
    folder = local(folder)
    files, widest = _check_files(folder, tensors)
    placed = {} if shardings is None else _flat(shardings)
    one_device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    params = {}
    for row, members in itertools.groupby(tensors, key=lambda tensor: tensor.row):
        kernel = jax.ShapeDtypeStruct(
            flat[row.path].shape, dtype or widest, sharding=placed.get(row.path, one_device)
        )
        params[row.path] = _read_parameter(
            kernel,
            [(os.fspath(folder / files[tensor.name]), tensor) for tensor in members],
            quantize is not None and quantized.is_kernel(row.path),
        )
    return jax.tree.unflatten(jax.tree.structure(shapes), [params[path] for path in flat])


def _check_files(folder: epath.Path, tensors: list[_Tensor]):
    """Returns ({tensor name: file name}, the widest type in the files).

    Raises FileNotFoundError if files are missing, and one ValueError that lists all weights that
    are not as expected.
    """
    with contextlib.ExitStack() as stack:
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
            if found.get_dtype() not in DTYPES:
                problems.append(
                    f"{name} is of type {found.get_dtype()}, not {', '.join(DTYPES)} ({file})"
                )
            types.append(DTYPES.get(found.get_dtype(), jnp.float32))
        known = {tensor.name for tensor in tensors}
        problems += [
            f"{name} is surplus ({file})" for name, (file, _) in files.items() if name not in known
        ]
    if problems:
        raise ValueError(f"{folder}: the weights do not fit config.json: {'; '.join(problems)}")
    return {name: file for name, (file, _) in files.items()}, jnp.result_type(*types)


def _read_parameter(whole: jax.ShapeDtypeStruct, members: list, quantize: bool):
    """Reads the tensors of one parameter, whose shape, type and sharding are those of `whole`.

    `members` are (file, tensor), of which a stacked parameter has one for each layer.
    """
    row, stacked = members[0][1].row, members[0][1].layer is not None
    ndim = len(whole.shape)
    as_ours = _of_one(whole.sharding, ndim, stacked, False)
    as_published = _of_one(whole.sharding, ndim, stacked, row.transpose)
    target = quantized.abstract(whole) if quantize else whole
    sharding = jax.tree.map(lambda x: x.sharding, target)
    convert = None
    if row.transpose or quantize:
        convert = _converter(as_ours, whole.dtype, row.transpose, quantize)
    array = last = None
    for file, (name, _, layer, shape) in members:
        piece = _read(file, name, shape, as_published)
        # Read one tensor while the one before is placed, but no further ahead: this bounds the
        # host memory.
        jax.block_until_ready(last)
        if convert is not None:
            piece = last = convert(piece)
        if not stacked and convert is not None:
            array = piece
            continue
        if array is None:
            array = jax.jit(functools.partial(_zeros, target), out_shardings=sharding)()
        array = last = _placer(sharding)(array, piece, layer or 0)
    return jax.block_until_ready(array)


def _zeros(target):
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), target)


# Bytes of a file that are mapped at a time. Pages that were read through a mapping count as memory
# of the process until it is unmapped.
_BLOCK_BYTES = 64 * 2**20


def _read(file: str, name: str, shape: tuple[int, ...], sharding) -> jax.Array:
    """Reads one published tensor. This host reads only what its devices hold, each slice once."""
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
    """Returns an empty array aligned to 64 bytes, which XLA's CPU client uses without a copy."""
    memory = np.empty(math.prod(shape) * dtype.itemsize + 64, np.uint8)
    return memory[-memory.ctypes.data % 64 :][: memory.size - 64].view(dtype).reshape(shape)


def _of_one(sharding, ndim: int, stacked: bool, transpose: bool):
    """Returns the sharding of one tensor of a parameter that has `sharding` and `ndim` axes.

    stacked: the parameter has a leading axis of layers, which the tensor lacks.
    transpose: the tensor has the parameter's other axes in reverse order.
    """
    if isinstance(sharding, jax.sharding.SingleDeviceSharding):
        return sharding
    if not isinstance(sharding, jax.sharding.NamedSharding):
        raise ValueError(
            f"shardings: {sharding} is neither a NamedSharding nor a SingleDeviceSharding"
        )
    axes = (*sharding.spec, *(None,) * (ndim - len(sharding.spec)))[1 if stacked else 0 :]
    return jax.sharding.NamedSharding(
        sharding.mesh, jax.sharding.PartitionSpec(*axes[:: -1 if transpose else 1])
    )


@functools.cache
def _converter(sharding, dtype, transpose: bool, quantize: bool):
    """Compiles what makes a part of a parameter of a tensor: transpose, then cast or quantise.

    This is a program of its own. If it were fused with `_placer`, XLA's CPU backend would run the
    transpose on one core.
    """

    def convert(piece):
        piece = piece.T if transpose else piece
        return quantized.quantize(piece) if quantize else piece.astype(dtype)

    return jax.jit(
        convert, out_shardings=quantized.shardings(sharding, 2) if quantize else sharding
    )


@functools.cache
def _placer(sharding):
    """Compiles (parameter, tensor, layer) -> parameter: casts the tensor and writes it in place."""

    def put(array, piece, layer):
        piece = piece.astype(array.dtype).reshape((-1, *array.shape[1:]))
        return jax.lax.dynamic_update_slice(array, piece, (layer, *(0,) * (array.ndim - 1)))

    def place(arrays, pieces, layer):
        return jax.tree.map(lambda array, piece: put(array, piece, layer), arrays, pieces)

    return jax.jit(place, donate_argnums=0, out_shardings=sharding)


def _open(folder: epath.Path, stack: contextlib.ExitStack):
    """Opens model.safetensors, or all shards of the index.

    Returns ({tensor name: (file name, open file)}, problems); a problem is a tensor that is in two
    files. Raises FileNotFoundError or ValueError if a file is missing or unreadable.
    """
    index = folder / "model.safetensors.index.json"
    listed = {}
    if (folder / "model.safetensors").exists():
        names = ["model.safetensors"]
    elif index.exists():
        try:
            listed = json.loads(index.read_text())["weight_map"]
            names = sorted(set(listed.values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{index} is not an index of shards with a weight_map: {error!r}"
            ) from None
    else:
        raise FileNotFoundError(
            f"{folder} has neither model.safetensors nor model.safetensors.index.json"
        )
    absent = [name for name in names if not (folder / name).exists()]
    if absent:
        raise FileNotFoundError(f"{index} names shards that are not there: {', '.join(absent)}")
    files, problems = {}, []
    for name in names:
        try:
            weights = stack.enter_context(safe_open(os.fspath(folder / name), framework="numpy"))
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{folder / name} is no readable safetensors file, fetch it again: {error}"
            ) from None
        for tensor in weights.keys():  # noqa: SIM118 (it has no iterator)
            if tensor in files:
                problems.append(f"{tensor} is in both {files[tensor][0]} and {name}")
            files[tensor] = (name, weights)
    return files, problems


def floating(dtype):
    """Returns `dtype` as a NumPy dtype; None stays None.

    Raises ValueError unless it is float32, float16 or bfloat16.
    """
    if dtype is None:
        return None
    with contextlib.suppress(TypeError):
        if np.dtype(dtype) in {np.dtype(known) for known in DTYPES.values()}:
            return np.dtype(dtype)
    raise ValueError(f"dtype {dtype!r} is not float32, float16 or bfloat16")


def copy_tokenizer(source: epath.Path, folder: epath.Path, required: bool):
    """Copies the tokenizer files of `source` to `folder`.

    Raises FileNotFoundError if they are `required` and there are none.
    """
    names = [name for name in TOKENIZER_FILES if (source / name).exists()]
    if required and not {"tokenizer.json", "tokenizer.model"} & set(names):
        raise FileNotFoundError(f"{source} has neither tokenizer.json nor tokenizer.model")
    for name in names:
        (source / name).copy(folder / name)
