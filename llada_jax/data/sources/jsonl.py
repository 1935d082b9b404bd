"""The source jsonl:PATH_OR_GLOB."""

from collections.abc import Iterator

from llada_jax.files import expand, read_lines


def jsonl_records(pattern: str) -> Iterator[tuple[str, object]]:
    for path in expand(pattern):
        yield from ((f"{path}:{number}", line) for number, line in read_lines(path) if line.strip())
