"""What is taken away is what is said to be, and nothing else."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from flax import nnx
from PIL import Image

from demo.checkpoint import write_assets
from pvm_jax import Batch, Example, Processor, without_pvm
from pvm_jax.data.patches import ImageSettings, patches
from pvm_jax.data.pixels import as_floats
from pvm_jax.measure.ablations import (
    AS_IT_IS,
    BRANCH_ALONE,
    BRANCH_MISLED,
    BRANCH_OFF,
    IMAGE_BLANK,
    IMAGE_SWAPPED,
    ablations,
    mislead,
    silence,
    with_filler,
)
from pvm_jax.measure.accuracy import exact_so_far, prompt_of, teacher_forced, write
from pvm_jax.measure.pictures import blanked, exchanged, frames, partners, picture, with_frames
from pvm_jax.measure.reading import find_answers
from pvm_jax.model.qwen3_vl import Qwen3VL
from pvm_jax.model.vision import Visual
from tests.close import assert_close
from tests.tiny import CONFIG, randomized


def make_example(
    seed: int, answer: int, grids: tuple[tuple[int, int], ...] = ((4, 4),), question: int = 5
) -> Example:
    """Images of (rows, columns) patches, `question` tokens, then `answer` tokens to say."""
    rng = np.random.default_rng(seed)
    images = [np.array([92, *[90] * (rows * columns // 4), 93]) for rows, columns in grids]
    ids = np.concatenate([*images, rng.integers(1, 80, question + answer)])
    pixels = rng.uniform(
        -1, 1, (sum(rows * columns for rows, columns in grids), CONFIG.vision.patch_dim)
    )
    return Example(
        input_ids=ids,
        pixel_values=pixels.astype(np.float32),
        image_grid_thw=np.array([(1, *grid) for grid in grids]),
        loss_mask=np.arange(len(ids)) >= len(ids) - answer,
    )


EXAMPLES = [make_example(1, 7), make_example(2, 4, ((2, 6), (4, 2))), make_example(3, 6, ((6, 4),))]


@pytest.fixture(scope="module")
def model() -> Qwen3VL:
    return randomized()


@pytest.fixture(scope="module")
def found(model):
    return ablations(model, EXAMPLES, rows=2, chunk=8)


def test_branch_off_is_the_model_without_a_branch(model, found):
    base = teacher_forced(without_pvm(model), EXAMPLES, rows=2, chunk=8)
    assert_close(found[BRANCH_OFF].loss, base.loss, 1e-5)
    np.testing.assert_array_equal(found[BRANCH_OFF].correct, base.correct)


def test_every_ablation_is_another_model_and_none_changes_where_answers_end(found):
    names = {
        AS_IT_IS,
        BRANCH_OFF,
        "branch of layer 1 off",
        "branch of layer 2 off",
        BRANCH_MISLED,
        BRANCH_ALONE,
        IMAGE_SWAPPED,
        IMAGE_BLANK,
    }
    assert set(found) == names
    losses = [one.loss for one in found.values()]
    for number, loss in enumerate(losses):
        assert np.array_equal(np.isfinite(loss), find_answers(EXAMPLES).real)
        for other in losses[:number]:
            assert np.nanmax(np.abs(loss - other)) > 1e-3


def test_silencing_a_layer_shuts_its_gate_and_touches_nothing_else(model):
    before, after = (dict(nnx.to_flat_state(nnx.state(m))) for m in (model, silence(model, [1])))
    changed = [path for path in before if not np.array_equal(before[path][...], after[path][...])]
    assert changed == [("pvm", "1", "gate_alpha")]
    assert not np.asarray(after[changed[0]][...]).any()
    with pytest.raises(ValueError, match=r"no branch at layers \[0\]: there is one at \[1, 2\]"):
        silence(model, [0, 1])


def test_exchanged_conversations_differ_in_what_is_shown_alone():
    for mine, other in zip(EXAMPLES, exchanged(EXAMPLES, CONFIG.vision), strict=True):
        np.testing.assert_array_equal(mine.input_ids, other.input_ids)
        np.testing.assert_array_equal(mine.image_grid_thw, other.image_grid_thw)
        assert mine.pixel_values.shape == other.pixel_values.shape
        assert np.abs(mine.pixel_values - other.pixel_values).max() > 0.1
    same = [make_example(seed, 3) for seed in range(3)]
    for shown, other in zip(exchanged(same, CONFIG.vision), [*same[1:], same[0]], strict=True):
        np.testing.assert_array_equal(shown.pixel_values, other.pixel_values)
    for mine, blank in zip(EXAMPLES, blanked(EXAMPLES), strict=True):
        np.testing.assert_array_equal(mine.input_ids, blank.input_ids)
        assert not blank.pixel_values.any()


def test_bytes_are_exchanged_as_bytes_and_blanked_as_floats_are():
    """A picture of another size is scaled and rounded; one that is not shown is 0 to the tower,
    which no byte would be."""
    scale = ImageSettings(1024, 10**6, 4, (0.5,) * 3, (0.5,) * 3).scale
    rng, vision = np.random.default_rng(0), CONFIG.vision
    examples = [
        replace(
            e,
            pixel_values=rng.integers(0, 256, (e.num_patches, vision.frame_dim), np.uint8),
            image_scale=scale,
        )
        for e in EXAMPLES
    ]
    both = zip(examples, exchanged(examples, vision), strict=True)
    for mine, other in both:
        assert other.pixel_values.shape == mine.pixel_values.shape
        assert other.pixel_values.dtype == np.uint8
        assert (other.pixel_values != mine.pixel_values).mean() > 0.9
    with pytest.raises(ValueError, match="bytes in all conversations, or in none"):
        exchanged([examples[0], *EXAMPLES[1:]], vision)
    blank = Batch.from_examples(blanked(examples), CONFIG)
    assert blank.patches.dtype == np.uint8
    assert not as_floats(blank.patches, blank.patch_scale, vision.patch_dim).any()


def asked_again(example: Example, seed: int) -> Example:
    """The same pictures, and other words at the end."""
    ids = example.input_ids.copy()
    ids[-5:] = np.random.default_rng(seed).integers(1, 80, 5)
    return replace(example, input_ids=ids)


def test_another_image_is_never_the_same_one(model):
    """Several questions about one image follow each other; a branch on another image must not get
    its own one either."""
    a, b = EXAMPLES[0], EXAMPLES[2]
    examples = [a, asked_again(a, 8), asked_again(a, 9), b, asked_again(b, 10)]
    assert partners(examples) == [3, 3, 3, 0, 0]
    (image,) = frames(a, CONFIG.vision)
    for shown in exchanged(examples, CONFIG.vision)[:3]:
        assert np.abs(frames(shown, CONFIG.vision)[0] - image).max() > 0.1
    found = ablations(model, examples, rows=3, chunk=8)
    for ablation in (IMAGE_SWAPPED, BRANCH_MISLED):
        assert (np.nanmax(np.abs(found[ablation].loss - found[AS_IT_IS].loss), axis=1) > 1e-3).all()
    for number, partner in enumerate(partners(examples)):
        pair = teacher_forced(
            mislead(model), [examples[partner], examples[number]], rows=2, chunk=8
        ).loss[1]
        assert_close(found[BRANCH_MISLED].loss[number, : len(pair)], pair, 1e-5)


def test_pictures_are_exchanged_with_a_conversation_that_shares_none():
    one, two, other = make_example(1, 7), make_example(2, 4, ((4, 4), (4, 2))), EXAMPLES[2]
    both = replace(two, pixel_values=np.concatenate([one.pixel_values, two.pixel_values[16:]]))
    assert partners([one, both, other]) == [2, 2, 0]
    for without in ([one], [one, asked_again(one, 8)], [one, both]):
        with pytest.raises(
            ValueError,
            match=r"at least two conversations that share none: .* for conversation 0, counted",
        ):
            exchanged(without, CONFIG.vision)


def test_a_misled_branch_reads_the_row_before_and_nothing_else_does(model):
    """Its memory is the other image's, also in the last batch, which is filled up; with the gates
    shut, nothing differs."""
    misled, batch = (
        mislead(model),
        Batch.from_rows([[e] for e in EXAMPLES], CONFIG, length=64, patches=64),
    )
    visual = Visual(np.random.default_rng(0).normal(size=(3, 16, 32)).astype(np.float32), None)
    own, other = (one.memorize(visual, batch)["1"] for one in (model, misled))
    np.testing.assert_array_equal(other.keys, np.roll(own.keys, 1, axis=0))
    shut = silence(model, [1, 2])
    for one, differs in (
        (shut, False),
        (model, True),
    ):  # two rows, three conversations: the last batch is filled up
        own, other = (
            teacher_forced(m, EXAMPLES, rows=2, chunk=8).loss for m in (one, mislead(one))
        )
        assert ((np.nanmax(np.abs(own - other), axis=1) > 1e-3) == differs).all()


@pytest.mark.parametrize("frames_held", [1, 2])
def test_pictures_come_out_of_their_patches_and_go_back(frames_held):
    """A picture that is not square, whose size needs no scaling: every pixel is where it was; of
    bytes with one frame, and of floats with two."""
    settings = ImageSettings(
        min_pixels=32**2, max_pixels=10**6, patch_size=16, mean=(0.5,) * 3, std=(0.25,) * 3
    )
    pixels = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    flat, (_, rows, columns) = patches([Image.fromarray(pixels)], settings)
    config = replace(CONFIG.vision, patch_size=16)
    if frames_held == 2:
        flat = as_floats(flat, settings.scale, config.patch_dim)
    np.testing.assert_allclose(
        picture(flat, rows, columns, settings, config), pixels / 255, atol=1e-6
    )
    example = replace(EXAMPLES[0], pixel_values=flat, image_grid_thw=np.array([[1, rows, columns]]))
    (frame,) = frames(example, config)
    assert frame.shape == (frames_held, 64, 96, 3)
    np.testing.assert_array_equal(with_frames(example, [frame], config).pixel_values, flat)


def test_filler_stands_between_image_and_question(tmp_path: Path):
    write_assets(tmp_path)
    processor = Processor.from_pretrained(tmp_path)
    image = {"type": "image", "image": Image.new("RGB", (64, 32))}
    messages = [
        {"role": "user", "content": [image, {"type": "text", "text": "List ink"}]},
        {"role": "assistant", "content": "A1 ink red\n"},
    ]
    plain = processor.encode(messages)
    for wanted in (1, 2, 39, 40):
        longer = processor.encode(with_filler(messages, wanted, processor))
        added = len(longer.input_ids) - len(plain.input_ids)
        assert added == wanted
        end = (
            int(
                np.flatnonzero(
                    plain.input_ids == processor.tokenizer.convert_tokens_to_ids("<|vision_end|>")
                )[0]
            )
            + 1
        )
        np.testing.assert_array_equal(
            np.delete(longer.input_ids, np.arange(end, end + added)), plain.input_ids
        )
        np.testing.assert_array_equal(longer.pixel_values, plain.pixel_values)
    content = with_filler(messages, 40, processor, ahead=True)[0]["content"]
    assert [part["type"] for part in content] == ["text", "image", "text"]
    assert len(processor.encode(with_filler(messages, 40, processor, ahead=True)).input_ids) == len(
        longer.input_ids
    )
    assert with_filler(messages, 0, processor) is messages
    with pytest.raises(ValueError, match="no user turn shows an image"):
        with_filler([{"role": "user", "content": "List"}], 5, processor)


def test_what_is_written_is_exact_up_to_the_first_difference(model):
    written = write(model, EXAMPLES, stop_tokens=(), max_new_tokens=5, rows=2)
    assert written.score.shape == (3, 5)
    np.testing.assert_array_equal(written.lengths, 5)
    for tokens, score, example in zip(written.tokens, written.score, EXAMPLES, strict=True):
        reference = prompt_of(example)[1][:5]
        assert np.array_equal(score[: len(reference)], exact_so_far(tokens, reference))
        assert np.isnan(score[len(reference) :]).all()
    prompts = [prompt_of(example)[0] for example in EXAMPLES]
    ids = [
        np.concatenate([prompt.input_ids, tokens])
        for prompt, tokens in zip(prompts, written.tokens, strict=True)
    ]
    oracle = [
        replace(e, input_ids=i, loss_mask=np.arange(len(i)) >= len(i) - 5)
        for e, i in zip(EXAMPLES, ids, strict=True)
    ]
    assert write(model, oracle, stop_tokens=(), max_new_tokens=5, rows=2).score.all()
    graded = write(
        model,
        EXAMPLES,
        stop_tokens=(),
        max_new_tokens=5,
        rows=2,
        grade=lambda number, ids: np.full(2, number),
    )
    np.testing.assert_array_equal(graded.score, [[0, 0], [1, 1], [2, 2]])


def test_exact_so_far_counts_what_was_not_written():
    a, b = np.array([4, 5, 6]), np.array([4, 5, 6, 7])
    assert exact_so_far(a, b).tolist() == [1, 1, 1, 0]
    assert exact_so_far(np.array([4, 9, 6, 7]), b).tolist() == [1, 0, 0, 0]


def test_conversations_without_answer_or_image_are_refused():
    with pytest.raises(ValueError, match="conversation 1 has no assistant turn"):
        find_answers([EXAMPLES[0], replace(EXAMPLES[0], loss_mask=None)])
    with pytest.raises(ValueError, match="conversation 0 shows no image"):
        find_answers([replace(EXAMPLES[0], pixel_values=None, image_grid_thw=None)])
