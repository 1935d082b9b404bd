"""Converts weights between Hugging Face style folders (safetensors) and our checkpoints.

python -m llada_jax.convert import HF_DIR OUT      makes OUT, a checkpoint of this library
python -m llada_jax.convert export CKPT HF_DIR     makes HF_DIR, a folder in the published layout

It runs on the CPU, so the model must fit in the host's memory.
"""

import argparse
import sys

import jax
import numpy as np
from etils import epath

from llada_jax import cli
from llada_jax.checkpoints.loading import home_of, load, model_folder
from llada_jax.checkpoints.orbax import Checkpoints
from llada_jax.checkpoints.published import DTYPES, TOKENIZER_FILES, copy_tokenizer, export
from llada_jax.files import new_folder


def import_folder(source: epath.PathLike, out: epath.PathLike, dtype=None):
    """Converts a Hugging Face style folder to our checkpoint `out` (model/ and checkpoints/0).

    `dtype` casts the parameters; None keeps their type. Raises ValueError if `source` is already a
    checkpoint of ours, or if `out` exists and is not empty.
    """
    source = epath.Path(source).expanduser()
    if source.is_dir() and home_of(source) is not None:
        raise ValueError(
            f"{source} is a checkpoint of ours already; import takes a Hugging Face style folder"
        )
    with new_folder(epath.Path(out).expanduser()) as folder:
        _, params = load(source, dtype)
        (folder / "model").mkdir(parents=True)
        (source / "config.json").copy(folder / "model" / "config.json")
        copy_tokenizer(source, folder / "model", required=False)
        with Checkpoints(folder / "checkpoints") as checkpoints:
            checkpoints.save(0, {"params": params}, {"imported_from": str(source)})


def parser() -> cli.Parser:
    """Returns the parser of the command's flags."""
    parser = cli.Parser("convert", __doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    into = commands.add_parser(
        "import", help="a Hugging Face style folder becomes a checkpoint of ours"
    )
    into.add_argument("hf_dir", metavar="HF_DIR", help="config.json, safetensors, tokenizer files")
    into.add_argument("out", metavar="OUT", help="new workdir: OUT/model and OUT/checkpoints/0")
    out = commands.add_parser(
        "export", help="a checkpoint of ours becomes a Hugging Face style folder"
    )
    out.add_argument(
        "checkpoint", metavar="CKPT", help="a workdir (newest step) or workdir/checkpoints/<step>"
    )
    out.add_argument("hf_dir", metavar="HF_DIR", help="new folder")
    out.add_argument(
        "--max_shard_bytes",
        type=lambda x: int(float(x)),
        default=5_000_000_000,
        help="default: 5e9 bytes a file",
    )
    for command in (into, out):
        command.add_argument(
            "--dtype", choices=[np.dtype(t).name for t in DTYPES.values()], help="default: as it is"
        )
    return parser


def main(args: argparse.Namespace):
    """Runs the command."""
    jax.config.update("jax_platforms", "cpu")  # the whole model is loaded onto one device
    if args.command == "import":
        import_folder(args.hf_dir, args.out, args.dtype)
        return
    source = epath.Path(args.checkpoint).expanduser()
    model, params = load(source, args.dtype)
    home = model_folder(source)
    has_tokenizer = any((home / name).exists() for name in TOKENIZER_FILES[:2])
    export(
        model,
        params,
        args.hf_dir,
        tokenizer_from=home if has_tokenizer else None,
        max_shard_bytes=args.max_shard_bytes,
    )


if __name__ == "__main__":
    sys.exit(cli.run(main, parser()))
