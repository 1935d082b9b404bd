"""Family: what an architecture provides to the library."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple


class Row(NamedTuple):
    """One parameter and its place in the published weights."""

    path: str  # its path in our parameter tree
    name: str  # its published name; {i} stands for the layer
    transpose: bool  # whether the published matrix is [outputs, inputs]


@dataclasses.dataclass(frozen=True)
class Family:
    """One architecture: its configuration, its module, its weights and its costs.

    `Config` is a frozen dataclass with the field names of config.json. It has `model_type`,
    `from_dict(values, source)` and `to_dict()`, and at least the fields d_model, n_layers,
    vocab_size, embedding_size, max_sequence_length, mask_token_id, eos_token_id and pad_token_id.

    `Module(config, dtype, param_dtype, remat, attention, logps_chunk, unroll)` is a linen module
    with the methods `__call__` and `token_logps` of `llada.LLaDA`. For the sampler's caches it also
    has its `init_cache(batch, length)` and `with_cache(tokens, attention_mask, positions, cache,
    at) -> (logits, cache)`, with the method `at` of `cache.KeyValues`; and, for the selective
    cache, `init_features` and `with_features` of the same form, with the method `plan` of
    `features.Features`.
    """

    Config: Any
    Module: Any
    rows: tuple[Row, ...]  # one row for every parameter
    num_params: Callable[[Any], dict[str, int]]  # config -> "embedding" (with the head), "layers"
    flops_per_token: Callable[[Any, int], int]  # (config, row length) -> FLOPs of a forward pass
    # config -> numbers that a layer keeps for its gradient, for each position
    activation_width: Callable[[Any], int]
    architecture: tuple[str, ...]  # fields that must be equal in a policy and its reference
    splits: Mapping[str, str]  # field -> mesh axis whose size must divide it

    @property
    def name(self) -> str:
        """The `model_type` of its config.json."""
        return self.Config.model_type
