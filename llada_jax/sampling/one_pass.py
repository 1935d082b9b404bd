"""One pass: predictions of the model, and what becomes of them."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from llada_jax.sampling import candidates as candidates_lib
from llada_jax.sampling import growth as growth_lib
from llada_jax.sampling import state as state_lib
from llada_jax.sampling import unmasking
from llada_jax.sampling.revoke import REVOKES, Written
from llada_jax.sampling.settings import Settings
from llada_jax.sampling.state import Rows, State
from llada_jax.sampling.torch_ties import ranks
from llada_jax.sampling.unmasking import COMMITS, CONFIDENCES
from llada_jax.sampling.view import View


class Given(NamedTuple):
    """What stays the same through all passes."""

    logits_fn: Any
    allowed: Bool[Array, " v"] | None  # tokens that may be generated
    key: Any  # of the random draws


def one_pass(state: State, view: View, given: Given, block_only: bool) -> State:
    """The state after a pass over a view of the text.

    With block_only, masks outside the block do not compete.
    """
    rows, s = state.rows, view.s
    logits, shadow, cache = view.logits(given.logits_fn, state.cache)
    found = _predict(rows, logits, view, given)
    chosen, history = _choose(rows, found, view, block_only)
    new = _commit(rows, found, chosen, view, state.passes + 1).replace(history=history)
    if s.revoke != "none":
        new = _revoke(rows, new, shadow, s)
    if s.growth is not None:
        new = _grow(rows, new, found, logits, s)
    new = new.replace(before=rows.tokens != s.mask_id)
    return State(state_lib.advance(new, rows.tokens, s), state.passes + 1, cache)


class Predictions(NamedTuple):
    """What a pass says of the wanted positions."""

    candidates: Int[Array, "b t"]
    score: Float[Array, "b t"]
    logits: Float[Array, "b t v"]  # of which the score was taken


def _predict(rows: Rows, logits, view: View, given: Given) -> Predictions:
    s, confidence, allowed = view.s, CONFIDENCES[view.s.remasking], given.allowed
    if s.logits_eos_inf:
        logits = candidates_lib.forbid(logits, s.eos_id)
    if allowed is not None:
        if allowed.shape[0] != logits.shape[-1]:
            raise ValueError(
                f"allowed has {allowed.shape[0]} entries, the vocabulary {logits.shape[-1]}"
            )
        logits = candidates_lib.allow(logits, allowed)
    gumbel, uniform = _noise(rows, given.key, logits.shape, view)
    drawn = logits
    if s.infill == "all":
        # The confidence keeps the share of the mask token. Where the published loop leaves no
        # mask, it never commits a position whose candidate is the mask token, nor does this one.
        drawn = candidates_lib.forbid(logits, s.mask_id)
    draw = functools.partial(
        candidates_lib.draw, temperature=s.temperature, top_k=s.top_k, top_p=s.top_p
    )
    candidates = jax.vmap(draw)(drawn, gumbel)
    if s.confidence_eos_eot_inf:
        # As published: take them out of the softmax, so the other tokens get their share.
        for end_id in sorted({s.eos_id, s.eot_id} - {None}):
            logits = candidates_lib.forbid(logits, end_id)
    return Predictions(candidates, jax.vmap(confidence.score)(logits, candidates, uniform), logits)


def _noise(rows: Rows, key, shape: tuple[int, ...], view: View) -> tuple[Any, Any]:
    """Gumbel noise [b, t, v] and uniform noise [b, t], each None if it is not needed.

    A draw depends on the row's number, its pass, and the position from its first real token.
    """
    s = view.s
    gumbel, uniform = s.temperature > 0, CONFIDENCES[s.remasking].random
    if not (gumbel or uniform):
        return None, None

    def at(key, place):
        first, second = jax.random.split(jax.random.fold_in(key, place))
        return (
            jax.random.gumbel(first, shape[-1:], jnp.float32) if gumbel else None,
            jax.random.uniform(second) if uniform else None,
        )

    def of_row(row_id, number, places):
        of_pass = jax.random.fold_in(jax.random.fold_in(key, row_id), number)
        return jax.vmap(at, (None, 0))(of_pass, places)

    places = view.places - rows.padding[:, None]
    return jax.vmap(of_row)(rows.row_id, rows.passes, jnp.maximum(places, 0))


def _choose(rows: Rows, found: Predictions, view: View, block_only: bool):
    """The positions [b, t] to commit, and the history of the commit rule."""
    s, rule, score = view.s, COMMITS[view.s.commit], found.score
    first, end = state_lib.bounds(rows, s)
    may = state_lib.active(rows, s) & ~rows.sizing
    open_now = view.of(state_lib.is_open(rows, s))
    competes = open_now & (view.places < end) & may[:, None]
    if block_only:
        competes &= (view.places >= first) & (view.places < first + s.block_length)
    quota = _quota(rows, s)
    history, stable = _stability(rows, found, view)
    # The published caches rank the block alone.
    text = rows.tokens.shape[1] if rule.scheduled and view.fed is None else None
    row = unmasking.Row(
        competes,
        score,
        ranks(score, competes, quota, view.places, (rows.padding, rows.end), text),
        quota,
        jax.vmap(unmasking.entropy)(found.logits) if rule.entropy else jnp.zeros_like(score),
        stable,
    )
    choose = functools.partial(rule.choose, numbers=s, limit=CONFIDENCES[s.remasking].limit)
    chosen = jax.vmap(choose)(row) & competes
    if not rule.scheduled:  # a rule that chose nothing would be asked the same for ever
        none = ~jnp.any(chosen, 1, keepdims=True)
        chosen |= none & competes & (row.rank == 0)
    return chosen, history


def _quota(rows: Rows, s: Settings) -> Int[Array, " b"]:
    """How many positions the schedule commits in this pass; other rules do not read it."""
    if not COMMITS[s.commit].scheduled:
        return jnp.ones_like(rows.step)
    steps = s.steps // (s.gen_length // s.block_length)
    least, extra = jnp.divmod(rows.planned, steps)
    quota = least + (rows.step < extra)
    if s.infill == "all":
        # Positions of the block that could not be filled in its steps are filled after them.
        quota = jnp.where(rows.step < steps, quota, jnp.maximum(least, 1))
    return jnp.where(rows.revoked > 0, rows.revoked, quota)


def _stability(rows: Rows, found: Predictions, view: View):
    """The history with this pass, and how many passes the predictions [b, t] have been stable."""
    if not COMMITS[view.s.commit].stable:
        return rows.history, jnp.zeros(found.score.shape, jnp.int32)
    before, passes = (rows.history[k] for k in ("logits", "stable"))
    whole = before.shape[1] == found.score.shape[1]
    if not whole:
        before, passes = view.of_deep(before), view.of(passes)
    change = jax.vmap(unmasking.divergence)(found.logits, before)
    same = (change < view.s.kl_threshold) & (rows.turn > 0)[:, None]
    passes = jnp.where(same, passes + 1, 0)
    new = {"logits": found.logits, "stable": passes}
    if not whole:
        new = {k: view.put(rows.history[k], part) for k, part in new.items()}
    return new, passes


def _commit(rows: Rows, found: Predictions, chosen: Bool[Array, "b t"], view: View, number) -> Rows:
    """The rows with the candidates of the chosen positions in them."""
    s = view.s
    # If the candidate is the mask token, the position stays masked.
    filled = chosen & (found.candidates != s.mask_id)

    def put(x, value):
        return view.put(x, jnp.where(filled, value, view.of(x)))

    active, counts = state_lib.active(rows, s), rows.revoked == 0
    before_end = state_lib.places(rows) < state_lib.bounds(rows, s)[1]
    return rows.replace(
        tokens=put(rows.tokens, found.candidates),
        score=put(rows.score, found.score),
        steps=put(rows.steps, number - rows.began[:, None]),
        turn=rows.turn + active,
        step=rows.step + (active & counts & ~rows.sizing),
        passes=rows.passes + (active & jnp.any(state_lib.is_open(rows, s) & before_end, 1)),
        committed=jnp.sum(chosen, 1, dtype=jnp.int32),
        revoked=jnp.zeros_like(rows.revoked),
    )


def _revoke(was: Rows, rows: Rows, shadow, s: Settings) -> Rows:
    """The rows after the commits of a pass, with some positions masked again."""
    rule = REVOKES[s.revoke]
    places = state_lib.block_places(was, s)
    in_text = jnp.minimum(places, was.tokens.shape[1] - 1)

    def of(x):
        return jnp.take_along_axis(x, in_text, 1)

    may = (state_lib.active(was, s) & ~was.sizing)[:, None] & (places < was.end[:, None])
    written = may & (of(was.tokens) != s.mask_id) & ~of(was.given)
    committed = may & (of(was.tokens) == s.mask_id) & (of(rows.tokens) != s.mask_id)
    score = CONFIDENCES["probability"].score
    by_shadow = jnp.zeros(places.shape)
    if rule.shadow:
        by_shadow = jax.vmap(functools.partial(score, noise=None))(shadow, of(was.tokens))
    row = Written(
        written, committed, of(rows.score), by_shadow, rows.committed, was.committed,
        was.planned, was.revisions,
    )  # fmt: skip
    back = jax.vmap(functools.partial(rule.choose, numbers=s))(row)
    back &= written | committed
    number = state_lib.count(back)

    def put(x, value):
        index = jnp.arange(x.shape[0])[:, None], jnp.where(back, places, x.shape[1])
        return x.at[index].set(value, mode="drop")

    return rows.replace(
        tokens=put(rows.tokens, s.mask_id),
        score=put(rows.score, jnp.inf),
        steps=put(rows.steps, -1),
        revocations=put(rows.revocations, of(rows.revocations) + 1),
        revoked=number,
        revisions=was.revisions + (number > 0),
    )


def _grow(was: Rows, rows: Rows, found: Predictions, logits, s: Settings) -> Rows:
    """The rows after the commits of a pass, longer where the model expects no end."""
    growth = s.growth
    expected = growth_lib.expectation(logits, was, s.eos_id, growth.eos_window)
    value = CONFIDENCES[s.remasking].value(found.score)
    block = state_lib.is_open(was, s) & state_lib.inside(was, s)
    block &= state_lib.active(was, s)[:, None]
    rows = growth_lib.insert(rows, expected, value, block, growth, s.gen_length, s.mask_id)
    sizing = growth_lib.lengthen(was, expected, growth, s.gen_length, s.eos_id)
    rows = state_lib.replace_rows(rows, sizing.replace(passes=rows.passes), was.sizing)
    # The last block may have got more masks.
    block = state_lib.inside(rows, s) & (state_lib.places(rows) < rows.end[:, None])
    return rows.replace(planned=state_lib.count(block & ~rows.given))
