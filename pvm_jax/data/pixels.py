"""Pictures as the bytes that they were, and the arithmetic that makes the model's numbers of them.

The host and the device do the same in float32, operation by operation, so that the numbers are
equal to the last bit wherever they are made.
"""

import math
from typing import Any

import numpy as np

SCALE_TERMS = 4
"""Numbers of a channel in a scale: see `scale_of`."""

_WITHOUT_LAST_BIT, _FIRST_HALF = np.uint32(0xFFFFFFFE), np.uint32(0xFFFFF000)
_COARSE_BITS = 16
"""A byte times so many bits is exact in float32."""


def scale_of(factor: float, shift: np.ndarray, divisor: np.ndarray) -> np.ndarray:
    """What becomes of a byte in each channel, [4, channels] float32: (byte * coarse + byte * fine -
    shift) / divisor.

    coarse + fine is `factor`, in two numbers: the first product is exact, and the sum is rounded
    once, as byte * factor would be in float64.
    """
    mantissa, exponent = math.frexp(factor)
    coarse = math.ldexp(round(math.ldexp(mantissa, _COARSE_BITS)), exponent - _COARSE_BITS)
    terms = (coarse, factor - coarse, shift, divisor)
    return np.stack([np.broadcast_to(np.float32(term), shift.shape) for term in terms])


def no_scale(channels: int) -> np.ndarray:
    """[4, channels] float32: every byte becomes 0."""
    return scale_of(0.0, np.zeros(channels), np.ones(channels))


def as_floats(pixels: Any, scale: Any, patch_dim: int) -> Any:
    """What the model reads, in NumPy or JAX: bytes by their scale, other numbers as they stand.

    Args:
        pixels: [..., P, patch_dim], or of uint8 with one frame in place of all.
        scale: of all patches [4, channels], or of each [..., P, 4, channels].

    Returns:
        [..., P, patch_dim]; float32 of bytes.
    """
    if pixels.dtype != np.uint8:
        return pixels
    channels = scale.shape[-1]
    values = pixels.reshape(*pixels.shape[:-1], channels, -1).astype(np.float32)
    coarse, fine, shift, divisor = (scale[..., term, :, None] for term in range(SCALE_TERMS))
    values = _divided(values * coarse + values * fine - shift, divisor)
    return repeat_frame(values.reshape(pixels.shape), channels, patch_dim)


def _divided(values: Any, divisor: Any) -> Any:
    """values / divisor, rounded as IEEE rounds a division, by sums and products alone.

    Compilers make another product of a division by few numbers, and accelerators have only
    approximate ones. Here a quotient that may be off in its last bits is mended by what it leaves
    over. Each product that a sum takes is exact, in halves of 12 bits, so that it does not matter
    where a compiler fuses the two; nor can it do so across the masks.
    """
    inverse = 1 / divisor
    bits = (values * inverse).view(np.uint32)
    quotient = (bits & _WITHOUT_LAST_BIT).view(np.float32)
    high, low = _halves(quotient)
    divisor_high, divisor_low = _halves(divisor)
    rest = values - high * divisor_high - high * divisor_low
    rest = rest - low * divisor_high - low * divisor_low
    return quotient + rest * inverse


def _halves(values: Any) -> tuple[Any, Any]:
    """The first 12 bits of float32 numbers, and the last 12."""
    high = (values.view(np.uint32) & _FIRST_HALF).view(np.float32)
    return high, values - high


def repeat_frame(pixels: Any, channels: int, patch_dim: int) -> Any:
    """Patches of one frame, [..., P, channels * numbers] -> [..., P, patch_dim], the same frame at
    all times; what is as wide already stays as it is."""
    times = patch_dim // pixels.shape[-1]
    if times == 1:
        return pixels
    frame = pixels.reshape(*pixels.shape[:-1], channels, 1, -1)
    return frame.repeat(times, -2).reshape(*pixels.shape[:-1], patch_dim)
