"""Family: what the library asks of an architecture."""

from typing import NamedTuple


class Row(NamedTuple):
    """One parameter: where it is in our tree, its published name ({i}: the layer), whether its matrix is transposed."""

    path: str
    name: str
    transpose: bool
