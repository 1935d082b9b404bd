"""The likelihood against enumeration, brute force over orders, closed forms, and other routes.

The published conventions have their truth in tests/golden/likelihood_test.py.
"""

import gzip
import itertools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import ROOT
from jax.tree_util import Partial

import llada_jax
from llada_jax import elbo, likelihood, sampling, tokenizer
from llada_jax.models.llada import LLaDA, ModelConfig
from llada_jax.parallel import mesh

MASK = 7
PROMPT, ANSWER = [1, 2], [3, 4, 5, 6]
KEY = jax.random.key(0)
RAGGED = (
    [[1, 2], [], [5, 6, 1], [2], [4, 4, 2, 1]],
    [[3, 4, 5, 6], [6, 5], [1], [2, 2, 3], [0, 1, 2, 3, 4]],
)


def toy(tokens, attention_mask, segment_ids=None, positions=None):
    """Logits that depend on all tokens of the segment and on where they stand."""
    if segment_ids is None:
        segment_ids = jnp.ones_like(tokens)
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    same = segment_ids[:, :, None] == segment_ids[:, None]
    seen = jnp.sum(jnp.where(same, jnp.sin(3.0 * tokens + positions)[:, None], 0), -1) + positions
    return 1.5 * jnp.cos(seen[..., None] * (1 + jnp.arange(8)))


def exact_elbo(prompt=PROMPT, answer=ANSWER):
    tokens = jnp.array([[*prompt, *answer]])
    response = jnp.arange(tokens.shape[1])[None] >= len(prompt)
    return float(elbo.exact_elbo(lambda t: toy(t, None), tokens, response, mask_id=MASK)[0])


def logps_given(seen, prompt=PROMPT, answer=ANSWER):
    """Log-probabilities of the answer tokens if those at `seen` are visible, by one plain call."""
    tokens = [*prompt, *(a if i in seen else MASK for i, a in enumerate(answer))]
    logps = jax.nn.log_softmax(toy(jnp.array([tokens]), None)[0])[len(prompt) :]
    return [float(logps[i, a]) for i, a in enumerate(answer)]


@pytest.fixture(scope="module")
def model():
    config = ModelConfig(
        d_model=16, n_heads=2, n_layers=1, vocab_size=8, mask_token_id=MASK, mlp_hidden_size=16
    )
    module = LLaDA(config)
    params = module.init(jax.random.key(2), jnp.array([PROMPT]))["params"]
    return Partial(module.apply, {"params": jax.tree.map(lambda x: 8 * x, params)})


@pytest.mark.parametrize(
    "settings",
    [
        {"mc_num": 8},
        {"mc_num": 8, "batch_size": 4, "times": "official"},  # unbiased where 4 divides L
        {**likelihood.FEW_DRAWS, "mc_num": 8},
    ],
    ids=["unbiased", "official", "few"],
)
def test_estimates_have_the_exact_elbo_as_mean(settings):
    repeats = 2000
    found = likelihood.log_likelihoods(
        KEY, toy, [PROMPT] * repeats, [ANSWER] * repeats, mask_id=MASK,
        **{"batch_size": 2000, **settings},
    )  # fmt: skip
    error = found.std(ddof=1) / np.sqrt(repeats)
    assert 0 < error < 0.01 * abs(exact_elbo()), "the test has no power"
    assert abs(found.mean() - exact_elbo()) < 4 * error


@pytest.mark.parametrize(
    "times, batch_sizes",
    [("systematic", (3, 40)), pytest.param("official", (4, 4), marks=pytest.mark.slow)],
)
def test_a_request_has_the_same_value_in_any_packing(model, times, batch_sizes):
    # Two requests in a row; one in each row; and one alone, which no packing knows of.
    logits_fn = {"systematic": toy, "official": model}[times]
    settings = {"mask_id": MASK, "mc_num": 4, "times": times, "cfg_scale": 0.5}
    first, second = (
        likelihood.log_likelihoods(
            KEY, logits_fn, *RAGGED, batch_size=size, row_length=length, **settings
        )
        for size, length in zip(batch_sizes, (11, None), strict=True)
    )
    np.testing.assert_allclose(first, second, rtol=2e-5)
    prompt, answer = RAGGED[0][0], RAGGED[1][0]
    alone = likelihood.log_likelihood(
        KEY, logits_fn, prompt, answer, batch_size=batch_sizes[0], **settings
    )
    assert alone == pytest.approx(first[0], rel=2e-5)


@pytest.mark.parametrize("times", ["systematic", "official"])
def test_devices_that_split_the_rows_change_nothing(times):
    rows = mesh.rows(mesh.make_mesh())
    settings = dict(mask_id=MASK, mc_num=16, times=times)
    reported = np.zeros(5)

    def report(at, values):
        assert not reported[at].any()
        reported[at] = values

    alone = likelihood.log_likelihoods(KEY, toy, *RAGGED, **settings)
    split = likelihood.log_likelihoods(
        KEY, toy, *RAGGED, row_sharding=rows, report=report, **settings
    )
    np.testing.assert_allclose(split, alone, rtol=1e-5)
    np.testing.assert_array_equal(reported, split)
    greedy = likelihood.are_greedy(toy, *RAGGED, mask_id=MASK, row_sharding=rows)
    np.testing.assert_array_equal(greedy, likelihood.are_greedy(toy, *RAGGED, mask_id=MASK))
    with pytest.raises(ValueError, match="batch_size=12 is no multiple of the 8 parts"):
        likelihood.are_greedy(toy, *RAGGED, mask_id=MASK, row_sharding=rows, batch_size=12)


def test_answers_with_few_subsets_are_exact():
    requests = [RAGGED[0][:2], RAGGED[1][:2]]  # answers of four tokens and of two
    settings = {"mask_id": MASK, "batch_size": 8, "row_length": 6}
    expected = [exact_elbo(*request) for request in zip(*requests, strict=True)]
    found = likelihood.log_likelihoods(KEY, toy, *requests, mc_num=15, **settings)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    # One draw less than there are subsets of four tokens.
    drawn = likelihood.log_likelihoods(KEY, toy, *requests, mc_num=14, **settings)
    assert drawn[1] == found[1] and abs(drawn[0] - found[0]) > 1e-3


def test_other_numbers_are_other_draws():
    settings = {"mask_id": MASK, "mc_num": 2, "request_ids": [5, 5, 6]}
    found = likelihood.log_likelihoods(KEY, toy, [PROMPT] * 3, [ANSWER] * 3, **settings)
    assert found[0] == found[1] != found[2]


def by_count(tokens, attention_mask):
    """log p of token 2 and of the mask is -1 - 0.3 x masks, at every position."""
    target = -1 - 0.3 * jnp.sum(tokens == MASK, -1)[:, None, None]
    rest = jnp.log1p(-2 * jnp.exp(target))
    logps = jnp.concatenate([rest, target, target], -1)  # of tokens 0, 2 and the mask
    logits = jnp.full((len(tokens), 1, 8), -jnp.inf).at[..., jnp.array([0, 2, MASK])].set(logps)
    return jnp.broadcast_to(logits, (*tokens.shape, 8))


@pytest.mark.parametrize("extra", [0, 1])
def test_the_official_estimate_is_a_row_of_the_grid(extra):
    # Closed form: with l drawn masks and `extra` in the prompt, l + extra are counted.
    length, batch = 5, 2
    counts = likelihood.grid(length, batch)
    counted = counts + extra
    values = (length / counts * counted * (-1 - 0.3 * counted)).mean(-1)
    prompt, answer = [1, *[MASK] * extra], [2] * length
    found = {
        round(
            likelihood.log_likelihood(
                jax.random.key(seed), by_count, prompt, answer,
                mask_id=MASK, mc_num=3, batch_size=batch, times="official",
            ), 4,
        )
        for seed in range(30)
    }  # fmt: skip
    assert found == {round(float(x), 4) for x in values}


@pytest.mark.parametrize("length", [1, 2, 3, 4])
def test_exact_likelihood_is_the_mean_over_all_orders(length):
    answer = ANSWER[:length]
    orders = list(itertools.permutations(range(length)))
    brute = [
        sum(logps_given(order[:k], answer=answer)[i] for k, i in enumerate(order))
        for order in orders
    ]
    expected = np.logaddexp.reduce(brute) - math.log(len(orders))
    found = likelihood.exact_log_likelihood(toy, PROMPT, answer, mask_id=MASK, batch_size=4)
    assert found == pytest.approx(expected, rel=1e-5)
    for order, value in zip(orders, brute, strict=True):
        steps = np.argsort(order)
        one = likelihood.order_log_likelihood(toy, PROMPT, answer, steps, mask_id=MASK)
        assert one == pytest.approx(value, rel=1e-5)
    elbo_of = exact_elbo(answer=answer)
    assert elbo_of == pytest.approx(np.mean(brute), rel=1e-5)
    assert elbo_of < found if length > 1 else elbo_of == pytest.approx(found)


def test_tokens_of_one_step_do_not_see_each_other():
    together = likelihood.order_log_likelihood(toy, PROMPT, ANSWER, [5, 5, 5, 5], mask_id=MASK)
    assert together == pytest.approx(sum(logps_given(())), rel=1e-5)
    pairs = likelihood.order_log_likelihood(toy, PROMPT, ANSWER, [9, 2, 2, 9], mask_id=MASK)
    first, then = logps_given(()), logps_given((1, 2))
    assert pairs == pytest.approx(first[1] + first[2] + then[0] + then[3], rel=1e-5)


@pytest.mark.slow
def test_the_commits_of_the_sampler_have_the_likelihood_of_their_confidences(model):
    # Second route: the sampler's own trace. It commits two tokens in each pass.
    trace = sampling.generate(
        model, jnp.array([PROMPT]), mask_id=MASK, gen_length=6, block_length=6, steps=3, trace=True
    )
    answer, steps = np.asarray(trace.tokens)[0, 2:], np.asarray(trace.steps)[0, 2:]
    found = likelihood.order_log_likelihood(model, PROMPT, answer, steps, mask_id=MASK)
    assert found == pytest.approx(np.log(trace.confidence[0, 2:]).sum(), rel=1e-4)


def test_guidance_is_that_of_the_combined_logits():
    # The whole prompt is masked in the unconditional logits, also where it is a mask already.
    def guided(tokens, attention_mask):
        free = tokens.at[:, :2].set(MASK)
        both = toy(tokens, None), toy(free, None)
        return both[1] + 2.5 * (both[0] - both[1])

    for prompt in (PROMPT, [MASK, 2]):
        args = (prompt, ANSWER, [0, 1, 1, 2])
        found = likelihood.order_log_likelihood(toy, *args, mask_id=MASK, cfg_scale=1.5)
        expected = likelihood.order_log_likelihood(guided, *args, mask_id=MASK)
        assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_greedy_answers_are_those_that_the_sampler_writes(model):
    prompts = [[1, 2], [5, 6]]
    written = sampling.generate(
        model, jnp.array(prompts), mask_id=MASK, gen_length=3, block_length=3, steps=3
    )
    answers = list(np.asarray(written)[:, 2:])
    wrong = [np.where(np.arange(3) == i, (a + 1) % 7, a) for i, a in enumerate(answers)]
    found = likelihood.are_greedy(
        model, [*prompts, *prompts, [1]], [*answers, *wrong, []], mask_id=MASK, row_length=11
    )
    assert found.tolist() == [True, True, False, False, True]
    assert likelihood.is_greedy(model, prompts[0], answers[0], mask_id=MASK)


@pytest.mark.parametrize("best, expected", [(2, [True, False, True]), (MASK, [False] * 3)])
def test_a_mask_that_is_filled_elsewhere_or_stays_is_not_greedy(best, expected):
    # As published: a mask of the prompt takes a pass, and a committed mask is no token. A longer
    # answer in the same row gives a request no more passes.
    def always(tokens, attention_mask, segment_ids, positions):
        return jnp.broadcast_to(jax.nn.one_hot(best, 8), (*tokens.shape, 8))

    prompts, answers = [[1], [1, MASK], [1]], [[2, 2], [2, 2], [2] * 5]
    found = likelihood.are_greedy(always, prompts, answers, mask_id=MASK, row_length=13)
    assert found.tolist() == expected


def test_rolling_windows_of_one_token_are_exact():
    # A window of one token needs one draw: log p of the token, given `context` tokens before it.
    text, prefix = [3, 1, 4, 1, 5], [0]
    found = likelihood.rolling_log_likelihood(
        KEY, toy, text, window=1, context=2, prefix=prefix, mask_id=MASK, mc_num=1, row_length=3
    )
    whole = [*prefix, *text]
    expected = [
        logps_given((), whole[max(0, i - 2) : i], [whole[i]])[0] for i in range(1, len(whole))
    ]
    assert found == pytest.approx(sum(expected), rel=1e-5)


def test_a_rolling_text_is_the_sum_of_its_windows():
    text = [3, 1, 4, 1, 5, 2, 6]
    settings = {"mask_id": MASK, "mc_num": 4, "row_length": 8}
    found = likelihood.rolling_log_likelihood(KEY, toy, text, window=3, context=5, **settings)
    prompts, answers = [[], text[:3], text[1:6]], [text[:3], text[3:6], text[6:]]
    expected = likelihood.log_likelihoods(KEY, toy, prompts, answers, **settings)
    assert found == pytest.approx(expected.sum(), rel=1e-6)


def test_perplexity_and_bits_of_a_uniform_model():
    nats = -10 * math.log(4)  # ten tokens of four equal ones, which are two bits each
    assert likelihood.perplexity(nats, 10) == pytest.approx(4)
    assert likelihood.bits_per_byte(nats, 5) == pytest.approx(4)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"answers": [[]]}, "answer 0 is empty"),
        ({"answers": [[3, MASK]]}, 'the mask token 7: only times="official"'),
        ({"answers": [[3.5]]}, r"answer 0 is float64\[1\]: give token ids"),
        ({"prompts": [[-1]]}, "prompt 0 has the id -1"),
        ({"prompts": [[1], [2]]}, "2 prompts, 1 answers"),
        ({"row_length": 5}, "request 0 has 6 tokens, more than row_length=5"),
        ({"mc_num": 0}, "mc_num=0 must be at least 1"),
        ({"times": "official", "mc_num": 4}, "mc_num=4 is less than batch_size=16"),
        ({"times": "official", "masks": "cyclic"}, "times=\"official\", masks='cyclic'"),
        ({"times": "never"}, "times='never' is not one of"),
        ({"request_ids": [1, 2]}, "request_ids: 2 for 1 requests"),
        ({"cfg_scale": -1.0}, "cfg_scale=-1.0 must be at least 0"),
        ({"mask_id": 8}, "mask_id=8 is not in the vocabulary of 8"),
        ({"mask_id": -1}, "mask_id=-1 is no token id"),
        ({"answers": [[9]]}, "request 0 is nan: a token is not in the vocabulary"),
    ],
)
def test_refusals(change, message):
    settings = {"prompts": [PROMPT], "answers": [ANSWER], "mask_id": MASK, **change}
    with pytest.raises(ValueError, match=message):
        likelihood.log_likelihoods(KEY, toy, **settings)


def test_refusals_of_the_other_functions():
    with pytest.raises(ValueError, match="takes 1 to 16 tokens"):
        likelihood.exact_log_likelihood(toy, PROMPT, [1] * 17, mask_id=MASK)
    with pytest.raises(ValueError, match="give one for each of the 4 tokens"):
        likelihood.order_log_likelihood(toy, PROMPT, ANSWER, [0, 1], mask_id=MASK)
    with pytest.raises(ValueError, match=r"masks have shape \[2, 6\], num_masked \[3\]"):
        likelihood.terms(toy, PROMPT, ANSWER, np.ones((2, 6)), [1, 2, 3], mask_id=MASK)
    with pytest.raises(ValueError, match="window=0, context=1"):
        likelihood.rolling_log_likelihood(KEY, toy, [1], window=0, context=1, mask_id=MASK)


@pytest.mark.slow
def test_few_draws_have_the_variance_of_the_published_estimate():
    # Truth: the published estimator, measured. Its 128 draws are 8 independent batches of 16.
    path = ROOT / "llada_jax/assets/sudoku"
    module, params = llada_jax.load(path, "float32")
    words = tokenizer.load(path)
    with gzip.open(path / "pairs.jsonl.gz", "rt") as file:
        records = [json.loads(line) for line in itertools.islice(file, 12)]
    prompts = [[words.bos_id, *words.encode(r["prompt"])] for r in records for _ in range(2)]
    answers = [words.encode(r[side]) for r in records for side in ("chosen", "rejected")]
    repeats = 24

    def variance(**settings):
        found = likelihood.log_likelihoods(
            jax.random.key(1),
            Partial(module.apply, {"params": params}),
            prompts * repeats,
            answers * repeats,
            mask_id=module.config.mask_token_id,
            **settings,
        )
        return found.reshape(repeats, -1).var(0, ddof=1).mean()

    published = variance(mc_num=16, batch_size=16, times="official") / 8
    assert variance(batch_size=256, **likelihood.FEW_DRAWS) < published
    # Half as many do not reach it.
    half = {**likelihood.FEW_DRAWS, "mc_num": likelihood.FEW_DRAWS["mc_num"] // 2}
    assert variance(batch_size=256, **half) > published
