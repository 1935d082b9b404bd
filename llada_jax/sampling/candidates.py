"""Candidates: the token that each position would become."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def forbid(logits: Float[Array, "*b v"], token_id: int) -> Float[Array, "*b v"]:
    """Gives a token the logit -inf."""
    # Unlike an indexed update, `where` can be fused with other operations.
    return jnp.where(jnp.arange(logits.shape[-1]) == token_id, -jnp.inf, logits)


def allow(logits: Float[Array, "*b v"], allowed: Bool[Array, " v"]) -> Float[Array, "*b v"]:
    """Gives all tokens but the allowed ones the logit -inf."""
    return jnp.where(allowed, logits, -jnp.inf)


def draw(
    logits: Float[Array, "l v"],
    noise: Float[Array, "l v"] | None,
    *,
    temperature: float | int = 0.0,
    top_k: int | None = None,
    top_p: float | int | None = None,
) -> Int[Array, " l"]:
    """Returns the candidates of one row: the best tokens, or draws from softmax(logits / T).

    noise: standard Gumbel noise, which temperature > 0 needs: the candidate is the argmax of
        logits + T * noise, in float32.
    top_k: only the k most probable tokens can be drawn.
    top_p: only the most probable tokens can be drawn, as many as are needed to reach the
        probability p at temperature T.

    Tokens as probable as the last one that can be drawn can be drawn too.
    """
    if temperature == 0 or noise is None:
        return jnp.argmax(logits, -1).astype(jnp.int32)
    least = jnp.full(logits.shape[:-1], -jnp.inf)
    if top_k is not None and top_k < logits.shape[-1]:
        least = jax.lax.top_k(logits, top_k)[0][:, -1]
    if top_p is not None:
        # Nucleus of the tokens that top_k leaves.
        kept = jnp.where(logits >= least[:, None], logits, -jnp.inf)
        ordered = -jnp.sort(-kept, axis=-1)
        shares = jax.nn.softmax(ordered / temperature, -1)
        before = jnp.cumsum(shares, -1) - shares
        inside = (before < top_p) & (ordered > -jnp.inf)
        least = jnp.min(jnp.where(inside, ordered, jnp.inf), -1)
    logits = jnp.where(logits >= least[:, None], logits, -jnp.inf)
    return jnp.argmax(logits + temperature * noise, -1).astype(jnp.int32)
