"""The estimators that the laboratory measures by default: the paper's six and ours."""

import dataclasses

from llada_jax import noise
from llada_jax.variance.problem import Estimator

UP_PROJ = "blocks/up_proj/kernel[0]"  # the paper measured the gradient of this parameter
# The six columns of the paper's Table 2; the first is its base.
TABLE_2 = tuple(
    Estimator(noise.Scheme(n_t, n_yt), shared, f"{n_t} x {n_yt}{'' if shared else ', not shared'}")
    for n_t, n_yt, shared in (
        (4, 1, True),
        (1, 1, True),
        (8, 1, True),
        (1, 4, True),
        (2, 2, True),
        (4, 1, False),
    )
)
OURS = (
    "n_t=4,times=stratified",
    "n_t=4,times=stratified,masks=cyclic",
    "n_t=4,times=antithetic,masks=coupled",
    "n_t=4,times=importance",
    "n_t=4,times=importance,masks=cyclic",
    "n_t=4,times=importance,masks=cyclic,share_in_pair=masks",
    "n_t=4,times=stratified,weights=leave_one_out,pseudo_count=1",
    "n_t=4,times=importance,weights=leave_one_out,pseudo_count=1",
    "n_t=4,times=stratified,masks=cyclic,weights=balanced,pseudo_count=0.2",
    "n_t=4,times=importance,masks=cyclic,weights=balanced,pseudo_count=1",
    "n_t=4,times=stratified,weights=self_normalised",
    "n_t=8,times=importance,masks=cyclic",
)


def parse_scheme(text: str) -> Estimator:
    """Parses a text such as "n_t=4,times=stratified,share_noise=no" to an Estimator of that name.

    Raises ValueError if an item is not NAME=VALUE for share_noise or a field of Scheme.
    """
    types = {field.name: type(field.default) for field in dataclasses.fields(noise.Scheme)}
    values, shared = {}, True
    for item in filter(None, text.split(",")):
        name, _, value = (part.strip() for part in item.partition("="))
        if name == "share_noise" and value in ("yes", "no"):
            shared = value == "yes"
            continue
        try:
            values[name] = types[name](value)
        except (KeyError, ValueError):
            raise ValueError(
                f"--schemes: {item!r} in {text!r} sets nothing: "
                f"NAME=VALUE of share_noise=yes|no, {', '.join(types)}"
            ) from None
    return Estimator(noise.Scheme(**values), shared, text)
