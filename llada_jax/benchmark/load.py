"""The load benchmark: makes a checkpoint in LLaDA 8B's layout, times `load`, and deletes it."""

import argparse
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from llada_jax.checkpoints import loading, published
from llada_jax.models import boxed_shapes, quantized
from llada_jax.models.llada import ModelConfig
from llada_jax.parallel import mesh as mesh_lib

_GB = 1e9


def write_checkpoint(
    folder: pathlib.Path, config: ModelConfig, shard_bytes: int = 2_000_000_000
) -> dict[str, int]:
    """Writes random bfloat16 weights in the published layout, in shards with an index.

    Returns the size in bytes of all tensors together (`bytes`) and of the largest one (`largest`).
    The files are dropped from the page cache, so that a load reads from the disk.
    """
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    # Random numbers are slow to make. We repeat one block of them, from a different place in each
    # tensor.
    noise = np.random.default_rng(0).normal(0, 0.02, 2**20 + 7).astype(ml_dtypes.bfloat16)
    shard, weight_map, sizes = {}, {}, []

    def flush():
        file = folder / f"model-{len(list(folder.glob('*.safetensors'))) + 1:05}.safetensors"
        save_file(shard, file, metadata={"format": "pt"})
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        weight_map.update(dict.fromkeys(shard, file.name))
        shard.clear()

    for name, shape in published.published_shapes(config).items():
        shard[name] = np.resize(np.roll(noise, len(sizes)), shape)
        sizes.append(shard[name].nbytes)
        if sum(x.nbytes for x in shard.values()) >= shard_bytes:
            flush()
    if shard:
        flush()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return {"bytes": sum(sizes), "largest": max(sizes)}


def _status(name: str) -> int:
    """Returns a field of /proc/self/status in bytes.

    VmRSS is the memory that this process holds now, VmHWM the most that it ever held.
    """
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise OSError(
        f"/proc/self/status has no {name}: the memory of a process can be measured on Linux only"
    )


def measure(
    folder: str, dtype: str, fsdp: int, tensor: int, quantize: str | None = None
) -> dict[str, float]:
    """Loads a folder over all devices of this process.

    Returns `seconds`, `destination` (bytes of the loaded arrays) and `beyond` (bytes of host memory
    at the peak, beyond those arrays and what the process held before).
    """
    config = loading.read_config(folder)
    mesh = mesh_lib.make_mesh(-1, fsdp, tensor)
    boxed = boxed_shapes(config)
    shardings = mesh_lib.shardings(mesh, boxed)
    jax.block_until_ready(jnp.zeros(8))  # the backend's own memory belongs to the baseline
    before = _status("VmRSS")
    start = time.perf_counter()
    _, params = loading.load(folder, dtype, nn.unbox(shardings), quantize)
    jax.block_until_ready(params)
    seconds = time.perf_counter() - start
    held = sum(
        shard.data.nbytes for leaf in jax.tree.leaves(params) for shard in leaf.addressable_shards
    )
    return {"seconds": seconds, "destination": held, "beyond": _status("VmHWM") - before - held}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that `run` reads."""
    parser.add_argument(
        "--layers", type=int, default=4, help="of the 32 of LLaDA 8B (0.44 GB each; default: 4)"
    )
    parser.add_argument(
        "--width", type=int, default=4096, help="d_model; the MLP has three times as much"
    )
    parser.add_argument("--vocab", type=int, default=126464, help="rows of embedding and head")
    parser.add_argument("--devices", type=int, default=8, help="virtual CPU devices")
    parser.add_argument("--fsdp", type=int, default=4)
    parser.add_argument("--tensor", type=int, default=2)
    parser.add_argument(
        "--dtype", default="bfloat16", choices=["bfloat16", "float32"], help="of the parameters"
    )
    parser.add_argument("--quantize", choices=quantized.KINDS, help="as `load` does")
    parser.add_argument("--folder", help="where to make it (default: the temporary folder)")
    parser.add_argument("--child", default="", help=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> dict:
    """Prints a line, returns what goes into the JSON; the load itself runs in a child process."""
    if args.child:
        found = measure(args.child, args.dtype, args.fsdp, args.tensor, args.quantize)
        print(json.dumps(found))
        return found
    config = ModelConfig(
        d_model=args.width,
        n_heads=max(args.width // 128, 1),
        n_layers=args.layers,
        vocab_size=args.vocab,
        mask_token_id=args.vocab - 1,
        mlp_hidden_size=3 * args.width,
    )
    if (
        args.devices % (args.fsdp * args.tensor)
        or args.width % (args.fsdp * args.tensor)
        or args.vocab % args.tensor
    ):
        raise ValueError(
            f"--fsdp={args.fsdp} --tensor={args.tensor} do not divide --devices={args.devices}, "
            f"--width={args.width} or --vocab={args.vocab}: change them"
        )
    home = pathlib.Path(tempfile.mkdtemp(prefix="llada_load_", dir=args.folder))
    try:
        written = write_checkpoint(home / "hf", config)
        command = [
            sys.executable,
            "-m",
            "llada_jax.benchmark",
            "load",
            f"--devices={args.devices}",
            f"--fsdp={args.fsdp}",
            f"--tensor={args.tensor}",
            f"--dtype={args.dtype}",
            f"--child={home / 'hf'}",
            *([f"--quantize={args.quantize}"] if args.quantize else []),
        ]
        count = f"--xla_force_host_platform_device_count={args.devices}"
        flags = f"{os.environ.get('XLA_FLAGS', '')} {count}"
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
        done = subprocess.run(
            command, env=environment, stdout=subprocess.PIPE, text=True, check=False
        )
        if done.returncode:
            raise OSError(f"the loading process ended with {done.returncode}, see above")
        found = json.loads(done.stdout.splitlines()[-1])
    finally:
        shutil.rmtree(home)
    result = {
        "devices": args.devices,
        "fsdp": args.fsdp,
        "tensor": args.tensor,
        "layers": args.layers,
        "dtype": args.dtype,
        "quantize": args.quantize,
        "gb": written["bytes"] / _GB,
        "largest_tensor_gb": written["largest"] / _GB,
        "seconds": found["seconds"],
        "gb_per_second": written["bytes"] / _GB / found["seconds"],
        "destination_gb": found["destination"] / _GB,
        "host_gb_beyond_destination": found["beyond"] / _GB,
        "largest_tensors_beyond_destination": found["beyond"] / written["largest"],
    }
    print(
        f"{result['gb']:.2f} GB of bfloat16 in {result['seconds']:.1f} s"
        f" ({result['gb_per_second']:.2f} GB/s) as {args.quantize or args.dtype} on"
        f" {args.devices} devices;"
        f" host memory beyond the {result['destination_gb']:.2f} GB of arrays: "
        f"{result['host_gb_beyond_destination']:.2f} GB,"
        f" {result['largest_tensors_beyond_destination']:.2f} of the largest tensor"
    )
    return result
