"""The host-side layout: padding sides, packing, buckets, and everything that it refuses."""

import dataclasses

import chex
import numpy as np
import pytest

from pvm_jax import Batch
from pvm_jax.data.batch import bucket_size
from tests.tiny import CONFIG, EXAMPLES, example

IMAGE, VIDEO = CONFIG.image_token_id, CONFIG.video_token_id


def arrays(*examples, side="right"):
    """What a Hugging Face processor would give for these examples."""
    length = max(len(e.input_ids) for e in examples)
    ids, mask = (
        np.zeros((len(examples), length), np.int64),
        np.zeros((len(examples), length), np.int64),
    )
    for row, e in enumerate(examples):
        start = length - len(e.input_ids) if side == "left" else 0
        ids[row, start : start + len(e.input_ids)], mask[row, start : start + len(e.input_ids)] = (
            e.input_ids,
            1,
        )
    images = [e for e in examples if e.pixel_values is not None]
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "pixel_values": np.concatenate([e.pixel_values for e in images]),
        "image_grid_thw": np.concatenate([e.image_grid_thw for e in images]),
    }


def test_padding_sides_differ_in_columns_alone():
    left = Batch.from_hf(arrays(*EXAMPLES, side="left"), CONFIG)
    right = Batch.from_hf(arrays(*EXAMPLES, side="right"), CONFIG)
    for row in range(len(EXAMPLES)):
        where = [np.flatnonzero(batch.segment_ids[row]) for batch in (left, right)]
        for field in ("tokens", "visual_index", "loss_weights"):
            chex.assert_trees_all_equal(
                getattr(left, field)[row, where[0]],
                getattr(right, field)[row, where[1]],
                custom_message=field,
            )
        chex.assert_trees_all_equal(
            left.positions[row][:, where[0]], right.positions[row][:, where[1]]
        )
    for field in (
        "patches",
        "patch_positions",
        "patch_interp_weights",
        "patch_segment_ids",
        "visual_segment_ids",
    ):
        chex.assert_trees_all_equal(getattr(left, field), getattr(right, field))


def test_every_leaf_is_batch_major():
    batch = Batch.from_rows(
        [EXAMPLES[:2], EXAMPLES[2:3], EXAMPLES[3:]], CONFIG, length=64, patches=64
    )
    chex.assert_axis_dimension(batch.positions, 1, 3)
    chex.assert_tree_shape_prefix(batch, (3,))
    chex.assert_shape(batch.visual_segment_ids, (3, 16))


def test_packing_numbers_segments_and_frames():
    batch = Batch.from_rows([EXAMPLES], CONFIG, length=128, patches=128)
    lengths = [len(e.input_ids) for e in EXAMPLES]
    np.testing.assert_array_equal(np.bincount(batch.segment_ids[0])[1:], lengths)
    np.testing.assert_array_equal(np.bincount(batch.patch_segment_ids[0])[1:], [24, 4, 24, 16])
    np.testing.assert_array_equal(np.bincount(batch.visual_segment_ids[0])[1:], [6, 0, 7, 4])
    starts = np.cumsum([0, *lengths[:-1]])
    assert not batch.loss_weights[
        0, starts
    ].any()  # the first token of an example has nothing to be predicted from
    np.testing.assert_array_equal(batch.positions[0, :, starts], 0)


def test_a_video_is_a_run_a_frame():
    """Two frame pairs, each with its own placeholders; time stands still inside a frame
    (`get_rope_index`)."""
    ids = np.array([1, 92, *[VIDEO] * 2, 93, 2, 92, *[VIDEO] * 2, 93, 3])
    pixels = np.random.default_rng(0).normal(size=(16, CONFIG.vision.patch_dim)).astype(np.float32)
    batch = Batch.from_hf(
        {
            "input_ids": ids[None],
            "pixel_values_videos": pixels,
            "video_grid_thw": np.array([[2, 2, 4]]),
        },
        CONFIG,
    )
    np.testing.assert_array_equal(batch.patch_segment_ids[0, :16], [1] * 8 + [2] * 8)
    np.testing.assert_array_equal(
        batch.positions[0, :, : len(ids)].T[:6],
        [[0] * 3, [1] * 3, [2] * 3, [2, 2, 3], [4] * 3, [5] * 3],
    )
    np.testing.assert_array_equal(batch.visual_index[0, [2, 3, 7, 8]], [0, 1, 2, 3])


def test_interpolation_reproduces_the_table():
    """A frame of the table's own size meets its entries exactly; any frame's shares sum to 1."""
    side = CONFIG.vision.position_grid_size
    batch = Batch.from_rows(
        [[example(0, text=(1, 1), grids=((side, side),))]], CONFIG, length=16, patches=side * side
    )
    index = batch.patch_interp_indices[
        0, np.arange(side * side), batch.patch_interp_weights[0].argmax(-1)
    ]
    expected = batch.patch_positions[0, :, 0] * side + batch.patch_positions[0, :, 1]
    np.testing.assert_array_equal(index, expected)
    odd = Batch.from_rows(
        [[example(0, text=(1, 1), grids=((4, 10),))]], CONFIG, length=16, patches=40
    )
    np.testing.assert_allclose(odd.patch_interp_weights[0].sum(-1), 1, atol=1e-6)


def test_buckets():
    sizes = [bucket_size(n) for n in range(1, 100_000, 7)]
    assert bucket_size(0) == 0
    assert all(
        size >= n and size % 16 == 0 and (n < 64 or size <= 1.25 * n)
        for size, n in zip(sizes, range(1, 100_000, 7), strict=True)
    )
    assert len(set(sizes)) < 48


def _changed(**changes):
    return arrays(EXAMPLES[0], EXAMPLES[2]) | changes


BAD = {
    "vocabulary": (
        lambda a: a | {"input_ids": np.where(a["input_ids"] == 92, 96, a["input_ids"])},
        "row 0: token id 96",
    ),
    "too few images": (
        lambda a: (
            a | {"image_grid_thw": a["image_grid_thw"][:2], "pixel_values": a["pixel_values"][:28]}
        ),
        "row 1",
    ),
    "too many images": (
        lambda a: (
            a
            | {
                "image_grid_thw": np.concatenate([a["image_grid_thw"], [[1, 2, 2]]]),
                "pixel_values": np.concatenate([a["pixel_values"], a["pixel_values"][:4]]),
            }
        ),
        "4 images were given, but the prompts have placeholders for 3",
    ),
    "no pixels": (
        lambda a: {k: v for k, v in a.items() if "pixel" not in k},
        "pixels and image_grid_thw must come together",
    ),
    "no images at all": (
        lambda a: {"input_ids": a["input_ids"]},
        "placeholders, but there are no image pixels",
    ),
    "cut inside an image": (
        lambda a: (
            a
            | {
                "attention_mask": a["attention_mask"]
                * np.stack([np.arange(a["input_ids"].shape[1]) < 9, a["attention_mask"][1]])
            }
        ),
        "truncated inside the image",
    ),
    "odd grid": (
        lambda a: a | {"image_grid_thw": np.array([[1, 3, 8], [1, 2, 2], [1, 6, 4]])},
        "multiples of 2",
    ),
    "patch width": (
        lambda a: a | {"pixel_values": a["pixel_values"][:, :-1]},
        "image pixels must be",
    ),
    "labels": (
        lambda a: a | {"labels": a["input_ids"] + 1},
        "labels must be -100 or equal input_ids",
    ),
    "mask shape": (
        lambda a: a | {"attention_mask": a["attention_mask"][:, 1:]},
        "attention_mask must be",
    ),
    "empty row": (
        lambda a: a | {"attention_mask": a["attention_mask"] * [[1], [0]]},
        "row 1: every token is masked",
    ),
    "gap": (
        lambda a: (
            a | {"attention_mask": a["attention_mask"] * (np.arange(a["input_ids"].shape[1]) != 2)}
        ),
        "row 0: attention_mask is 0 between tokens",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused(name):
    break_it, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        Batch.from_hf(break_it(_changed()), CONFIG)


def test_a_row_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"row 0 has .* the batch's columns are 16 and 64"):
        Batch.from_rows([EXAMPLES], CONFIG, length=16, patches=64)


def test_two_images_in_one_run_are_refused():
    """Without the tokens between them, which image a placeholder belongs to would be a guess."""
    e = EXAMPLES[2]
    joined = dataclasses.replace(e, input_ids=np.array([1, *[IMAGE] * 7, 2], np.int32))
    with pytest.raises(
        ValueError, match="1 runs of image placeholders, but there are 2 image frames"
    ):
        Batch.from_rows([[joined]], CONFIG, length=16, patches=32)
