"""Group-relative policy optimisation as formulas: advantages, token weights and the clipped loss
(DeepSeekMath, section 4.1).

Names, defaults and formulas are those of TRL's GRPOTrainer and GRPOConfig.
"""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

ScaleRewards = Literal["group", "batch", "none"]
LossType = Literal["grpo", "dr_grpo", "dapo"]


def group_advantages(
    rewards: np.ndarray, *, scale: ScaleRewards = "group", epsilon: float = 1e-4
) -> np.ndarray:
    """How much better each completion is than its group: (reward - mean of the group) / (standard
    deviation + epsilon).

    The standard deviation is the sample's (n - 1 in the denominator).

    Args:
        rewards: [prompts, samples], of every prompt's completions. NaN stands for a completion that
            was not graded: it is left out of every mean and deviation, and its advantage is 0.
        scale: whether the deviation is that of the "group", of all the rewards ("batch"), or
            nothing is divided ("none").
        epsilon: keeps the quotient finite; the paper's 1e-4 is TRL's.

    Returns:
        [prompts, samples] float32, on the host; exactly 0 in a group whose graded rewards are all
        equal.

    Raises:
        ValueError: for rewards that are not [prompts, samples] or are infinite, and for an unknown
            `scale`.
    """
    rewards = np.asarray(rewards, np.float64)
    if rewards.ndim != 2 or np.isinf(rewards).any():
        raise ValueError(
            "rewards must be [prompts, samples] without infinities, got shape"
            f" {rewards.shape}: {rewards}"
        )
    graded = ~np.isnan(rewards)
    count = graded.sum(1, keepdims=True)
    mean = np.where(graded, rewards, 0).sum(1, keepdims=True) / np.maximum(count, 1)
    # Equal rewards have a mean that may differ from them in the last bit, which a division by
    # epsilon would blow up.
    lowest = np.where(graded, rewards, np.inf).min(1, keepdims=True)
    highest = np.where(graded, rewards, -np.inf).max(1, keepdims=True)
    advantages = np.where(graded & (lowest < highest), rewards - mean, 0)
    if scale == "group":
        advantages = advantages / (_sample_std(advantages, count) + epsilon)
    elif scale == "batch":
        batch = rewards[graded]
        advantages = advantages / ((batch.std(ddof=1) if batch.size > 1 else 0) + epsilon)
    elif scale != "none":
        raise ValueError(f'scale must be "group", "batch" or "none", got {scale!r}')
    return advantages.astype(np.float32)


def _sample_std(deviations: np.ndarray, count: np.ndarray) -> np.ndarray:
    """[prompts, 1] out of differences to the mean [prompts, samples], 0 where nothing was graded; a
    single one deviates by nothing."""
    return np.sqrt((deviations**2).sum(1, keepdims=True) / np.maximum(count - 1, 1))


def token_weights(
    completion_mask: np.ndarray,
    kind: LossType,
    *,
    max_completion_tokens: int,
    left_out: np.ndarray | None = None,
) -> np.ndarray:
    """The weight of every completion token, such that the loss of an optimizer step is the sum of
    weight x token loss.

    The sum is over the step's whole batch, on all devices and in all its accumulated parts: the
    weights are made once for all of it, so that neither packing nor accumulation changes the loss.

    Args:
        completion_mask: [completions, tokens], 1 at the tokens that were generated (the stop token
            included), for all N completions.
        kind: what the sum of the token losses is divided by:
            "grpo": in each completion by its tokens, then by N;
            "dr_grpo": by N * max_completion_tokens (no bias by length);
            "dapo": by the generated tokens of the whole batch.
        max_completion_tokens: the longest that a completion may be.
        left_out: [completions], true for completions that are no part of the loss (TRL's
            `mask_truncated_completions`). They weigh nothing, yet count in the divisors as if they
            were (in N and in the generated tokens), as in TRL.

    Returns:
        [completions, tokens] float32, on the host.

    Raises:
        ValueError: for masks of other shapes and an unknown `kind`.
    """
    mask = np.asarray(completion_mask, np.float64)
    left_out = np.zeros(len(mask), bool) if left_out is None else np.asarray(left_out, bool)
    if mask.ndim != 2 or left_out.shape != mask.shape[:1]:
        raise ValueError(
            "needs completion_mask [completions, tokens] and left_out [completions], got"
            f" {mask.shape} and {left_out.shape}"
        )
    if kind == "grpo":
        divisor = np.maximum(mask.sum(1, keepdims=True), 1) * len(mask)
    elif kind == "dr_grpo":
        divisor = len(mask) * max_completion_tokens
    elif kind == "dapo":
        divisor = max(mask.sum(), 1)
    else:
        raise ValueError(f'the loss is normalised as "grpo", "dr_grpo" or "dapo", got {kind!r}')
    return (mask * ~left_out[:, None] / divisor).astype(np.float32)


def policy_loss(
    logprobs: jax.Array,
    old_logprobs: jax.Array,
    advantages: jax.Array,
    weights: jax.Array,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    beta: float = 0.0,
    ref_logprobs: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Sum of weight x (-min(ratio A, clip(ratio, 1 - clip_low, 1 + clip_high) A) + beta KL), ratio
    = p / p_old.

    KL is the k3 estimate of KL(p, p_ref), p_ref / p - log(p_ref / p) - 1.

    Args:
        logprobs: [B, S] of each token under the policy: what is differentiated.
            `train.step.loss.chunked_logprobs` gives them.
        old_logprobs: [B, S] under the policy that sampled, at the same temperature.
        advantages: [B, S], each completion's at all of its tokens.
        weights: [B, S] of `token_weights`; a token with weight 0 is no part of anything, whatever
            the other arrays hold there.
        clip_low, clip_high: how far the ratio may fall and rise before the gradient stops.
        beta: weight of the KL term.
        ref_logprobs: [B, S] under the reference policy; needed for beta > 0.

    Returns:
        The loss, a float32 scalar, and sums over the tokens with a weight, to be added up over a
        step's parts and divided by their count: tokens (the count), ratio, clipped_low and
        clipped_high (tokens whose gradient the clipping stopped), gap (|logprobs - old_logprobs|),
        kl (with ref_logprobs).

    Raises:
        ValueError: for beta > 0 without ref_logprobs.
    """
    if beta and ref_logprobs is None:
        raise ValueError(
            f"beta = {beta} needs ref_logprobs, the tokens' log-probabilities under the reference"
            " policy"
        )
    counted = weights != 0
    log_ratio = jnp.where(counted, logprobs - old_logprobs, 0)
    ratio = jnp.exp(log_ratio)
    clipped = jnp.clip(ratio, 1 - clip_low, 1 + clip_high)
    advantages = jnp.where(counted, advantages, 0)
    token_loss = -jnp.minimum(ratio * advantages, clipped * advantages)
    of_tokens = {
        "tokens": counted,
        "ratio": jnp.where(counted, ratio, 0),
        "clipped_low": (ratio < 1 - clip_low) & (advantages < 0),
        "clipped_high": (ratio > 1 + clip_high) & (advantages > 0),
        "gap": jnp.abs(log_ratio),
    }
    if ref_logprobs is not None:
        log_ref_ratio = jnp.where(counted, ref_logprobs - logprobs, 0)
        of_tokens["kl"] = jnp.exp(log_ref_ratio) - log_ref_ratio - 1
        token_loss += beta * of_tokens["kl"]
    return (weights * token_loss).sum(), _sums(of_tokens)


def _sums(of_tokens: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Of [B, S] each, float32 scalars without a gradient."""
    return {
        name: jax.lax.stop_gradient(x).astype(jnp.float32).sum() for name, x in of_tokens.items()
    }
