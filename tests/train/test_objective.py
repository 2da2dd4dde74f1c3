"""The policy loss, from rewards and hidden states to gradients, against the formulas written out in
NumPy float64."""

from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.close import assert_close
from train.grpo.objective import group_advantages, policy_loss, token_weights
from train.step.loss import chunked_logprobs

PROMPTS, GROUP, PROMPT, T, D, V = 3, 4, 5, 12, 16, 61
N, S = PROMPTS * GROUP, PROMPT + T


@pytest.fixture(scope="module")
def step():
    """One step's inputs: completions of 1 to T tokens, the longest truncated, and log-probabilities
    that moved since."""
    rng = np.random.default_rng(0)
    lengths = np.array([T, 1, 7, 3, 9, T, 2, 5, 11, 4, 8, 6])
    arrays = {
        "hidden": rng.normal(size=(N, S, D)).astype(np.float32),
        "head": rng.normal(size=(V, D)).astype(np.float32) / 4,
        "tokens": rng.integers(0, V, (N, S)),
        "rewards": rng.choice([0, 0.1, 0.9, 1], (PROMPTS, GROUP)),
        "completion_mask": np.arange(T) < lengths[:, None],
        "truncated": lengths == T,
    }
    now = reference_logprobs(
        arrays["hidden"].astype(np.float64), arrays["head"].astype(np.float64), arrays["tokens"], 1
    )[0]
    moved = rng.normal(scale=0.3, size=(2, N, S))
    return arrays | {
        "old": (now + moved[0]).astype(np.float32),
        "ref": (now + moved[1]).astype(np.float32),
    }


def reference_logprobs(hidden, head, tokens, temperature):
    """log p(token s | what precedes it) [N, S], and what its gradient needs: p [N, S - 1, V]."""
    logits = hidden[:, :-1] @ head.T / temperature
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    logprobs = np.log(np.take_along_axis(p, tokens[:, 1:, None], -1)[..., 0])
    return np.pad(logprobs, [(0, 0), (1, 0)]), p


def reference_advantages(rewards, scale):
    advantages = np.zeros_like(rewards)
    for p, group in enumerate(rewards):
        std = {"group": np.std(group, ddof=1), "batch": np.std(rewards, ddof=1), "none": None}[
            scale
        ]
        for g, reward in enumerate(group):
            advantages[p, g] = (reward - np.mean(group)) / (1 if std is None else std + 1e-4)
    return advantages


def reference_loss(step, scale, kind, masked, clip_low, clip_high, beta, temperature):
    """TRL's `_compute_loss`, token by token: the loss, the sum of its terms' sizes, its gradients
    by hidden states and head."""
    hidden, head = step["hidden"].astype(np.float64), step["head"].astype(np.float64)
    tokens, old, ref = (
        step["tokens"],
        step["old"].astype(np.float64),
        step["ref"].astype(np.float64),
    )
    logprobs, p = reference_logprobs(hidden, head, tokens, temperature)
    advantages = reference_advantages(step["rewards"], scale).reshape(-1)
    loss, size, by_logprob = 0.0, 0.0, np.zeros((N, S))
    for n in range(N):
        generated = int(step["completion_mask"][n].sum())
        if masked and step["truncated"][n]:
            continue
        for s in range(PROMPT, PROMPT + generated):
            ratio = np.exp(logprobs[n, s] - old[n, s])
            clipped = min(max(ratio, 1 - clip_low), 1 + clip_high)
            free = ratio * advantages[n] <= clipped * advantages[n]
            away = ref[n, s] - logprobs[n, s]
            of_token = -min(ratio * advantages[n], clipped * advantages[n]) + beta * (
                np.exp(away) - away - 1
            )
            divisor = {
                "grpo": generated * N,
                "dr_grpo": N * T,
                "dapo": step["completion_mask"].sum(),
            }[kind]
            loss += of_token / divisor
            size += abs(of_token) / divisor
            by_logprob[n, s] = (
                (-ratio * advantages[n] if free else 0) + beta * (1 - np.exp(away))
            ) / divisor
    by_logits = (np.eye(V)[tokens[:, 1:]] - p) * by_logprob[:, 1:, None] / temperature
    by_hidden = np.pad(by_logits @ head, [(0, 0), (0, 1), (0, 0)])
    return loss, size, by_hidden, np.einsum("nsv,nsd->vd", by_logits, hidden[:, :-1])


def spread(values):
    """[N, T] -> [N, S]."""
    return np.pad(values, [(0, 0), (PROMPT, 0)])


CLIPS_BETAS_TEMPERATURES = [
    (0.2, 0.2, 0.0, 1.0),
    (0.2, 0.28, 0.0, 0.7),
    (0.1, 0.3, 0.04, 1.0),
    (0.2, 0.2, 0.5, 1.3),
]


@pytest.mark.parametrize(("clip_low", "clip_high", "beta", "temperature"), CLIPS_BETAS_TEMPERATURES)
def test_loss_and_gradients_equal_the_formulas_in_float64(
    step, clip_low, clip_high, beta, temperature
):
    @jax.jit
    def loss_and_gradients(hidden, head, advantages, weights):
        def loss(hidden, head):
            logprobs, _ = chunked_logprobs(
                hidden, head, step["tokens"], weights != 0, temperature=temperature, chunk=8
            )
            ref = step["ref"] if beta else None
            clip = {"clip_low": clip_low, "clip_high": clip_high}
            return policy_loss(
                logprobs, step["old"], advantages, weights, **clip, beta=beta, ref_logprobs=ref
            )[0]

        return jax.value_and_grad(loss, argnums=(0, 1))(hidden, head)

    for scale, kind, masked in product(
        ("group", "batch", "none"), ("grpo", "dr_grpo", "dapo"), (False, True)
    ):
        advantages = np.repeat(group_advantages(step["rewards"], scale=scale).reshape(-1, 1), S, 1)
        left_out = step["truncated"] if masked else None
        weights = token_weights(
            step["completion_mask"], kind, max_completion_tokens=T, left_out=left_out
        )
        actual_loss, actual = loss_and_gradients(
            step["hidden"], step["head"], advantages, spread(weights)
        )
        expected_loss, size, *expected = reference_loss(
            step, scale, kind, masked, clip_low, clip_high, beta, temperature
        )
        assert_close(actual_loss, expected_loss, 1e-5, scale=size)  # its terms cancel
        for a, e in zip(actual, expected, strict=True):
            assert_close(a, e, 1e-5)


def test_metrics_are_sums_over_the_tokens_of_the_loss():
    logprobs = np.log([[0.5, 0.5, 0.5, 0.5, 0.5, 0.9]])
    old = np.log([[0.5, 0.25, 0.25, 0.8, 0.8, 0.1]])
    ref = np.log([[0.5, 0.5, 0.25, 0.5, 0.5, 0.1]])
    advantages, weights = (
        np.array([[1.0, 1, -1, -1, 1, 1]]),
        np.array([[0.5, 0.25, 0.25, 0.25, 0.25, 0]]),
    )
    _, sums = policy_loss(
        *map(jnp.asarray, (logprobs, old, advantages, weights)), ref_logprobs=jnp.asarray(ref)
    )
    expected = {
        "tokens": 5,
        "ratio": 1 + 2 + 2 + 2 * 0.625,
        "clipped_low": 1,  # the fourth; the fifth's ratio is as low, but it is to rise
        "clipped_high": 1,  # the second; the third's ratio is as high, but it is to fall
        "gap": 2 * np.log(2) + 2 * np.log(1.6),
        "kl": 0.5 + np.log(2) - 1,
    }
    assert sums.keys() == expected.keys()
    assert_close({name: sums[name] for name in expected}, expected, 1e-5)


def test_parts_of_a_batch_add_up_to_the_whole(step):
    advantages = np.repeat(group_advantages(step["rewards"]).reshape(-1, 1), S, 1)
    weights = spread(token_weights(step["completion_mask"], "dapo", max_completion_tokens=T))
    now = step["old"] + np.float32(0.1)
    loss = jax.jit(policy_loss)
    whole = loss(now, step["old"], advantages, weights)
    parts = [loss(*(x[i::3] for x in (now, step["old"], advantages, weights))) for i in range(3)]
    assert_close(jax.tree.map(lambda *p: sum(p), *parts), whole, 1e-5)


def test_a_token_without_weight_is_no_part_whatever_stands_there():
    one, weights = np.ones((1, 2), np.float32), np.array([[1, 0]], np.float32)
    strange = np.array([[1, np.nan]], np.float32)

    @jax.jit
    @jax.value_and_grad
    def both(x):
        return policy_loss(
            x,
            strange,
            strange,
            weights,
            beta=0.1,
            ref_logprobs=strange,
            clip_low=0.2,
            clip_high=0.2,
        )[0]

    loss, gradient = both(one)
    assert float(loss) == -1
    np.testing.assert_array_equal(gradient, [[-1, 0]])


def test_beta_without_a_reference_is_an_error():
    with pytest.raises(ValueError, match=r"beta = 0\.1 needs ref_logprobs"):
        policy_loss(*[jnp.ones((1, 1))] * 4, beta=0.1)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("reward", [0.0, 0.1, 1 / 3])
def test_a_group_without_spread_has_no_advantages(scale, reward):
    rewards = np.full((3, 7), reward)
    rewards[1, 0] += 1
    advantages = group_advantages(rewards, scale=scale)
    assert advantages.dtype == np.float32
    np.testing.assert_array_equal(advantages[[0, 2]], 0)
    assert advantages[1, 0] > 0 > advantages[1, 1]


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_a_completion_without_a_reward_is_left_out(scale):
    nan = np.nan
    rewards = np.array([[0, 1, nan, 1], [nan, nan, nan, nan], [nan, 0.5, nan, nan]])
    advantages = group_advantages(rewards, scale=scale)
    np.testing.assert_array_equal(advantages[1:], 0)
    graded = np.array([0, 1, 1, 0.5])
    divisor = {
        "group": np.std(graded[:3], ddof=1) + 1e-4,
        "batch": np.std(graded, ddof=1) + 1e-4,
        "none": 1,
    }[scale]
    np.testing.assert_allclose(
        advantages[0], np.array([-2 / 3, 1 / 3, 0, 1 / 3]) / divisor, rtol=1e-6
    )


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_groups_of_one_have_no_advantages(scale):
    np.testing.assert_array_equal(group_advantages(np.array([[1.0], [0.0]]), scale=scale), 0)
    np.testing.assert_array_equal(group_advantages(np.array([[1.0]]), scale=scale), 0)


def test_one_group_is_scaled_by_its_own_spread():
    rewards = np.array([[0.0, 1.0, 1.0, 1.0]])
    np.testing.assert_allclose(
        group_advantages(rewards)[0], np.array([-0.75, 0.25, 0.25, 0.25]) / (0.5 + 1e-4), rtol=1e-6
    )
    np.testing.assert_array_equal(
        group_advantages(rewards, scale="batch"), group_advantages(rewards)
    )


@pytest.mark.parametrize("rewards", [np.ones(3), np.array([[np.inf, 0]])])
def test_rewards_that_are_no_table_of_numbers_are_refused(rewards):
    with pytest.raises(ValueError, match="rewards must be"):
        group_advantages(rewards)


@pytest.mark.parametrize("kind", ["grpo", "dr_grpo", "dapo"])
def test_completions_that_are_all_left_out_or_empty_weigh_nothing(kind):
    mask = np.ones((2, 3))
    np.testing.assert_array_equal(
        token_weights(mask, kind, max_completion_tokens=3, left_out=np.ones(2, bool)), 0
    )
    np.testing.assert_array_equal(token_weights(0 * mask, kind, max_completion_tokens=3), 0)


def test_a_truncated_completion_still_counts_in_the_divisors():
    mask = np.array([[1, 1, 1, 1], [1, 1, 0, 0]])
    weights = {
        kind: token_weights(mask, kind, max_completion_tokens=4, left_out=np.array([True, False]))
        for kind in ("grpo", "dr_grpo", "dapo")
    }
    for kind, weight in {"grpo": 1 / 4, "dr_grpo": 1 / 8, "dapo": 1 / 6}.items():
        np.testing.assert_allclose(weights[kind], [[0] * 4, [weight, weight, 0, 0]], rtol=1e-6)


def test_unknown_options_are_refused():
    with pytest.raises(ValueError, match='"group", "batch" or "none", got \'row\''):
        group_advantages(np.ones((1, 2)), scale="row")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match='"grpo", "dr_grpo" or "dapo", got \'mean\''):
        token_weights(np.ones((1, 2)), "mean", max_completion_tokens=2)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="left_out"):
        token_weights(np.ones((3, 2)), "dapo", max_completion_tokens=2, left_out=np.zeros(2, bool))
