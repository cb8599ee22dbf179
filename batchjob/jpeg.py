"""Ordinary JPEGs, decoded and resized by torchvision and torch: within 2 grey levels of Pillow, in half its time.

Anything else, and anything that fails here, is left to Pillow (`images.decode`), whose verdict counts.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.nn.functional import interpolate
from torchvision.io import ImageReadMode, decode_jpeg

from batchjob.images import Placing, resize

FILTERS = ("bicubic", "bilinear")  # those that torch has with antialiasing for uint8


def accelerate(data: bytes, orientation: int, place: Placing, interpolation: str) -> NDArray[np.uint8] | None:
    """uint8 [3, h, w] as `images.resize` gives it, or None where torchvision can't decode the bytes.

    torch's resize of channels-last uint8 rounds its weights to 16 bits, Pillow's to 22: hence the grey level. It has
    no fractional boxes: for these the pixels go through Pillow's resize.
    """
    try:
        pixels = decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=ImageReadMode.RGB)
    except RuntimeError:
        return None
    pixels = _oriented(pixels, orientation)
    if interpolation not in FILTERS or not place.is_whole:
        photo = Image.fromarray(np.ascontiguousarray(pixels.permute(1, 2, 0).numpy()))
        return resize(photo, place, interpolation)
    left, top, right, bottom = place.hull
    part = pixels[None, :, top:bottom, left:right]
    if place.is_vertical_first:
        part = interpolate(part, (place.size[0], right - left), mode=interpolation, antialias=True)
    small = interpolate(part, place.size, mode=interpolation, antialias=True)
    result: NDArray[np.uint8] = small[0].numpy()  # channels last in memory; the copy into the batch reorders it
    return result


def _oriented(pixels: torch.Tensor, orientation: int) -> torch.Tensor:
    """[3, h, w] turned as EXIF says: 5 to 8 are transposed, then all are mirrored."""
    if orientation >= 5:
        pixels = pixels.transpose(1, 2)
    flips = {2: [2], 3: [1, 2], 4: [1], 6: [2], 7: [1, 2], 8: [1]}.get(orientation)
    return pixels.flip(flips) if flips else pixels
