"""Decodes ordinary JPEGs by libjpeg-turbo and resizes them by torch: within 2 grey levels of Pillow, in half its time.

Anything else, and anything that fails here, is left to Pillow (`decode`), whose verdict counts. This module is an
`Accelerator` of `batchjob.data.decode`.
"""

import threading

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from simplejpeg import decode_jpeg, decode_jpeg_header
from torch import Tensor
from torch.nn.functional import interpolate

from batchjob.data.decode import Placing, resize

FILTERS = ("bicubic", "bilinear")  # those that torch has with antialiasing for uint8
KEPT_BYTES = 2**24  # of the buffer of each thread: 4 megapixels of four channels
_APP1, _SCAN = 0xE1, 0xDA
_kept = threading.local()


def plain_size(data: bytes) -> tuple[int, int] | None:
    """Returns (height, width) of a JPEG in colour or grey without EXIF or XMP data, which might rotate it; else None.

    Such a file needs no look by Pillow at its metadata, which would take a twentieth of the whole time.
    """
    if not _is_unrotated(data):
        return None
    try:
        height, width, colours, _ = decode_jpeg_header(data)
    except ValueError:
        return None
    return None if colours in ("CMYK", "YCCK") else (int(height), int(width))


def pixels(data: bytes, orientation: int, place: Placing, interpolation: str) -> NDArray[np.uint8] | None:
    """Decodes a JPEG in colour or grey, turns it upright and resizes it.

    Parameters
    ----------
    data, orientation, place, interpolation
        As `Accelerator.pixels`.

    Returns
    -------
    uint8 [3, h, w] of the size `place.size`, or None where libjpeg-turbo rejects the bytes.

    Notes
    -----
    torch's resize of channels-last uint8 rounds its weights to 16 bits and Pillow's to 22 bits, so that the two differ
    by up to 2 grey levels. torch can't take a box with fractions of pixels; Pillow resizes these.
    """
    is_for_torch = interpolation in FILTERS and place.is_whole
    try:
        photo = torch.from_numpy(_four_channels(data) if is_for_torch else decode_jpeg(data))
    except ValueError:
        return None
    photo = _oriented(photo, orientation)
    if not is_for_torch:
        return resize(Image.fromarray(photo.numpy()), place, interpolation)
    left, top, right, bottom = place.hull
    # the image axis comes before the permutation: else its stride hides from torch that the channels are last
    part = photo[None, top:bottom, left:right].permute(0, 3, 1, 2)
    if place.is_vertical_first:
        part = interpolate(part, (place.size[0], right - left), mode=interpolation, antialias=True)
    small: Tensor = interpolate(part, place.size, mode=interpolation, antialias=True)
    result: NDArray[np.uint8] = small[0, :3].numpy()  # channels last in memory; the copy into the batch reorders it
    return result


def _four_channels(data: bytes) -> NDArray[np.uint8]:
    """Decodes a JPEG to [h, w, 4], which torch resizes in less time than three channels.

    This thread's next call overwrites the array, unless it is larger than `KEPT_BYTES`.
    """
    height, width, *_ = decode_jpeg_header(data)
    size = 4 * int(height) * int(width)
    if size > KEPT_BYTES:
        return np.asarray(decode_jpeg(data, colorspace="RGBA"))
    if not hasattr(_kept, "buffer"):
        _kept.buffer = np.empty(KEPT_BYTES, np.uint8)  # new memory for each photo would take a twentieth of the time
    return np.asarray(decode_jpeg(data, colorspace="RGBA", buffer=_kept.buffer[:size]))


def _is_unrotated(data: bytes) -> bool:
    """Says whether the bytes are a JPEG that has no segment APP1 (EXIF, XMP) before its first scan."""
    if data[:2] != b"\xff\xd8":
        return False
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF:
        if data[at + 1] == _SCAN:
            return True
        if data[at + 1] in (_APP1, 0xFF):  # 0xFF is a fill byte: Pillow finds out what follows it
            return False
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return False


def _oriented(photo: Tensor, orientation: int) -> Tensor:
    """Turns [h, w, c] upright: EXIF's orientations 5 to 8 are transposed, then all but 1 and 5 are mirrored."""
    if orientation >= 5:
        photo = photo.transpose(0, 1)
    flips = {2: [1], 3: [0, 1], 4: [0], 6: [1], 7: [0, 1], 8: [0]}.get(orientation)
    return (photo.flip(flips) if flips else photo).contiguous()
