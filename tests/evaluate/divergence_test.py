"""The KL divergence from the reference policy, by ELBOs of responses."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from llada_jax import elbo
from llada_jax.evaluate.divergence import answer_ids, kl_from_reference
from llada_jax.models.llada import LLaDA, ModelConfig

MASK, EOS = 9, 8
CONFIG = ModelConfig(
    d_model=16,
    n_heads=2,
    n_layers=1,
    mlp_hidden_size=16,
    vocab_size=10,
    embedding_size=10,
    max_sequence_length=16,
    mask_token_id=MASK,
    eos_token_id=EOS,
    pad_token_id=EOS,
)


@pytest.fixture(scope="module")
def policies():
    model = LLaDA(CONFIG)
    tokens = jnp.zeros((1, 4), jnp.int32)
    return [
        Partial(model.apply, nn.unbox(model.init(jax.random.key(seed), tokens))) for seed in (0, 1)
    ]


def kl(policies, prompts, answers, draws):
    return kl_from_reference(
        jax.random.key(2),
        *policies,
        prompts,
        answers,
        draws=draws,
        mask_id=MASK,
        batch_size=8,
        row_length=12,
    )


def test_the_divergence_is_that_of_exact_elbos(policies):
    prompts = [[1, 2], [3], [4, 5, 6], [7]]
    answers = [[1, 2, 3, EOS], [5], [], [2, EOS, EOS]]
    ratios = [0.0 if not a else np.nan for a in answers]
    for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        if answer:
            row = jnp.array([prompt + answer])
            is_answer = jnp.arange(row.shape[1])[None] >= len(prompt)
            exact = [elbo.exact_elbo(p, row, is_answer, mask_id=MASK)[0] for p in policies]
            ratios[i] = float(exact[0] - exact[1])
    found = kl(policies, prompts, answers, draws=15)
    assert found["solve/kl"] == pytest.approx(np.mean(ratios), abs=1e-5)
    assert found["solve/kl_stderr"] == pytest.approx(np.std(ratios, ddof=1) / 2, abs=1e-5)


def test_a_policy_that_is_its_reference_gives_exactly_zero(policies):
    same = [policies[0], Partial(policies[0].func, *policies[0].args)]
    answers = [[1, 2, 3, 4, 5, 6, 7, EOS], [7, 6, 5, EOS]]
    assert kl(same, [[1], [2]], answers, draws=3) == {"solve/kl": 0.0, "solve/kl_stderr": 0.0}
    one = kl(policies, [[1]], answers[:1], draws=3)
    assert one["solve/kl"] != 0 and np.isnan(one["solve/kl_stderr"])


@pytest.mark.parametrize(
    "tokens, settings, answer",
    [
        ([1, 2, EOS, EOS, EOS], {}, [1, 2, EOS]),
        ([1, 2, EOS, 3, EOS], {}, [1, 2, EOS]),
        ([1, 2, EOS, 3], {"append_eos": False}, [1, 2]),
        ([EOS, 1], {"append_eos": False}, []),
        ([1, 2, 3], {}, [1, 2, 3]),
        ([1, 2, EOS], {"multiple": 4}, [1, 2, EOS, EOS]),
        ([1, 2, 3, 4, 5], {"multiple": 4}, [1, 2, 3, 4, 5, EOS, EOS, EOS]),
        ([1, 2, 3, 4, 5], {"multiple": 4, "room": 6}, [1, 2, 3, 4, 5, EOS]),
        ([1, EOS], {"multiple": 2, "append_eos": False}, [1, EOS]),
    ],
)
def test_the_answer_is_what_training_would_score(tokens, settings, answer):
    settings = {"append_eos": True, "multiple": 1, "room": 99, **settings}
    assert answer_ids(np.array(tokens), eos_id=EOS, **settings) == answer
