"""What the library asks of an architecture: a table of its parameters."""

from typing import NamedTuple


class Row(NamedTuple):
    """One parameter in our tree and in the published checkpoint.

    `path` is its place in our tree. `name` is its published name, where {i} is the layer.
    `transpose` is True if the published matrix is the transpose of ours.
    """

    path: str
    name: str
    transpose: bool
