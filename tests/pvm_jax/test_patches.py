"""Pixels, bit for bit against transformers' image processor, on the photographs that scikit-image
and scikit-learn ship."""

import base64
import io
import math
import os
from functools import cache

import numpy as np
import pytest
from PIL import Image
from skimage import data
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from pvm_jax.data import image_files
from pvm_jax.data.image_files import image_size, read_image
from pvm_jax.data.patches import ImageSettings, PixelSettings, VideoSettings, patches
from pvm_jax.data.pixels import as_floats

QWEN3_VL = {
    "size": {"shortest_edge": 65536, "longest_edge": 16777216},
    "patch_size": 16,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}
CONFIGS = {
    "qwen3_vl": QWEN3_VL,
    "min_max_pixels": QWEN3_VL | {"min_pixels": 4096, "max_pixels": 200_704},
    "small_size": QWEN3_VL | {"size": {"shortest_edge": 1024, "longest_edge": 65536}},
    "other_numbers": QWEN3_VL
    | {
        "image_mean": [0.48, 0.46, 0.41],
        "image_std": [0.27, 0.26, 0.28],
        "rescale_factor": 1 / 127,
        "patch_size": 14,
    },
}


@cache
def photographs() -> dict[str, Image.Image]:
    from sklearn.datasets import load_sample_image  # seconds, which one worker alone has to wait

    astronaut, wide = (
        Image.fromarray(data.astronaut()),
        Image.fromarray(load_sample_image("china.jpg")),
    )
    transparent = astronaut.convert("RGBA")
    transparent.putalpha(Image.linear_gradient("L").resize(astronaut.size))
    return {
        "astronaut": astronaut,
        "china": wide,
        "flower": Image.fromarray(load_sample_image("flower.jpg")),
        "retina": Image.fromarray(data.retina()),
        "rgba_logo": Image.fromarray(data.logo()),
        "transparent": transparent,
        "palette": astronaut.quantize(64),
        "gray_camera": Image.fromarray(data.camera()),
        "gray_alpha": Image.fromarray(data.camera()).convert("LA"),
        "tiny": wide.resize((3, 5)),
        "one_pixel": wide.resize((1, 1)),
        "wide": wide.resize((1900, 10)),
        "tall": wide.resize((33, 640)),
        "exact": wide.resize((320, 256)),
    }


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("name", photographs())
def test_bit_equal_to_transformers(name, config):
    image = photographs()[name]
    expected = Qwen2VLImageProcessorPil(**config)(images=[image], return_tensors="np")
    settings = ImageSettings.from_config(config, "test")
    pixels, grid = patches([read_image(image)], settings)
    assert pixels.dtype == np.uint8
    assert 2 * pixels.shape[1] == settings.patch_dim  # one frame
    assert np.array_equal(floats(pixels, settings), expected["pixel_values"])
    assert np.array_equal([grid], expected["image_grid_thw"])


def floats(pixels: np.ndarray, settings: PixelSettings) -> np.ndarray:
    """What the model reads of the bytes of `patches`."""
    return as_floats(pixels, settings.scale, settings.patch_dim)


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def rotated_photograph() -> bytes:
    """A JPEG whose EXIF data say that it is to be turned by a quarter."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(Image.fromarray(data.astronaut()[:200]), "JPEG", exif=exif)


def palette(**options) -> bytes:
    """A PNG or GIF of few colours, one of which may be transparent."""
    return encoded(Image.fromarray(data.astronaut()[:96, :80]).quantize(16), **options)


def converted(mode: str, kind: str, **options) -> bytes:
    return encoded(Image.fromarray(data.astronaut()[:90, :100]).convert(mode), kind, **options)


FILES = {
    "palette.png": palette(kind="PNG"),
    "one_transparent.png": palette(kind="PNG", transparency=3),
    "shades_transparent.png": palette(kind="PNG", transparency=bytes([0, 9, 255, 99])),
    "transparent.gif": palette(kind="GIF", transparency=5),
    "white_transparent.png": converted("RGB", "PNG", transparency=(255, 255, 255)),
    "gray_transparent.png": converted("L", "PNG", transparency=90),
    "gray_alpha.png": converted("LA", "PNG"),
    "alpha.webp": encoded(Image.fromarray(data.logo()), "WEBP", lossless=True),
    "bits.png": converted("1", "PNG"),
    "bits.tiff": converted("1", "TIFF"),
    "inks.jpg": converted("CMYK", "JPEG"),
    "inks.tiff": converted("CMYK", "TIFF"),
    "lab.tiff": converted("LAB", "TIFF"),
    "photo.bmp": converted("RGB", "BMP"),
    "photo.ppm": converted("RGB", "PPM"),
    "photo.tga": converted("RGBA", "TGA"),
    "photo.jp2": converted("RGB", "JPEG2000"),
    "photo.jpg": encoded(Image.fromarray(data.astronaut()), "JPEG"),
    "rotated.jpg": rotated_photograph(),
    "transparent.png": encoded(Image.fromarray(data.logo()), "PNG"),
    "gray.png": encoded(Image.fromarray(data.camera()), "PNG"),
    "photo.webp": encoded(Image.fromarray(data.astronaut()[:100]), "WEBP"),
}


@pytest.mark.parametrize("name", FILES)
def test_files_equal_transformers_and_every_way_to_name_them(name, tmp_path):
    content = FILES[name]
    path = tmp_path / name.replace(".", " ä.")
    path.write_bytes(content)
    expected = Qwen2VLImageProcessorPil(**QWEN3_VL)(images=[str(path)], return_tensors="np")
    settings = ImageSettings.from_config(QWEN3_VL, "test")
    data_url = f"data:image/{name.rpartition('.')[2]};base64,{base64.b64encode(content).decode()}"
    sources = [path, str(path), path.as_uri(), content, data_url]
    sources += [
        {"bytes": content, "path": None},
        {"bytes": None, "path": str(path)},
        {"bytes": content, "path": "gone"},
    ]
    for source in sources:
        pixels, grid = patches([read_image(source)], settings)
        assert np.array_equal(floats(pixels, settings), expected["pixel_values"])
        assert sum(image_size(source)) == sum(read_image(source).size)
        assert np.prod(settings.grid(1, *image_size(source))) == np.prod(grid)


def test_arrays_are_pictures():
    array = data.astronaut()
    assert np.array_equal(np.asarray(read_image(array)), array)


def multi_frame(kind: str) -> bytes:
    frames = [Image.fromarray(data.astronaut()[i : i + 64, :64]) for i in (0, 64)]
    return encoded(frames[0], kind, save_all=True, append_images=frames[1:])


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_several_frames_are_refused(kind):
    for read in (read_image, image_size):
        with pytest.raises(ValueError, match="holds several frames"):
            read(multi_frame(kind))
    with pytest.raises(ValueError, match="holds several frames"):
        read_image(Image.open(io.BytesIO(multi_frame(kind))))


def test_preview_of_a_phone_is_not_a_second_frame():
    assert read_image(multi_frame("MPO")).size == (64, 64)


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ("gone/away.jpg", FileNotFoundError, "gone/away.jpg does not exist"),
        ("file:///gone/away.jpg", FileNotFoundError, "/gone/away.jpg does not exist"),
        ({"bytes": None, "path": "gone.png"}, FileNotFoundError, "gone.png does not exist"),
        (
            "https://example.org/cat.jpg",
            ValueError,
            "cat.jpg: images are not fetched over the network",
        ),
        (b"no image", ValueError, "the image of 8 bytes cannot be read"),
        ({"bytes": b"no image", "path": "cat.jpg"}, ValueError, "cat.jpg cannot be read"),
        ("data:image/png;base64,AAA", ValueError, "data:image/png;base64,…: not base64"),
        ({"bytes": None, "path": None}, ValueError, "an image must be a path"),
        ({"bytes": "aGk=", "path": None}, ValueError, "'bytes' must be bytes, got str"),
        (7, ValueError, "an image must be a path, .* got int"),
        (np.zeros((4, 4)), ValueError, r"must be \[H, W, 3\] of uint8"),
    ],
)
def test_unreadable_images_are_named(source, error, message):
    for read in (read_image, image_size):
        with pytest.raises(error, match=message):
            read(source)


def test_truncated_file_is_named(tmp_path):
    path = tmp_path / "half.jpg"
    path.write_bytes(FILES["photo.jpg"][:5000])
    with pytest.raises(ValueError, match=r"half\.jpg cannot be decoded: .*truncated"):
        read_image(path)
    with pytest.raises(ValueError, match="cannot be read"):
        read_image(tmp_path)


def test_decompression_bomb_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "huge.png"
    path.write_bytes(FILES["gray.png"])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ValueError, match=r"huge\.png cannot be read as an image: .*exceeds limit"):
        image_size(path)


def test_sizes_that_transformers_refuses():
    settings = ImageSettings.from_config(QWEN3_VL, "test")
    with pytest.raises(ValueError, match="aspect ratio must be smaller than 200"):
        settings.grid(1, 1, 201)
    with pytest.raises(ValueError, match="empty"):
        settings.grid(1, 0, 10)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"do_resize": False}, "here.json: do_resize = False is not supported, only True"),
        ({"resample": 2}, "resample = 2 is not supported, only 3"),
        (
            {"image_processor_type": "CLIPImageProcessor"},
            "image_processor_type = 'CLIPImageProcessor' is not supported",
        ),
        ({"patch_size": None}, "patch_size is missing"),
        ({"image_mean": None}, "image_mean is missing"),
        ({"image_std": [0.5, 0.5]}, "image_mean and image_std need three numbers"),
        ({"size": 224}, "size must have shortest_edge and longest_edge"),
        ({"size": {"height": 224, "width": 224}}, "min_pixels is missing"),
        ({"min_pixels": 10, "max_pixels": 5}, "need 0 < min_pixels <= max_pixels, got 10 and 5"),
        ({"patch_size": 15}, "patch_size must be even, got 15"),
        ({"patch_size": 0}, "patch_size must be a whole number of at least 1, got 0"),
        ({"merge_size": "2"}, "merge_size must be a whole number of at least 1, got '2'"),
        ({"rescale_factor": 0}, "rescale_factor must be a finite number above 0, got 0"),
        ({"rescale_factor": math.nan}, "rescale_factor must be a finite number above 0"),
        ({"image_std": [0.5, 0.0, 0.5]}, "image_std must be finite numbers above 0"),
        ({"image_mean": [0.5, math.inf, 0.5]}, "image_mean must be finite numbers"),
    ],
)
def test_settings_that_are_not_computed_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        ImageSettings.from_config(QWEN3_VL | changes, "here.json")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_video_tokens": 0}, "max_video_tokens must be a whole number of at least 1, got 0"),
        ({"cap_pixels_per_frame": 1}, "cap_pixels_per_frame must be true or false, got 1"),
    ],
)
def test_settings_of_videos_that_make_no_sense_are_refused(changes, message):
    config = {key: value for key, value in QWEN3_VL.items() if "image_processor" not in key}
    with pytest.raises(ValueError, match=message):
        VideoSettings.from_config(config | changes, "here.json")


def test_default_size_is_that_of_transformers():
    config = {key: value for key, value in QWEN3_VL.items() if key != "size"}
    settings = ImageSettings.from_config(config, "test")
    size = Qwen2VLImageProcessorPil(**config).size
    assert (settings.min_pixels, settings.max_pixels) == (
        size["shortest_edge"],
        size["longest_edge"],
    )
    with pytest.raises(ValueError, match="max_pixels is not read by Hugging Face for videos"):
        VideoSettings.from_config(config | {"max_pixels": 5}, "test")


@pytest.mark.parametrize(
    ("frames", "height", "width", "min_pixels", "max_pixels", "resized"),
    # Computed with smart_resize of transformers' video_processing_qwen3_vl, which cannot be
    # imported without torch.
    [
        (2, 64, 96, 4096, 25165824, (64, 96)),
        (5, 240, 320, 4096, 25165824, (256, 320)),
        (7, 17, 40, 4096, 25165824, (32, 64)),
        (3, 20, 1000, 4096, 25165824, (32, 1600)),
        (64, 720, 1280, 4096, 25165824, (448, 832)),
        (768, 1080, 1920, 4096, 25165824, (128, 224)),
        (2, 32, 32, 131072, 786432, (256, 256)),
        (9, 333, 77, 131072, 786432, (320, 64)),
        (6, 100, 100, 131072, 786432, (160, 160)),
    ],
)
def test_video_sizes(frames, height, width, min_pixels, max_pixels, resized):
    size = {"shortest_edge": min_pixels, "longest_edge": max_pixels}
    settings = VideoSettings.from_config(QWEN3_VL | {"size": size}, "test")
    assert settings.resized(frames, height, width) == resized
    assert settings.grid(frames, height, width) == (
        -(-frames // 2),
        resized[0] // 16,
        resized[1] // 16,
    )


def test_video_frames_capped():
    config = QWEN3_VL | {
        "size": {"shortest_edge": 4096, "longest_edge": 25165824},
        "cap_pixels_per_frame": True,
    }
    assert VideoSettings.from_config(config, "test").resized(4, 1080, 1920) == (640, 1152)
    assert VideoSettings.from_config(config | {"max_video_tokens": 16}, "test").resized(
        4, 1080, 1920
    ) == (96, 160)


def test_video_patches_are_pairs_of_frames():
    rng = np.random.default_rng(0)
    video = rng.integers(0, 256, (3, 64, 96, 3), np.uint8)
    settings = VideoSettings.from_config(
        QWEN3_VL | {"size": {"shortest_edge": 4096, "longest_edge": 65536}}, "test"
    )
    pixels, grid = patches([Image.fromarray(frame) for frame in video], settings)
    assert grid == (2, 4, 6)
    # By hand: patch 5 of a frame is the second of the second 2x2 block: row 0, column 3.
    patch = floats(pixels, settings).reshape(2, 24, 3, 2, 16, 16)[:, 5]
    expected = (video[[[0, 1], [2, 2]], :16, 48:64].astype(np.float32) - 127.5) / 127.5
    assert np.array_equal(patch, expected.transpose(0, 4, 1, 2, 3))


def test_one_frame_or_frames_of_two_sizes_are_no_video():
    settings = VideoSettings.from_config(QWEN3_VL, "test")
    frame = Image.fromarray(data.astronaut())
    with pytest.raises(ValueError, match="a video needs 2 frames or more, got 1"):
        patches([frame], settings)
    with pytest.raises(ValueError, match="one size"):
        patches([frame, frame.resize((50, 50))], settings)
    with pytest.raises(ValueError, match="aspect ratio"):
        settings.grid(2, 40, 40 * 201)


RAMP = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM", "JPEG2000"])
def test_16_bit_gray_keeps_its_shades(kind):
    options = {"irreversible": False} if kind == "JPEG2000" else {}
    image = read_image(encoded(Image.fromarray(RAMP), kind, **options))
    assert image.mode == "RGB"
    assert np.array_equal(image, np.repeat(RAMP[..., None] // 256, 3, -1))


def test_16_bit_gray_is_turned_upright_and_read_from_memory():
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = read_image(encoded(Image.fromarray(RAMP), "PNG", exif=exif))
    assert np.array_equal(np.asarray(turned)[..., 0], np.rot90(RAMP // 256, -1))
    assert np.array_equal(np.asarray(read_image(Image.fromarray(RAMP)))[..., 0], RAMP // 256)


@pytest.mark.parametrize("array", [RAMP.astype(np.float32), RAMP.astype(np.int32) * 9])
def test_numbers_without_a_white_are_refused(array):
    with pytest.raises(ValueError, match=r"cannot be decoded: its pixels are .* which are black"):
        read_image(encoded(Image.fromarray(array), "TIFF"))


def test_only_regular_files_of_a_sane_size_are_opened(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "large.png").write_bytes(b"0" * 101)
    monkeypatch.setattr(image_files, "MAX_FILE_BYTES", 100)
    bad = {
        str(tmp_path / "pipe.png"): "it is no regular file",
        "/dev/zero": "it is no regular file",
        str(tmp_path): "it is a directory",
        str(tmp_path / "large.png"): "an image file may have",
        "a" * 5000: "cannot be read as an image",
        "a\0b": "cannot be read as an image",
        "data:image/png;base64,@@@@": "not base64",
        "data:image/svg+xml,<svg/>": "must be base64",
    }
    for source, message in bad.items():
        for read in (read_image, image_size, image_files.encoded_bytes):
            with pytest.raises(ValueError, match=message):
                read(source)
