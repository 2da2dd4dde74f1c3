"""Image files: a path, a URL, bytes, an array -> a picture in RGB, or its size out of the header.

No other than regular files of a sane size are opened: a pipe would be waited for, and a device has
no end.
"""

import base64
import binascii
import re
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path, PurePath
from typing import Any
from urllib.parse import unquote, urlparse
from urllib.request import url2pathname

import numpy as np
from PIL import Image, UnidentifiedImageError
from transformers.image_transforms import convert_to_rgb
from transformers.image_utils import load_image

from pvm_jax.files.bucket import BucketError
from pvm_jax.files.cache import local_copy
from pvm_jax.files.paths import BUCKETS, any_path

MAX_FILE_BYTES = 2**30

HOME = "~/"
"""How a path of the home directory begins. `~` alone may begin a file's name."""

_IN_32_BITS = (("I", "PNG"), ("I", "PPM"))
"""Modes and formats in which PIL has 16-bit gray as 32-bit numbers."""

Source = str | Path | bytes | Image.Image | np.ndarray | Mapping[str, Any]


@contextmanager
def opened(source: Source) -> Iterator[tuple[Image.Image, str]]:
    """The image with its header read, and its name for errors. It is closed afterwards, unless it
    is `source` itself.

    Raises:
        FileNotFoundError, ValueError: if there is no image of one frame.
    """
    if isinstance(source, Image.Image):
        image, name = source, "the PIL image"
    elif isinstance(source, np.ndarray):
        image, name = _from_array(source), "the array"
    else:
        file, name = file_of(source)
        try:
            image = Image.open(file)
        except UnidentifiedImageError as error:  # whose text names the object that holds it
            raise ValueError(
                f"{name} cannot be read as an image: it is in no format that Pillow knows"
            ) from error
        except Exception as error:
            raise ValueError(f"{name} cannot be read as an image: {error}") from error
    try:
        # Phones write ordinary photographs as MPO, with a preview as its second frame.
        if getattr(image, "is_animated", False) and image.format != "MPO":
            raise ValueError(f"{name} holds several frames: give one of them, or all as a video")
        yield image, name
    finally:
        if image is not source:
            image.close()


def image_size(source: Source) -> tuple[int, int]:
    """Height and width of an image from its header (a quarter turn in its EXIF data is not
    followed).

    Raises:
        FileNotFoundError, ValueError: as `read_image`, as far as the header tells.
    """
    with opened(source) as (image, _):
        return image.height, image.width


def read_image(source: Source) -> Image.Image:
    """An RGB image.

    As Hugging Face has it: a file is turned upright by its EXIF data and its alpha channel is
    dropped; a PIL image is taken as it stands; what is transparent then is laid on white. 16-bit
    gray alone is read otherwise: its values are divided by 256, where Hugging Face cuts them off.

    Args:
        source: a path, a `file://` or `data:` URL, encoded bytes, {"bytes": …, "path": …} with one
            of them possibly None, a PIL image, or a uint8 array [H, W, 3].

    Raises:
        FileNotFoundError: if the file is not there.
        ValueError: if it cannot be decoded, holds several frames or values of more than 16 bits,
            exceeds PIL's limit, is no regular file or lies across the network.
    """
    with opened(source) as (image, name):
        try:
            if image.mode.startswith(("I", "F")):
                image = _gray(image)
            if image is not source:
                image = load_image(image)
            if image.mode == "RGB" and image.info.get("transparency") is None:
                return image
            return Image.fromarray(np.asarray(convert_to_rgb(image, return_numpy=True)))
        except Exception as error:  # PIL's decoders raise whatever they meet in a broken file
            raise ValueError(f"{name} cannot be decoded: {error}") from error


def _gray(image: Image.Image) -> Image.Image:
    """A picture of 16-bit gray with 8 bits. Raises ValueError for other numbers."""
    if not image.mode.startswith("I;16") and (image.mode, image.format) not in _IN_32_BITS:
        raise ValueError(
            f"its pixels are {'numbers with a fraction' if image.mode == 'F' else '32-bit numbers'}"
            ": which are black and white? Convert it to 8 or 16 bits"
        )
    gray = Image.fromarray((np.asarray(image) // 256).astype(np.uint8))
    gray.info["exif"] = image.getexif().tobytes()
    return gray


def encoded_bytes(source: str | Path | bytes | Mapping[str, Any]) -> bytes:
    """The file that holds an image, as it is.

    Raises:
        FileNotFoundError, ValueError: as `opened`, without looking inside.
    """
    file, _ = file_of(source)
    return file.getvalue() if isinstance(file, BytesIO) else file.read_bytes()


def _from_array(array: np.ndarray) -> Image.Image:
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
        raise ValueError(
            f"an image array must be [H, W, 3] of uint8, got {list(array.shape)} of {array.dtype}"
        )
    return Image.fromarray(array)


def file_of(
    source: Any, what: str = "image", most: int | None = None
) -> tuple[Path | BytesIO, str]:
    """What a decoder can open of a `what` in a path, a URL or bytes, and its name for errors.

    Raises:
        FileNotFoundError, ValueError: if it is none of them, or a file that does not end or has
            more than `most` bytes (None: than an image may have).
    """
    most = MAX_FILE_BYTES if most is None else most
    if isinstance(source, Mapping):
        if (encoded := source.get("bytes")) is not None:
            if not isinstance(encoded, bytes | bytearray | memoryview):
                raise ValueError(
                    f"{_article(what)}'s 'bytes' must be bytes, got {type(encoded).__name__} (for"
                    " JSON: a data: URL)"
                )
            return BytesIO(encoded), str(source.get("path") or f"the {what} in 'bytes'")
        source = source.get("path")
    if isinstance(source, bytes):
        return BytesIO(source), f"the {what} of {len(source)} bytes"
    if isinstance(source, PurePath):
        return _regular(any_path(source), str(source), what, most), str(source)
    if not isinstance(source, str):
        raise ValueError(
            f"{_article(what)} must be a path, a file:// or data: URL, encoded bytes, a PIL image,"
            f" a uint8 array or a mapping with 'bytes' or 'path', got {type(source).__name__}"
        )
    if not source:
        raise ValueError(f"{_article(what)}'s path is empty")
    if source.startswith("data:"):
        return _from_base64(source, what)
    if source.startswith("file://"):
        source = url2pathname(unquote(urlparse(source).path))
    elif source.startswith(BUCKETS):
        return _regular(any_path(source), source, what, most), source
    elif "://" in source:
        raise ValueError(
            f"{source}: {what}s are not fetched over the network but from buckets; download it and"
            " give the file's path"
        )
    path = Path.home() / source.removeprefix(HOME) if source.startswith(HOME) else Path(source)
    return _regular(path, source, what, most), source


def _article(what: str) -> str:
    return f"an {what}" if what[0] in "aeiou" else f"a {what}"


def _from_base64(url: str, what: str) -> tuple[BytesIO, str]:
    header, _, payload = url.partition(",")
    if not header.endswith(";base64"):
        raise ValueError(f"{header[:80]},…: a data URL of {_article(what)} must be base64")
    try:
        encoded = base64.b64decode(re.sub(r"\s", "", payload), validate=True)
    except binascii.Error as error:
        raise ValueError(f"{header},…: not base64 ({error})") from error
    return BytesIO(encoded), f"the {what} in a {header} URL"


def _regular(path: Path, name: str, what: str, most: int) -> Path:
    """`path`, or its copy here, if it is a file that ends."""
    try:
        path = local_copy(path)
        status = path.stat()
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{name} does not exist") from error
    except BucketError:
        raise
    except (OSError, ValueError) as error:  # a name that is too long, or holds a null byte
        raise ValueError(f"{name[:200]} cannot be read as {_article(what)}: {error}") from error
    if stat.S_ISDIR(status.st_mode):
        raise ValueError(f"{name} cannot be read as {_article(what)}: it is a directory")
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{name} cannot be read as {_article(what)}: it is no regular file")
    if status.st_size > most:
        raise ValueError(
            f"{name} has {status.st_size / 2**30:.1f} GiB: {_article(what)} file may have"
            f" {most / 2**30:g}"
        )
    return path
