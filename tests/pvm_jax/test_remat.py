"""What a layer's backward pass computes again."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pvm_jax.model.attention_kernels import attention
from pvm_jax.model.layers import remat


@pytest.mark.parametrize("kernel", ["splash", "cudnn"])
def test_a_kernel_runs_again_unless_what_it_gave_is_kept(kernel):
    """By the powers of e in the compiled program."""
    ids = jnp.repeat(jnp.array([[1, 2]], jnp.int32), 128, 1)
    masks = {"q_segment_ids": ids, "kv_segment_ids": ids, "causal": True}
    rng = np.random.default_rng(0)
    x, w = (jnp.asarray(rng.normal(size=size), jnp.float32) for size in ((1, 256, 2, 8), (8, 8)))

    def layer(x, _):
        q, k, v = jnp.sin(x @ w), jnp.cos(x @ w), x @ w
        return jnp.sin(attention(q, k, v, **masks, kernel=kernel, interpret=True)), None

    gradients, powers = {}, {}
    for policy in ("none", "full", "attention", "dots"):
        body = remat(layer, policy)
        gradient = jax.jit(jax.grad(lambda x, f=body: jax.lax.scan(f, x, None, 2)[0].sum()))
        compiled = gradient.lower(x).compile()
        gradients[policy], powers[policy] = compiled(x), compiled.as_text().count(" exponential(")
    assert powers["full"] > powers["none"] == powers["attention"] == powers["dots"], powers
    for one in gradients.values():
        chex.assert_trees_all_close(one, gradients["none"], rtol=1e-5, atol=1e-5)
