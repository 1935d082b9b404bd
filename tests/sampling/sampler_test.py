"""The sampler against plain loops and the authors' outputs, and the distribution of its draws."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from llada_jax import sampling
from llada_jax.sampling import torch_ties

V, MASK, EOS, EOT = 23, 22, 5, 6
TABLE = np.random.default_rng(0).normal(size=(3, V, V)).astype(np.float32)
TABLE[2, :, MASK] -= 4.0  # a mask is predicted now and then only


def toy_logits(tokens, attention_mask):
    """Logits from the token itself, its two neighbours and the mean of all attended tokens."""
    table = jnp.asarray(TABLE)
    attended = (
        jnp.ones(tokens.shape, jnp.float32)
        if attention_mask is None
        else attention_mask.astype(jnp.float32)
    )
    mean = (table[0][tokens] * attended[..., None]).sum(1, keepdims=True) / attended.sum(1)[
        :, None, None
    ]
    position = jnp.sin(jnp.arange(tokens.shape[1])[:, None] * jnp.arange(1, V + 1))
    here = (
        table[2][tokens]
        + jnp.roll(table[1][tokens], 1, axis=1)
        + jnp.roll(table[0][tokens], -1, axis=1)
    )
    return here + 3 * mean + position


def torch_topk(values, k):
    """Positions of the k highest values, as torch.topk picks them on a CPU for a row below 64 k.

    A literal copy of libstdc++'s std::nth_element: its swaps decide which of equal values win.
    """
    order = list(range(len(values)))
    first, last = 0, len(values)

    def before(i, j):
        return values[order[i]] > values[order[j]]

    def swap(i, j):
        order[i], order[j] = order[j], order[i]

    while last - first > 3:
        a, b, c = first + 1, first + (last - first) // 2, last - 1
        if before(a, b):
            swap(first, b if before(b, c) else c if before(a, c) else a)
        else:
            swap(first, a if before(a, c) else c if before(b, c) else b)
        i, j = first + 1, last
        while True:
            while before(i, first):
                i += 1
            j -= 1
            while before(first, j):
                j -= 1
            if i >= j:
                break
            swap(i, j)
            i += 1
        first, last = (i, last) if i <= k - 1 else (first, i)
    order[first:last] = sorted(order[first:last], key=lambda i: -values[i])
    return order[:k]


def reference_generate(
    logits_fn, prompts, mask_id, steps, gen_length, block_length, cfg_scale=0.0, mask=None, **ends
):
    """The published algorithm at temperature 0: plain loops, in float64."""
    batch, start = prompts.shape
    x = np.concatenate([prompts, np.full((batch, gen_length), mask_id)], 1)
    prompt_index = x != mask_id
    if mask is not None:
        mask = np.concatenate([mask, np.ones((batch, gen_length), mask.dtype)], 1)
    blocks = gen_length // block_length
    for block in range(blocks):
        end = start + (block + 1) * block_length
        masks_of_block = (x[:, end - block_length : end] == mask_id).sum(1)
        for step in range(steps // blocks):
            logits = np.array(logits_fn(x, mask), np.float64)
            if cfg_scale > 0:
                unconditional = np.array(
                    logits_fn(np.where(prompt_index, mask_id, x), mask), np.float64
                )
                logits = unconditional + (cfg_scale + 1) * (logits - unconditional)
            if ends.get("logits_eos_inf"):
                logits[..., EOS] = -np.inf
            candidates = logits.argmax(-1)
            if ends.get("confidence_eos_eot_inf"):
                logits[..., [EOS, EOT]] = -np.inf
            p = np.exp(logits - logits.max(-1, keepdims=True))
            p /= p.sum(-1, keepdims=True)
            for b in range(batch):
                confidence = [
                    p[b, i, candidates[b, i]] if i < end and x[b, i] == mask_id else -np.inf
                    for i in range(x.shape[1])
                ]
                base, extra = divmod(masks_of_block[b], steps // blocks)
                if count := base + (step < extra):
                    for i in torch_topk(confidence, count):
                        x[b, i] = candidates[b, i]
    return x


SETTINGS = [
    dict(steps=12, gen_length=12, block_length=12),
    dict(steps=6, gen_length=12, block_length=4),
    dict(steps=5, gen_length=12, block_length=12),
    dict(steps=24, gen_length=12, block_length=6),  # more steps than tokens
    dict(steps=6, gen_length=12, block_length=6, cfg_scale=0.7),
    dict(steps=6, gen_length=12, block_length=6, logits_eos_inf=True),
    dict(steps=6, gen_length=12, block_length=12, confidence_eos_eot_inf=True),
    dict(steps=1, gen_length=12, block_length=12),
]


@pytest.mark.parametrize("run", range(len(SETTINGS)))
def test_agrees_with_plain_loops(run):
    # Truth: an independent NumPy implementation. Every second run has left-padded prompts.
    settings = SETTINGS[run]
    prompts = np.random.default_rng(1).integers(0, MASK, (4, 7))
    mask = None
    if run % 2:
        mask = np.ones_like(prompts)
        mask[1, :3], mask[2, :1] = 0, 0
    got = sampling.generate(
        toy_logits, prompts, mask_id=MASK, attention_mask=mask, eos_id=EOS, eot_id=EOT, **settings
    )
    assert got.shape == (4, 19) and got.dtype == jnp.int32
    np.testing.assert_array_equal(
        got, reference_generate(toy_logits, prompts, MASK, mask=mask, **settings)
    )


def test_ties_fall_as_in_torch_on_a_cpu():
    # Truth: the sequential algorithm. Torch agrees with it in the golden run with
    # confidence_eos_eot_inf.
    rng = np.random.default_rng(0)
    for length in (5, 44):
        for levels in (1, 2, 4, 1000):
            values = rng.integers(0, levels, (20, length)).astype(np.float32)
            values[:, rng.integers(0, length, length // 4)] = -np.inf
            for k in (1, 2, 5, 7):
                if k <= length:
                    # Each row is followed by what belongs to no row.
                    longer = np.pad(values, ((0, 0), (0, 3)), constant_values=9.0)
                    chosen = MOST_CONFIDENT(longer, np.full(20, k), np.full(20, length))[:, :length]
                    expected = [np.isin(np.arange(length), torch_topk(row, k)) for row in values]
                    np.testing.assert_array_equal(chosen, expected)


def test_ties_of_a_long_row_go_to_the_first():
    # If 64 k <= length, torch uses a heap; for k = 1 it keeps the first of the highest values.
    values = np.zeros((2, 128), np.float32)
    values[:, 77] = values[1, 30] = 1.0
    chosen = MOST_CONFIDENT(values, np.array([1, 1]), np.array([128, 128]))
    assert [list(np.flatnonzero(row)) for row in np.asarray(chosen)] == [[77], [30]]


MOST_CONFIDENT = jax.jit(torch_ties.most_confident)


def test_masks_in_the_prompt_are_filled_as_published():
    prompts = np.random.default_rng(2).integers(0, MASK, (3, 8))
    prompts[0, 2] = prompts[1, 5] = prompts[1, 6] = MASK
    settings = dict(steps=6, gen_length=12, block_length=6, cfg_scale=0.4)
    got = sampling.generate(toy_logits, prompts, mask_id=MASK, infill="published", **settings)
    np.testing.assert_array_equal(got, reference_generate(toy_logits, prompts, MASK, **settings))


@pytest.mark.parametrize("run", range(7))
def test_golden_runs(golden, run):
    # Truth: the authors' PyTorch sampler, token for token.
    from llada_jax import load

    description = json.loads((golden / "golden.json").read_text())
    arrays = np.load(golden / "golden.npz")
    settings = {
        k: v
        for k, v in description["generate_runs"][run].items()
        if k not in ("stable_in_float64", "pad")
    }
    model, params = load(golden / "policy")
    got = sampling.generate(
        Partial(model.apply, {"params": params}),
        arrays[f"generate_{run}_prompt"],
        attention_mask=arrays[f"generate_{run}_attention_mask"],
        mask_id=description["mask_token_id"],
        eos_id=description["eos_token_id"],
        eot_id=description["eot_token_id"],
        **settings,
    )
    np.testing.assert_array_equal(got, arrays[f"generate_{run}_tokens"])


def independent_logits(logits, tokens, attention_mask):
    """The same logits [V] everywhere: the sampled tokens are then independent draws."""
    return jnp.broadcast_to(logits, (*tokens.shape, logits.shape[-1]))


@pytest.mark.parametrize(
    "temperature, remasking, steps", [(0.5, "low_confidence", 1), (2.0, "random", 2)]
)
def test_temperature_draws_from_the_softmax(temperature, remasking, steps):
    # Truth: softmax(logits / T), every frequency within 4.5 standard errors. With low_confidence
    # there is one step, because a choice between tokens would prefer the likely ones.
    logits = jnp.array([0.3, 1.0, -0.7, 0.0, 0.5, -jnp.inf])
    tokens = sampling.generate(
        Partial(independent_logits, logits),
        np.zeros((256, 1), np.int32),
        mask_id=5,
        steps=steps,
        gen_length=64,
        block_length=64,
        temperature=temperature,
        remasking=remasking,
        key=jax.random.key(0),
    )[:, 1:]
    share = np.bincount(np.asarray(tokens).ravel(), minlength=6) / tokens.size
    expected = np.asarray(jax.nn.softmax(logits / temperature))
    assert np.all(
        np.abs(share - expected) <= 4.5 * np.sqrt(expected * (1 - expected) / tokens.size)
    )


def test_key_decides_the_draw():
    draw = functools.partial(
        sampling.generate,
        toy_logits,
        np.arange(10).reshape(2, 5),
        mask_id=MASK,
        steps=4,
        gen_length=8,
        block_length=4,
        temperature=1.0,
    )
    same, again, other = (
        draw(key=jax.random.key(1)),
        draw(key=jax.random.key(1)),
        draw(key=jax.random.key(2)),
    )
    np.testing.assert_array_equal(same, again)
    assert (same != other).any()


def test_confidence_is_of_the_plain_logits():
    # Position 0 has probabilities .9, .1 and position 1 has .6, .4. So position 0 is the more
    # confident one if and only if its draw is token 0. At temperature T that has the probability
    # .9^(1/T) / (.9^(1/T) + .1^(1/T)).
    temperature, share = 2.0, 0.75
    logits = jnp.log(jnp.array([[0.9, 0.1, 0.0, 0.0], [0.6, 0.4, 0.0, 0.0]]))
    second = jnp.log(jnp.array([0.0, 0.0, 1.0, 0.0]))  # what comes second is token 2

    def fn(tokens, attention_mask):
        return jnp.where((tokens == 3).all(-1)[:, None, None], logits, second)

    tokens = sampling.generate(
        fn,
        np.zeros((4000, 0), np.int32),
        mask_id=3,
        steps=2,
        gen_length=2,
        block_length=2,
        temperature=temperature,
        key=jax.random.key(3),
    )
    assert abs((tokens[:, 0] == 0).mean() - share) < 4.5 * (share * (1 - share) / 4000) ** 0.5


def test_eos_and_eot_lose_their_confidence_at_any_temperature():
    # EOS and EoT are the most confident. Without their confidence, token 9 is the first.
    logits = (
        jnp.full((6, V), -3.0)
        .at[jnp.arange(6), jnp.array([EOS, EOT, 9, EOS, EOT, 10])]
        .set(jnp.array([9.0, 7.0, 1.0, 6.0, 5.0, 0.5]))
    )
    for temperature, distrust, first in ((0.0, False, EOS), (0.0, True, 9), (0.3, True, 9)):
        firsts = []

        def fn(tokens, attention_mask, firsts=firsts):
            jax.debug.callback(firsts.append, tokens)
            return jnp.broadcast_to(logits, (*tokens.shape, V))

        jax.block_until_ready(
            sampling.generate(
                fn,
                np.zeros((1, 0), np.int32),
                mask_id=MASK,
                steps=6,
                gen_length=6,
                block_length=6,
                temperature=temperature,
                confidence_eos_eot_inf=distrust,
                eos_id=EOS,
                eot_id=EOT,
                key=jax.random.key(0),
            )
        )
        jax.effects_barrier()
        after_one = next(t for t in map(np.array, firsts) if (t != MASK).sum() == 1)
        assert after_one[after_one != MASK] == first


def test_random_remasking_commits_in_random_order():
    # The first committed position of six is uniform over 600 rows: chi-squared with 5 degrees of
    # freedom, 25.7 at p = 1e-4.
    def fn(tokens, attention_mask):
        masked = (tokens == 7).sum(-1)
        order = jnp.broadcast_to(6 - masked[:, None], tokens.shape)
        return 50.0 * jax.nn.one_hot(order, 8)  # each token tells when it was committed

    tokens = sampling.generate(
        fn,
        np.zeros((600, 0), np.int32),
        mask_id=7,
        steps=6,
        gen_length=6,
        block_length=6,
        remasking="random",
        key=jax.random.key(0),
    )
    assert (np.sort(tokens, 1) == np.arange(6)).all()
    counts = np.bincount(np.argmin(tokens, 1), minlength=6)
    assert ((counts - 100) ** 2 / 100).sum() < 25.7


def test_second_call_does_not_trace_again():
    traces = []

    def fn(params, tokens, attention_mask):
        traces.append(tokens.shape)
        return params[tokens]

    def run(prompts, value, **settings):
        out = sampling.generate(
            Partial(fn, jnp.full((V, V), value)),
            prompts,
            mask_id=MASK,
            **{**dict(steps=4, gen_length=4, block_length=2), **settings},
        )
        return out.shape

    assert run(np.ones((2, 3), int), 0.0) == (2, 7)
    first = len(traces)
    assert 1 <= first <= 2  # once for the loop's body, whatever the number of steps
    run(np.zeros((2, 3), int), 1.0)
    assert len(traces) == first
    run(np.zeros((2, 3), int), 1.0, steps=2)
    assert len(traces) == 2 * first

    def plain(tokens, attention_mask):
        traces.append("plain")
        return jnp.zeros((*tokens.shape, V))

    for _ in range(2):
        sampling.generate(
            plain, np.ones((1, 1), int), mask_id=MASK, steps=2, gen_length=2, block_length=2
        )
    assert traces.count("plain") == first


GOOD = dict(mask_id=MASK, steps=4, gen_length=8, block_length=4)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(block_length=3), "gen_length=8 is not a positive multiple of block_length=3"),
        (dict(gen_length=0), "gen_length=0"),
        (dict(steps=3), "steps=3 is not a positive multiple of the 2 blocks"),
        (dict(remasking="low"), "remasking='low' is not one of low_confidence, random"),
        (dict(temperature=0.5), "temperature=0.5 draws at random: give key"),
        (dict(temperature=-1.0), "temperature=-1.0"),
        (dict(cfg_scale=float("nan")), "cfg_scale=nan"),
        (dict(remasking="random"), 'remasking="random" draws at random: give key'),
        (dict(logits_eos_inf=True), "give its eos_id"),
        (dict(confidence_eos_eot_inf=True), "give eos_id, eot_id or both"),
        (dict(commit="best"), "commit='best' is not one of schedule, threshold"),
        (dict(commit="threshold"), 'commit="threshold" needs threshold='),
        (dict(steps=None), 'commit="schedule" needs steps='),
        (dict(threshold=0.9), 'threshold=0.9 has no effect with commit="schedule"'),
        (dict(commit="factor", factor=-1), "factor=-1 may not be negative"),
        (dict(commit="threshold", threshold=float("nan")), "threshold=nan is no finite number"),
        (
            dict(commit="factor", factor=1.0, remasking="entropy"),
            'commit="factor" compares probabilities, and remasking="entropy" has none',
        ),
        (dict(top_p=0.9), "top_p=0.9 has no effect at temperature=0"),
        (dict(top_k=0, temperature=1.0, key=jax.random.key(0)), "top_k=0 must be at least 1"),
        (dict(top_p=1.5, temperature=1.0, key=jax.random.key(0)), "top_p=1.5 must be above 0"),
        (dict(stop_at_eos=True), "stop_at_eos=True stops at the EOS token: give its eos_id"),
        (dict(stop_at_eos=True, logits_eos_inf=True, eos_id=EOS), "waits for EOS"),
        (dict(infill="none"), "infill='none' is not one of all, published"),
        (dict(suffix=np.ones((3, 1), int)), "suffix has 3 rows, the prompts 2"),
        (
            dict(row_ids=np.ones(3, int)),
            r"row_ids has shape \[3\]; with these prompts it must",
        ),
        (dict(allowed=np.ones(V)), r"allowed is float32\[23\]"),
        (dict(allowed=np.ones(3, bool)), "allowed has 3 entries, the vocabulary 23"),
        (dict(mask_id=V), f"mask_id={V} is not in the vocabulary of {V}"),
        (dict(eos_id=-1), "eos_id=-1 is not in the vocabulary"),
        (dict(prompts=np.ones(5, int)), r"prompts are int32\[5\]"),
        (dict(prompts=np.ones((2, 5))), r"prompts are float32\[2, 5\]"),
        (
            dict(attention_mask=np.ones((2, 13), int)),
            r"attention_mask has shape \[2, 13\]; with these prompts it must be \[2, 5\]",
        ),
        (
            dict(logits_fn=lambda tokens, mask: jnp.zeros((2, V))),
            r"logits of shape \[2, 23\] for tokens of \[2, 4\]",
        ),
    ],
)
def test_bad_arguments_are_one_line(change, message):
    arguments = {"logits_fn": toy_logits, "prompts": np.ones((2, 5), int), **GOOD, **change}
    with pytest.raises(ValueError, match=message) as e:
        sampling.generate(**arguments)
    assert "\n" not in str(e.value)


def test_sample_responses_pads_and_batches():
    rng = np.random.default_rng(5)
    prompts = [rng.integers(0, MASK, n).tolist() for n in (3, 9, 17, 5, 8)]
    calls = []
    got = sampling.sample_responses(
        toy_logits, prompts, pad_id=EOS, batch_size=2, progress=lambda *a: calls.append(a), **GOOD
    )
    assert got.shape == (5, 8) and calls == [(n, 5) for n in range(1, 6)]
    for prompt, response in zip(prompts, got, strict=True):
        width = 16 if len(prompt) <= 16 else 32
        row = np.array([[EOS] * (width - len(prompt)) + prompt])
        mask = (np.arange(width) >= width - len(prompt)).astype(int)[None]
        expected = reference_generate(toy_logits, row, MASK, 4, 8, 4, mask=mask)
        np.testing.assert_array_equal(response, expected[0, width:])


def test_a_response_ends_where_it_is_asked_to():
    # Truth: the same responses, not ended. The first block of each is looked at by `stop`.
    prompts = [[1, 2, 3], [7, 8, 9], [4, 4, 4]]
    settings = dict(pad_id=EOS, batch_size=2, temperature=2.0, key=jax.random.key(0), **GOOD)
    whole = sampling.sample_responses(toy_logits, prompts, **settings)
    looked = []

    def stop(tokens):
        looked.append(tokens)
        return tokens[:4] == whole[1, :4].tolist()

    found = {r.index: r for r in sampling.respond(toy_logits, prompts, stop=stop, **settings)}
    assert sorted(found) == [0, 1, 2] and all(len(tokens) == 4 for tokens in looked)
    for index, response in found.items():
        ends = 4 if index == 1 else 8
        np.testing.assert_array_equal(response.tokens[:ends], whole[index, :ends])
        assert (response.tokens[ends:] == EOS).all() and response.passes == ends // 2
        assert response.steps[:ends].max() == response.passes  # its own, though refilled
    lengths = [3, 8, 5]
    got = sampling.sample_responses(toy_logits, prompts, **settings | dict(gen_length=lengths))
    assert got.shape == (3, 8) and (got[0, 3:] == EOS).all() and (got[2, 5:] == EOS).all()
    np.testing.assert_array_equal(got[1], whole[1])


def test_sample_responses_of_one_length_are_not_padded():
    seen = []

    def fn(tokens, attention_mask):
        seen.append((tokens.shape, attention_mask))
        return toy_logits(tokens, attention_mask)

    prompts = [[1, 2, 3]] * 8
    got = sampling.sample_responses(
        fn, prompts, pad_id=EOS, batch_size=4, temperature=2.0, key=jax.random.key(0), **GOOD
    )
    assert set(seen) == {((4, 11), None)}
    assert len({tuple(r) for r in got.tolist()}) == 8  # within a batch and between batches
    assert sampling.sample_responses(fn, [], pad_id=EOS, batch_size=4, **GOOD).shape == (0, 8)
    with pytest.raises(ValueError, match="trace=True is no setting of the sampler"):
        sampling.sample_responses(fn, prompts, pad_id=EOS, batch_size=4, trace=True, **GOOD)
    with pytest.raises(ValueError, match="row_ids: 2 for 8 prompts"):
        sampling.sample_responses(fn, prompts, pad_id=EOS, batch_size=4, row_ids=[0, 1], **GOOD)
    with pytest.raises(ValueError, match="batch_size=0"):
        sampling.sample_responses(fn, prompts, pad_id=EOS, batch_size=0, **GOOD)


def test_trim():
    assert sampling.trim(np.array([3, 4, EOT, 1, EOS]), EOS, EOT) == [3, 4]
    assert sampling.trim([3, EOS, 1], EOS) == [3]
    assert sampling.trim([3, 4], EOS, EOT) == [3, 4]
    assert sampling.trim([3, EOS]) == [3, EOS]
