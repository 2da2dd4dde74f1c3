"""What attention's kernels are compared by."""

from typing import Any

import jax
import jax.numpy as jnp

from pvm_jax.model.attention_kernels import attention


def values_and_gradients(arrays: Any, counts: Any, **how: Any) -> tuple[Any, Any, jax.Array]:
    """Of `attention` of `arrays` (q, k, v) as `how` says, its kernel interpreted: values where
    `counts` [B, S], gradients of a sum of theirs, and whether all values are finite."""

    def loss(*arrays):
        out = attention(*arrays, **how, interpret=True)
        kept = jnp.where(counts[..., None, None], out, 0)
        return jnp.sin(kept).sum(), (kept, jnp.isfinite(out).all())

    gradients, (kept, finite) = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(*arrays)
    return kept, gradients, finite
