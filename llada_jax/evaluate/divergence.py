"""How far a policy is from its reference, by ELBOs of the policy's own responses."""

from collections.abc import Callable, Sequence

import numpy as np

from llada_jax import likelihood
from llada_jax.evaluate.responses import KL


def answer_ids(
    tokens: Sequence[int] | np.ndarray, *, eos_id: int, append_eos: bool, multiple: int, room: int
) -> list[int]:
    """The tokens of a response that training would score.

    These are the tokens up to and including the first EOS (without it unless `append_eos`), then
    EOS up to a multiple of `multiple` tokens, but not beyond `room` tokens. A response that has no
    EOS is taken whole. See `data.packing.Packing` for what training does with a text.
    """
    ids = [int(token) for token in tokens]
    if eos_id in ids:
        ids = ids[: ids.index(eos_id) + append_eos]
    return ids + [eos_id] * min(-len(ids) % multiple, max(room - len(ids), 0))


def kl_from_reference(
    key,
    policy_fn: Callable,
    reference_fn: Callable,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    *,
    draws: int,
    mask_id: int,
    batch_size: int,
    row_length: int | None = None,
    progress: Callable[[], object] | None = None,
) -> dict[str, float]:
    """Estimates KL(policy || reference) in nats a response, from one response to each prompt.

    {"solve/kl": mean of B_policy(y|x) - B_reference(y|x), "solve/kl_stderr": its standard error
    over the prompts, nan for one}. B are ELBOs of `draws` masks, the same masks for both policies,
    so a policy that is its reference gives exactly 0.

    `answers` must be drawn from the policy: one token a pass, in random order, at temperature 1.
    The value is the KL divergence only as far as the ELBO is the log-likelihood. The gaps of both
    policies cancel in part, and nothing says how far: the value may be below 0.

    It costs 2 x draws model calls for each response; an answer of at most log2(draws + 1) tokens
    has its exact ELBO. The other arguments are those of `likelihood.log_likelihoods`;
    progress() is called now and then. An empty answer counts 0.
    """
    ratios = np.zeros(len(prompts))
    there = [i for i, answer in enumerate(answers) if len(answer)]

    def elbos(logits_fn) -> np.ndarray:
        return likelihood.log_likelihoods(
            key,
            logits_fn,
            [prompts[i] for i in there],
            [answers[i] for i in there],
            mask_id=mask_id,
            mc_num=draws,
            batch_size=batch_size,
            row_length=row_length,
            request_ids=there,
            report=None if progress is None else lambda at, values: progress(),
        ).astype(np.float64)

    ratios[there] = elbos(policy_fn) - elbos(reference_fn)
    error = ratios.std(ddof=1) / len(ratios) ** 0.5 if len(ratios) > 1 else np.nan
    return {KL: float(ratios.mean()), f"{KL}_stderr": float(error)}
