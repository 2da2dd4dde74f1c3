"""Every number that the model computes, against what the authors' PyTorch code computed
(tests/golden)."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from pvm_jax import Batch, ModelConfig, abstract_model, generate, stream
from tests.close import assert_close

BAR = 6e-5
ONE_SHAPE = pytest.mark.parametrize(
    "golden", ["shape_8b", pytest.param("shape_4b", marks=pytest.mark.slow)], indirect=True
)


@pytest.fixture
def forward(golden, golden_model):
    inputs, outputs = (
        load_file(golden / "forward_inputs.safetensors"),
        load_file(golden / "forward_outputs.safetensors"),
    )
    return Batch.from_hf(inputs, golden_model.config), inputs, outputs


def test_every_layer(golden_model, forward):
    batch, inputs, want = forward
    graphdef, params = nnx.split(golden_model)
    trace = jax.jit(lambda params, batch: nnx.merge(graphdef, params).trace(batch))
    got = jax.device_get(trace(params, batch))
    config, ids = golden_model.config, inputs["input_ids"]
    valid = inputs["attention_mask"].astype(bool)
    length = ids.shape[1]

    positions = np.moveaxis(batch.positions, 1, 0)[:, :, :length]
    np.testing.assert_array_equal(positions[:, valid], want["position_ids"][:, valid])
    next_position = batch.positions.max((1, 2)) + 1
    np.testing.assert_array_equal(next_position - length, want["rope_deltas"][:, 0])

    def in_reference_order(features):
        """[B, V, D] -> the reference's order: all images, then all videos."""
        features = np.asarray(features)
        order = [
            features[row, batch.visual_index[row, :length][(ids[row] == token) & valid[row]]]
            for token in (config.image_token_id, config.video_token_id)
            for row in range(len(ids))
        ]
        return np.concatenate(order)

    assert_close(in_reference_order(got.embeds), want["visual_embeds"], BAR, what="visual_embeds")
    for j in range(len(config.vision.deepstack_visual_indexes)):
        assert_close(
            in_reference_order(got.deepstack[j]), want[f"deepstack.{j}"], BAR, what=f"deepstack.{j}"
        )
    for layer in range(config.text.num_hidden_layers):
        assert_close(
            got.streams[layer][:, :length][valid],
            want[f"hidden.{layer}"][valid],
            BAR,
            what=f"hidden.{layer}",
        )
    assert set(got.updates) == set(config.text.pvm_layers)
    for layer, update in got.updates.items():
        assert_close(
            update[:, :length][valid],
            want[f"pvm_update.{layer}"][valid],
            BAR,
            what=f"pvm_update.{layer}",
        )
    assert_close(got.logits[:, :length][valid], want["logits"][valid], BAR, what="logits")


@ONE_SHAPE
def test_call_gives_the_logits(golden_model, forward):
    batch, inputs, want = forward
    logits = golden_model(batch)
    valid = inputs["attention_mask"].astype(bool)
    assert logits.dtype == np.float32
    assert logits.shape == (*batch.tokens.shape, golden_model.config.text.vocab_size)
    assert_close(logits[:, : valid.shape[1]][valid], want["logits"][valid], BAR, what="logits")


def test_greedy_generation(golden, golden_model):
    inputs, want = (
        load_file(golden / "generate_inputs.safetensors"),
        load_file(golden / "generate_outputs.safetensors"),
    )
    batch = Batch.from_hf(inputs, golden_model.config)
    steps = want["new_tokens"].shape[1]
    got = generate(golden_model, batch, max_new_tokens=steps, temperature=0.0, stop_tokens=())
    np.testing.assert_array_equal(got.tokens, want["new_tokens"])
    np.testing.assert_array_equal(got.lengths, steps)
    reference = jax.nn.log_softmax(want["scores"], -1)
    reference = np.take_along_axis(np.asarray(reference), want["new_tokens"][..., None], -1)[..., 0]
    assert_close(got.logprobs, reference, BAR)
    streamed = np.stack(
        list(stream(golden_model, batch, max_new_tokens=steps, temperature=0.0, stop_tokens=())), 1
    )
    np.testing.assert_array_equal(streamed, want["new_tokens"])


def test_config_round_trip(golden):
    config = ModelConfig.from_hf(golden)
    for changed in ({}, {"pvm_visibility": "preceding"}, {"pvm_gate": "token"}):
        other = dataclasses.replace(config, text=dataclasses.replace(config.text, **changed))
        written = other.to_hf()
        assert ModelConfig.from_hf(written) == other
        branch = {key for key in written["text_config"] if key.startswith("pvm_")}
        assert branch == {"pvm_layers", "pvm_hidden_size", *changed}


@pytest.mark.parametrize(
    ("size", "layers", "count"),
    [
        ("2b", (3, 8, 13), None),
        ("4b", (5, 11, 17), None),
        ("8b", (8, 16, 24), 27_922_179),
        ("32b", (14, 28, 43), None),
    ],
)
def test_presets(size, layers, count):
    config = ModelConfig.preset(size)
    assert config.text.pvm_layers == layers
    if count:
        branch = nnx.split(abstract_model(config).pvm)[1]
        assert sum(leaf.size for leaf in jax.tree.leaves(branch)) == count


@ONE_SHAPE
def test_bfloat16_stays_near(golden, golden_model, forward):
    """bfloat16 activations move the logits by its rounding, not by more: the float32 islands are
    where they should be."""
    batch, inputs, want = forward
    config = dataclasses.replace(golden_model.config, dtype="bfloat16")
    model = nnx.merge(nnx.graphdef(abstract_model(config)), nnx.state(golden_model))
    logits = np.asarray(model(batch))
    valid = inputs["attention_mask"].astype(bool)
    error = (
        np.abs(logits[:, : valid.shape[1]][valid] - want["logits"][valid]).max()
        / np.abs(want["logits"][valid]).max()
    )
    assert 1e-5 < error < 0.05
