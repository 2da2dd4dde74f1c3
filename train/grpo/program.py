"""The compiled part of GRPO: gradients of the clipped policy loss, added up over parts of a batch,
and the update."""

from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from pvm_jax.data.batch import Batch
from pvm_jax.model.qwen3_vl import Qwen3VL
from train.config import Bucket
from train.grpo.config import GRPOConfig
from train.grpo.objective import policy_loss
from train.step.compiler import compiler_options
from train.step.loss import chunked_logprobs
from train.step.program import Program
from train.step.state import Metrics, TrainState, apply_gradients, count, with_padding


class PolicyRows(NamedTuple):
    """B rows, each a prompt with one completion.

    Attributes:
        batch: its loss_weights are `train.grpo.objective.token_weights`, at the columns of the
            completions.
        old_logprobs: [B, S] float32, the sampler's.
        advantages: [B, S] float32, each completion's at all of its columns.
    """

    batch: Batch
    old_logprobs: Any
    advantages: Any


class Totals(NamedTuple):
    """Added up over the parts of a batch: the loss, its gradients, and sums over tokens.
    `largest_gap` is the largest |log-probability - the sampler's| of a token."""

    loss: Any
    gradients: Any
    sums: Metrics
    largest_gap: Any


class Fixed(NamedTuple):
    """What the policy loss reads and does not train: the frozen parameters, and with beta > 0 those
    that train as they were at the start of the run: with the frozen ones, which they share, they
    are the reference policy."""

    frozen: Any
    reference: Any


@dataclass(frozen=True)
class GRPOProgram(Program):
    """The program of GRPO. One optimizer update is `zeros`, `accumulate` for each part of the
    batch, `update`."""

    config: GRPOConfig

    @cached_property
    def accumulate(self) -> Any:
        """Jitted, donates its totals: (totals, params, Fixed, PolicyRows) -> totals. Parts may
        differ in shape."""
        return jax.jit(
            partial(_accumulate, self),
            donate_argnums=0,
            out_shardings=self.total_shardings,
            compiler_options=compiler_options(self.batch_sharding.mesh),
        )

    @cached_property
    def update(self) -> Any:
        """Jitted, donates its state: (state, totals) -> (state, metrics). Metrics are those of
        `apply_gradients` and `count`, and the means over the tokens with a weight of what
        `policy_loss` sums up and of the entropy, in nats."""
        return jax.jit(
            partial(_update, self), donate_argnums=0, out_shardings=(self.state_shardings, None)
        )

    @cached_property
    def zeros(self) -> Any:
        """Jitted: () -> totals of no part."""
        shapes = self.abstract_totals
        return jax.jit(
            lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes),
            out_shardings=self.total_shardings,
        )

    @cached_property
    def abstract_totals(self) -> Totals:
        """ShapeDtypeStructs of totals, with their shardings."""
        rows = self.abstract_rows(Bucket(2, 0), self.batch_sharding.mesh.size)
        loss, (sums, gap) = jax.eval_shape(
            partial(_loss, self), self.state.params, self.fixed, rows
        )
        everywhere = jax.NamedSharding(self.batch_sharding.mesh, jax.P())

        def place(x: Any, sharding: jax.NamedSharding = everywhere) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

        gradients = jax.tree.map(lambda x: place(x, x.sharding), self.state.params)
        return Totals(place(loss), gradients, jax.tree.map(place, sums), place(gap))

    @property
    def total_shardings(self) -> Totals:
        """Gradients lie as their parameters do, scalars everywhere."""
        return jax.tree.map(lambda x: x.sharding, self.abstract_totals)

    @property
    def fixed(self) -> Fixed:
        """ShapeDtypeStructs with their shardings."""
        reference = None
        if self.config.beta:
            reference = jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, self.config.dtype, sharding=x.sharding),
                self.state.params,
            )
        return Fixed(self.frozen, reference)

    def abstract_rows(self, bucket: Bucket, rows: int) -> PolicyRows:
        """ShapeDtypeStructs of `rows` rows of `bucket`, with their shardings."""
        batch = self.abstract_batch(bucket, rows)
        column = jax.ShapeDtypeStruct(batch.tokens.shape, jnp.float32, sharding=self.batch_sharding)
        return PolicyRows(batch, column, column)


def _loss(
    program: GRPOProgram, trained: Any, fixed: Fixed, rows: PolicyRows
) -> tuple[jax.Array, tuple[Metrics, jax.Array]]:
    """The rows' share of `Totals`."""
    config, batch = program.config, rows.batch
    counted = batch.loss_weights != 0

    def logprobs(params: Any) -> tuple[jax.Array, jax.Array]:
        model: Qwen3VL = nnx.merge(program.graphdef, params, fixed.frozen)
        return chunked_logprobs(
            model.hidden(batch),
            model.head_weight(),
            batch.tokens,
            counted,
            temperature=config.temperature,
            chunk=config.loss_chunk,
        )

    mine, entropy = logprobs(trained)
    loss, sums = policy_loss(
        mine,
        rows.old_logprobs,
        rows.advantages,
        batch.loss_weights,
        clip_low=config.clip_low,
        clip_high=config.clip_high,
        beta=config.beta,
        ref_logprobs=jax.lax.stop_gradient(logprobs(fixed.reference)[0]) if config.beta else None,
    )
    policy = {name: value for name, value in sums.items() if name != "tokens"} | {
        "entropy": entropy.sum()
    }
    gap = jnp.where(counted, jnp.abs(mine - rows.old_logprobs), 0).max()
    sums = {f"policy/{name}": value for name, value in policy.items()} | count(batch, program.costs)
    return loss, jax.lax.stop_gradient((sums, gap))


def _accumulate(
    program: GRPOProgram, totals: Totals, params: Any, fixed: Fixed, rows: PolicyRows
) -> Totals:
    gradient = jax.value_and_grad(partial(_loss, program), has_aux=True)
    (loss, (sums, gap)), gradients = gradient(params, fixed, rows)
    loss, gradients, sums = jax.tree.map(jnp.add, tuple(totals[:3]), (loss, gradients, sums))
    return Totals(loss, gradients, sums, jnp.maximum(totals.largest_gap, gap))


def _update(program: GRPOProgram, state: TrainState, totals: Totals) -> tuple[TrainState, Metrics]:
    state, metrics = apply_gradients(
        state, totals.loss, totals.gradients, program.optimizer, program.schedule
    )
    tokens = jnp.maximum(totals.sums["loss_tokens"], 1)
    means = {
        name: value / tokens for name, value in totals.sums.items() if name.startswith("policy/")
    }
    counts = {name: value for name, value in totals.sums.items() if name not in means}
    return state, metrics | means | with_padding(counts) | {
        "policy/largest_gap": totals.largest_gap
    }
