#!/usr/bin/env python3
"""Runs the commands of documents as written, in order, in one scratch copy of the checkout.

    python .ci/docs_commands.py docs/data.md     the blocks `sh`
    python .ci/docs_commands.py --long           also the blocks `sh long`

Prints each command and its seconds, and ends with the status of the first that fails. The README's
two commands, which make a virtual environment and install, are left to .ci/run. What a command
leaves in runs/ is there for the next.
"""

import argparse
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent


def commands(path: pathlib.Path, labels: set[str]) -> list[str]:
    """The commands of the blocks with one of the labels, one a line of the document."""
    found = re.findall(r"^```([^\n`]*)\n(.*?)^```$", path.read_text(), re.MULTILINE | re.DOTALL)
    texts = (text for label, text in found if label in labels)
    lines = (line.strip() for text in texts for line in re.sub(r"\\\n\s*", "", text).splitlines())
    return [line for line in lines if line and not line.startswith(("#", "python3 -m venv"))]


def copy_checkout(folder: pathlib.Path) -> None:
    """Copies what git tracks, and what it would track."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    )  # fmt: skip
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)


def main() -> int:
    """Runs them; the exit status of the first that fails, or 0."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "documents", nargs="*", type=pathlib.Path, help="default: README.md and docs/*.md"
    )
    parser.add_argument("--long", action="store_true", help="run the blocks labelled long, too")
    args = parser.parse_args()
    documents = args.documents or [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    labels = {"sh", "sh long"} if args.long else {"sh"}
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="llada_docs_") as folder:
        copy_checkout(pathlib.Path(folder))
        for document in documents:
            for command in commands(document, labels):
                print(f"\n{document.name}$ {command}", flush=True)
                began = time.monotonic()
                shell = ["bash", "-euo", "pipefail", "-c", command]
                done = subprocess.run(shell, cwd=folder, check=False)
                print(f"    {time.monotonic() - began:.1f} s", flush=True)
                if done.returncode:
                    print(
                        f"error: status {done.returncode} of a command of {document.name}",
                        file=sys.stderr,
                    )
                    return done.returncode
    print(f"\nall commands ran, {time.monotonic() - started:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
