"""The FLOP counter on programs whose cost is known, and what a step costs on a batch with
padding."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pvm_jax.config import ModelConfig
from pvm_jax.data.batch import Batch
from pvm_jax.data.example import Example
from pvm_jax.model.qwen3_vl import abstract_model
from tests import tiny
from train.config import Bucket, DataConfig
from train.sft.config import SFTConfig
from train.step.flops import Work, count_flops, peak_flops
from train.step.program import step_costs
from train.step.state import loss_and_gradient, make_loss, split_model

X, W = jax.ShapeDtypeStruct((5, 3), jnp.float32), jax.ShapeDtypeStruct((3, 3), jnp.float32)
PRODUCT = 2 * 5 * 3 * 3
CONFIG = tiny.golden_config()


def test_product_and_its_gradients():
    assert count_flops(jnp.dot, X, W) == PRODUCT
    loss = lambda x, w: jnp.sum((x @ w) ** 2)  # noqa: E731
    assert count_flops(jax.grad(loss, argnums=1), X, W) == 2 * PRODUCT
    assert count_flops(jax.grad(loss, argnums=(0, 1)), X, W) == 3 * PRODUCT


def test_batched_product():
    a, b = (
        jax.ShapeDtypeStruct((7, 5, 3), jnp.float32),
        jax.ShapeDtypeStruct((7, 3, 2), jnp.float32),
    )
    assert count_flops(jnp.matmul, a, b) == 2 * 7 * 5 * 3 * 2


def test_scan_counts_its_length():
    def repeat(x, w):
        return jax.lax.scan(lambda carry, _: (carry @ w, None), x, length=11)[0]

    assert count_flops(repeat, X, W) == 11 * PRODUCT


def test_cond_counts_the_dearest_branch():
    def choose(x, w):
        return jax.lax.cond(x.sum() > 0, lambda: x @ w @ w, lambda: x @ w)

    assert count_flops(choose, X, W) == 2 * PRODUCT


def test_jit_remat_and_custom_rules_are_entered():
    product = jax.custom_vjp(jnp.dot)
    product.defvjp(lambda x, w: (x @ w, (x, w)), lambda res, g: (g @ res[1].T, res[0].T @ g))
    assert count_flops(jax.jit(product), X, W) == PRODUCT
    assert (
        count_flops(jax.grad(lambda x, w: product(x, w).sum(), argnums=(0, 1)), X, W) == 3 * PRODUCT
    )
    recomputed = jax.checkpoint(lambda x, w: jnp.sin(x @ w) @ w)
    loss = lambda x, w: recomputed(x, w).sum()  # noqa: E731
    assert count_flops(loss, X, W) == 2 * PRODUCT
    assert count_flops(jax.grad(loss), X, W) == 2 * PRODUCT + PRODUCT + 2 * PRODUCT


def test_convolution():
    x, kernel = (
        jax.ShapeDtypeStruct((2, 3, 8, 8), jnp.float32),
        jax.ShapeDtypeStruct((4, 3, 2, 2), jnp.float32),
    )
    convolve = lambda x, kernel: jax.lax.conv(x, kernel, (2, 2), "VALID")  # noqa: E731
    assert count_flops(convolve, x, kernel) == 2 * (2 * 4 * 4 * 4) * (3 * 2 * 2)


def test_while_around_a_product_is_refused():
    loop = lambda x, w: jax.lax.while_loop(lambda c: c.sum() < 1, lambda c: c @ w, x)  # noqa: E731
    with pytest.raises(ValueError, match="trip count"):
        count_flops(loop, X, W)


def test_peak_flops_by_device_kind():
    assert peak_flops("TPU v5 lite") == 197e12
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("cpu") is None


def counted_step(config, trainable, rows, tokens, patches):
    """FLOPs of loss and gradient at this shape, every column counted, without the logits that the
    backward pass repeats of a head that is trained."""
    graphdef, trained, frozen = split_model(abstract_model(config), trainable)
    loss = partial(loss_and_gradient, make_loss(graphdef, chunk=tokens), accumulation=1)
    batch = Batch.empty(config, rows=rows, length=tokens, patches=patches)
    repeated = 2 * rows * tokens * config.text.hidden_size * config.text.vocab_size
    counted = count_flops(loss, nnx.as_pure(trained), nnx.as_pure(frozen), batch)
    return counted - repeated if trainable == "all" else counted


def costs_of(config, trainable):
    return step_costs(
        SFTConfig(
            "not_read", "not_written", DataConfig("not_read", [Bucket(1, 4)]), trainable=trainable
        ),
        config,
    )


@pytest.mark.parametrize("trainable", ["pvm", pytest.param("all", marks=pytest.mark.slow)])
def test_work_without_padding_costs_what_the_program_counts(trainable):
    config, (rows, tokens, patches) = replace(CONFIG, remat="none", attention="xla"), (3, 40, 24)
    costs = costs_of(config, trainable)
    work = Work.full(rows, tokens, patches, 4)
    # What the causal mask hides, the program computes.
    unseen = rows * tokens**2 - work.token_pairs
    assert work.flops(costs) + unseen * costs.token_pairs == counted_step(
        config, trainable, rows, tokens, patches
    )


def test_published_shape_costs_two_flops_a_weight_forward_and_four_backward():
    """8B's decoder, all of it: 6 FLOPs a token for each weight of its 36 layers, as every estimate
    of training cost has it."""
    preset = ModelConfig.preset("8b")
    config = tiny.cut(preset, layers=preset.text.num_hidden_layers)
    c = config.text
    heads = c.head_dim * (2 * c.num_attention_heads + 2 * c.num_key_value_heads)
    layers = c.num_hidden_layers * c.hidden_size * (heads + 3 * c.intermediate_size)
    costs = costs_of(config.without_pvm(), "all")
    assert costs.tokens == 6 * layers
    assert costs.token_pairs == 12 * c.num_hidden_layers * c.num_attention_heads * c.head_dim
    assert costs.loss_tokens == 6 * c.vocab_size * c.hidden_size
    assert costs.recalls == 0
    batch = Batch.empty(config, rows=1, length=2, patches=0)
    batch.segment_ids[...] = batch.loss_weights[...] = 1
    assert float(jax.jit(lambda batch: Work.of(batch).flops(costs))(batch)) == pytest.approx(
        2 * costs.tokens + 3 * costs.token_pairs + 2 * costs.loss_tokens
    )


def test_work_of_packed_rows_is_their_examples_and_no_padding():
    config, grids, lengths = CONFIG, [[(4, 4)], [(2, 6), (2, 2)], []], [20, 30, 11]

    def example(grids, length):
        images = [
            [
                config.vision_start_token_id,
                *[config.image_token_id] * (rows * columns // 4),
                config.vision_end_token_id,
            ]
            for rows, columns in grids
        ]
        ids = np.concatenate([*images, np.arange(length - sum(map(len, images)))]).astype(np.int32)
        pixels = np.zeros(
            (sum(rows * columns for rows, columns in grids), config.vision.patch_dim), np.float32
        )
        thw = np.array([(1, *grid) for grid in grids])
        return Example(
            ids,
            *((pixels, thw) if grids else (None, None)),
            loss_mask=np.arange(length) >= length - 5,
        )

    first, second, third = map(example, grids, lengths)
    batch = Batch.from_rows([[first, second], [third], []], config, length=64, patches=48)
    assert jax.device_get(jax.jit(Work.of)(batch)) == Work(
        tokens=sum(lengths),
        token_pairs=sum(n * (n + 1) // 2 for n in lengths),
        visual_tokens=4 + 3 + 1,
        patch_pairs=16**2 + 12**2 + 4**2,
        recalls=20 * 4 + 30 * (3 + 1),
        loss_tokens=15,
    )
