"""Pictures travel as the bytes that they were, and mean what they meant."""

import dataclasses

import jax
import numpy as np
import pytest

from pvm_jax.data.batch import Batch
from pvm_jax.data.example import Example
from pvm_jax.data.patches import ImageSettings, PixelSettings, VideoSettings
from pvm_jax.data.pixels import as_floats
from pvm_jax.model.qwen3_vl import Qwen3VL
from tests.tiny import CONFIG, EXAMPLES, randomized

VISION = CONFIG.vision
BYTES = np.arange(256, dtype=np.uint8)
QWEN = (0.5,) * 3, (0.5,) * 3, 1 / 255
OTHER = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28), 1 / 127


def settings(kind: type[PixelSettings], numbers=OTHER) -> PixelSettings:
    mean, std, factor = numbers
    return kind(16, 10**6, 4, mean, std, rescale_factor=factor)


def by_hugging_face(kind: type[PixelSettings], numbers) -> np.ndarray:
    """[3, 256]: what each byte becomes, in the order and the types of Hugging Face's processors."""
    mean, std, factor = (np.float32(numbers[0]), np.float32(numbers[1]), numbers[2])
    if kind is ImageSettings:
        return ((BYTES * factor).astype(np.float32) - mean[:, None]) / std[:, None]
    unscale = np.float32(1 / factor)
    return (BYTES.astype(np.float32) - (mean * unscale)[:, None]) / (std * unscale)[:, None]


@pytest.mark.parametrize("kind", [ImageSettings, VideoSettings])
@pytest.mark.parametrize("numbers", [QWEN, OTHER, (QWEN[0], QWEN[1], 1.0)])
def test_device_and_host_make_the_same_floats(kind, numbers):
    """Of every byte, to the last bit, as Hugging Face does."""
    scale = settings(kind, numbers).scale
    pixels = np.tile(BYTES, (3, 1)).reshape(1, 1, -1)
    host = as_floats(pixels, scale, 2 * pixels.shape[2])
    device = jax.jit(as_floats, static_argnums=2)(
        pixels, np.tile(scale, (1, 1, 1, 1)), 2 * pixels.shape[2]
    )
    assert host.dtype == device.dtype == np.float32
    np.testing.assert_array_equal(np.asarray(device), host)
    expected = np.repeat(by_hugging_face(kind, numbers)[:, None], 2, axis=1)  # both frames
    np.testing.assert_array_equal(host.reshape(3, 2, 256), expected)


def as_bytes(example: Example, seed: int = 0) -> Example:
    """`example` with images of bytes in place of its floats."""
    if example.pixel_values is None:
        return example
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (example.num_patches, VISION.frame_dim), np.uint8)
    scale = settings(ImageSettings).scale
    return dataclasses.replace(example, pixel_values=pixels, image_scale=scale)


def as_numbers(example: Example) -> Example:
    """`example` as Hugging Face's processors would give it."""
    return dataclasses.replace(
        example,
        **{
            key: as_floats(value, scale, VISION.patch_dim)
            for key, scale in (
                ("pixel_values", example.image_scale),
                ("pixel_values_videos", example.video_scale),
            )
            if (value := getattr(example, key)) is not None
        },
        image_scale=None,
        video_scale=None,
    )


def film(seed: int) -> Example:
    """An image, and a video of two pairs of frames."""
    rng = np.random.default_rng(seed)
    ids = np.array([92, *[90] * 2, 93, 5, 92, *[91] * 1, 93, 6, 92, *[91] * 1, 93, 7, 8])
    return Example(
        ids,
        rng.integers(0, 256, (8, VISION.frame_dim), np.uint8),
        np.array([[1, 2, 4]]),
        rng.integers(0, 256, (8, VISION.patch_dim), np.uint8),
        np.array([[2, 2, 2]]),
        image_scale=settings(ImageSettings).scale,
        video_scale=settings(VideoSettings, QWEN).scale,
    )


def held(batch: Batch) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(batch))


def test_a_batch_of_images_takes_a_sixth_of_what_floats_take():
    vision = dataclasses.replace(VISION, patch_size=16)
    config = dataclasses.replace(CONFIG, vision=vision)
    ours = Batch.empty(config, rows=1, length=8192, patches=16384)
    assert ours.patches.dtype == np.uint8
    assert ours.patches.nbytes == 16384 * 3 * 16 * 16
    floats = Batch.empty(config, rows=1, length=8192, patches=16384, floats=True)
    assert held(ours) <= (held(floats) - floats.patch_scale.nbytes) / 6
    videos = Batch.empty(config, rows=1, length=8192, patches=16384, videos=True)
    assert videos.patches.nbytes == 2 * ours.patches.nbytes


@pytest.fixture(scope="module")
def model() -> Qwen3VL:
    return randomized()


@pytest.mark.parametrize("shown", [[as_bytes(e) for e in EXAMPLES[:3]], [film(0), film(1)]])
def test_floats_give_the_same_logits_as_the_bytes_that_they_come_from(model, shown):
    one, other = (
        Batch.from_rows([rows], CONFIG, length=64, patches=64)
        for rows in (shown, list(map(as_numbers, shown)))
    )
    assert (one.patches.dtype, other.patches.dtype) == (np.uint8, np.float32)
    np.testing.assert_array_equal(np.asarray(model(one)), np.asarray(model(other)))


def test_floats_as_hugging_face_gives_them_are_read_as_they_stand():
    numbers = as_numbers(as_bytes(EXAMPLES[0]))
    arrays = {
        "input_ids": numbers.input_ids[None],
        "pixel_values": numbers.pixel_values,
        "image_grid_thw": numbers.image_grid_thw,
    }
    batch = Batch.from_hf(arrays, CONFIG)
    np.testing.assert_array_equal(batch.patches[0, :24], numbers.pixel_values)
    mixed = Batch.from_examples([numbers, as_bytes(EXAMPLES[0])], CONFIG)
    np.testing.assert_array_equal(mixed.patches[0], mixed.patches[1])


def test_a_videos_frames_differ_and_an_images_do_not():
    shown = film(0)
    batch = Batch.from_rows([[as_bytes(EXAMPLES[1]), shown]], CONFIG, length=64, patches=64)
    assert batch.patches.dtype == np.uint8
    image, first, last = (
        batch.patches[0, start:stop].reshape(stop - start, 3, 2, -1)
        for start, stop in ((0, 8), (8, 12), (12, 16))
    )
    assert np.array_equal(image[:, :, 0], image[:, :, 1])
    assert np.array_equal(image[:, :, 0].reshape(8, -1), shown.pixel_values)
    pairs = np.concatenate([first, last])
    assert np.array_equal(pairs.reshape(8, -1), shown.pixel_values_videos)
    assert (pairs[:, :, 0] != pairs[:, :, 1]).mean() > 0.9
    numbers = as_floats(batch.patches, batch.patch_scale, VISION.patch_dim)[0]
    expected = as_numbers(shown)
    assert np.array_equal(numbers[:8], expected.pixel_values)
    assert np.array_equal(numbers[8:16], expected.pixel_values_videos)
    assert not numbers[16:].any()  # padding


def test_bytes_need_their_meaning_and_a_video_its_room():
    shown = as_bytes(EXAMPLES[0])
    with pytest.raises(ValueError, match=r"row 0: image pixels are bytes: image_scale must be"):
        Batch.from_examples([dataclasses.replace(shown, image_scale=None)], CONFIG)
    with pytest.raises(ValueError, match="row 0 shows a video, and the batch has room for one"):
        Batch.from_rows([[film(0)]], CONFIG, length=32, patches=16, videos=False)
    roomy = Batch.from_rows([[shown]], CONFIG, length=64, patches=64, videos=True)
    tight = Batch.from_rows([[shown]], CONFIG, length=64, patches=64)
    for batch in (roomy, tight):
        batch_floats = as_floats(batch.patches, batch.patch_scale, VISION.patch_dim)
        assert np.array_equal(batch_floats[0, :24], as_numbers(shown).pixel_values)
    assert roomy.patches.nbytes == 2 * tight.patches.nbytes
