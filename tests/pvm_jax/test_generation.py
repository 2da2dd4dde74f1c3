"""Sampling: what may be drawn, when rows end, and that a row's sample is its own; the command line on the demo's checkpoint."""

from collections import Counter
from pathlib import Path

import jax
import numpy as np
import pytest

from convert.hf_to_orbax import convert
from demo.task import Mixture, draw, make_example
from pvm_jax import Batch, generate
from pvm_jax.__main__ import main
from pvm_jax.checkpoint_files import read_stop_tokens
from tests.pvm_jax.test_model import CONFIG, EXAMPLES, model  # noqa: F401

STEPS = 8


@pytest.fixture(scope="module")
def batch() -> Batch:
    return Batch.from_rows([[e] for e in EXAMPLES], CONFIG, length=48, patches=64)


@pytest.fixture(scope="module")
def greedy(model, batch):  # noqa: F811
    return generate(model, batch, max_new_tokens=STEPS, temperature=0.0)


def test_log_probabilities_are_the_forward_pass(model, batch, greedy):  # noqa: F811
    """Teacher-forced on what was sampled, at a temperature."""
    sampled = generate(model, batch, max_new_tokens=STEPS, temperature=0.7, rng=jax.random.key(3))
    ids = np.concatenate([batch.tokens, np.asarray(sampled.tokens)], 1)
    mask = np.concatenate([batch.segment_ids > 0, np.ones_like(sampled.tokens)], 1)
    arrays = {
        "input_ids": ids,
        "attention_mask": mask,
        "pixel_values": np.concatenate([e.pixel_values for e in EXAMPLES if e.pixel_values is not None]),
        "image_grid_thw": np.concatenate([e.image_grid_thw for e in EXAMPLES if e.image_grid_thw is not None]),
    }
    logits = model(Batch.from_hf(arrays, CONFIG))
    last = [len(e.input_ids) - 1 for e in EXAMPLES]
    logprobs = jax.nn.log_softmax(logits / 0.7, -1)
    first = [logprobs[row, last[row], sampled.tokens[row, 0]] for row in range(len(EXAMPLES))]
    np.testing.assert_allclose(sampled.logprobs[:, 0], first, atol=1e-4)
    later = np.take_along_axis(np.asarray(logprobs)[:, 48 : 48 + STEPS - 1], np.asarray(sampled.tokens)[:, 1:, None], -1)[
        ..., 0
    ]
    np.testing.assert_allclose(sampled.logprobs[:, 1:], later, atol=1e-4)


def test_narrow_sampling_is_greedy(model, batch, greedy):  # noqa: F811
    for narrow in ({"top_k": 1}, {"top_p": 1e-6}):
        got = generate(model, batch, max_new_tokens=STEPS, temperature=2.0, **narrow)
        np.testing.assert_array_equal(got.tokens, greedy.tokens)


def test_top_k_and_top_p_keep_the_likeliest(model, batch):  # noqa: F811
    logits = np.array(model(batch))[0, len(EXAMPLES[0].input_ids) - 1]
    logits[[CONFIG.image_token_id, CONFIG.video_token_id]] = -np.inf
    ranked = np.argsort(-logits)
    share = np.cumsum(np.sort(np.exp(logits - logits.max()))[::-1])
    share /= share[-1]
    allowed = {"top_k": set(ranked[:3]), "top_p": set(ranked[: int((share < 0.5).sum()) + 1])}
    for name, value in (("top_k", 3), ("top_p", 0.5)):
        drawn = Counter()
        for seed in range(30):
            got = generate(model, batch, max_new_tokens=1, temperature=1.0, rng=jax.random.key(seed), **{name: value})
            drawn[int(got.tokens[0, 0])] += 1
        assert set(drawn) <= allowed[name]
        assert len(drawn) > 1 or len(allowed[name]) == 1


def test_placeholders_are_never_drawn(model, batch):  # noqa: F811
    got = generate(model, batch, max_new_tokens=200, temperature=50.0)
    drawn = set(np.unique(got.tokens).tolist())
    assert not drawn & {CONFIG.image_token_id, CONFIG.video_token_id}
    assert len(drawn) > 60  # at this temperature nearly everything else is


def test_rows_end_at_their_stop_token(model, batch, greedy):  # noqa: F811
    stop = int(greedy.tokens[0, 3])
    got = generate(model, batch, max_new_tokens=STEPS, temperature=0.0, stop_tokens=(stop,))
    for row in range(len(EXAMPLES)):
        where = np.flatnonzero(np.asarray(greedy.tokens[row]) == stop)
        length = int(where[0]) + 1 if len(where) else STEPS
        assert got.lengths[row] == length
        np.testing.assert_array_equal(got.tokens[row, :length], greedy.tokens[row, :length])
        assert not np.asarray(got.tokens[row, length:]).any()
        assert not np.asarray(got.logprobs[row, length:]).any()


@pytest.mark.parametrize(
    ("bad", "named"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"top_k": 0}, "top_k"),
        ({"top_p": 1.5}, "top_p"),
        ({"max_new_tokens": 0}, "max_new"),
    ],
)
def test_settings_out_of_range_are_refused(model, batch, bad, named):  # noqa: F811
    with pytest.raises(ValueError, match=named):
        generate(model, batch, **{"max_new_tokens": 4} | bad)


@pytest.fixture(scope="module")
def demo_checkpoint(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("demo") / "checkpoint"
    convert(Path(__file__).parents[2] / "demo" / "base", path)
    return path


def test_the_command_line_reads_a_real_image(demo_checkpoint, tmp_path, capsys):
    """The shipped model lists a grid of digits that it was not trained on; most of what it says is there."""
    scene = make_example(Mixture(sizes=(2,), digits="heldout", seed=5), 0).scene
    draw(scene).save(tmp_path / "grid.png")
    arguments = ["generate", "--checkpoint", str(demo_checkpoint), "--image", str(tmp_path / "grid.png")]
    main([*arguments, "--max-new-tokens", "48", "List ground mark ink digit"])
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert len(lines) >= 8
    right = [len(words) == 3 and scene.value(words[0], words[1]) == words[2] for words in lines]
    assert sum(right) >= 0.75 * len(lines)
    assert read_stop_tokens(demo_checkpoint)


def test_the_command_line_names_what_is_wrong(demo_checkpoint, tmp_path):
    with pytest.raises(SystemExit, match=r"no\.png"):
        main(["generate", "--checkpoint", str(demo_checkpoint), "--image", str(tmp_path / "no.png"), "What?"])
    with pytest.raises(SystemExit, match="nowhere"):
        main(["generate", "--checkpoint", str(tmp_path / "nowhere"), "What?"])
    with pytest.raises(SystemExit, match="is no LoRA adapter"):
        main(["generate", "--checkpoint", str(demo_checkpoint), "--lora", str(demo_checkpoint), "What?"])
