"""Checks the masks of annotation files, which are polygons, run lengths or pictures of numbers, and then draws them."""

import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as coco_mask

from batchjob.data.decode import MAX_PIXELS
from batchjob.errors import UserError

MAX_INSTANCES = 2**15 - 1  # of an image; the store keeps owners as int16
REACH = 4.0  # how far a coordinate may lie outside of its image, in image sizes
MAX_OUTLINE_PX = 1e6  # pycocotools walks an outline in fifths of a pixel, and keeps 16 bytes a step
MAX_SIDE = 100_000.0  # in place of the size of an image whose size is not stated
_RLE_TEXT = re.compile(rb"[0-o]*")

Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels of the image
Polygon = NDArray[np.float64]  # x, y, x, y, …


class BadMask(Exception):
    """Raised for a mask that is not possible; the text is the cause that is counted."""


@dataclass(frozen=True, slots=True)
class Rle:
    """A mask as lengths of runs down the columns, background first; they add up to height × width."""

    height: int
    width: int
    counts: NDArray[np.int64]

    def mask(self) -> NDArray[np.uint8]:
        """Returns the mask as uint8 [height, width] of 0 and 1."""
        values = np.arange(len(self.counts)) % 2
        return np.repeat(values.astype(np.uint8), self.counts).reshape(self.width, self.height).T


@dataclass(frozen=True, slots=True)
class Painted:
    """The pixels of a picture that hold one number; COCO panoptic writes it as R + 256 G + 65536 B."""

    path: str
    number: int


Segment = Polygon | Rle | Painted


@dataclass(frozen=True, slots=True)
class Instance:
    """One annotated object.

    `segments` is empty where the mask is left out; `category` is −1 where it is not a possible one.
    """

    category: int
    crowd: bool
    box: Box | None
    segments: tuple[Segment, ...]


def mask_of(segments: Sequence[Segment], height: int, width: int) -> NDArray[np.uint8]:
    """Draws what the segments of an instance cover together; polygons are drawn by pycocotools.

    Parameters
    ----------
    segments
        Polygons and run lengths that were checked, or numbers in pictures.
    height, width
        Of the image in pixels.

    Returns
    -------
    uint8 [height, width] of 0 and 1.

    Raises
    ------
    UserError
        A picture of numbers can't be read, or is of another size.
    """
    whole = np.zeros((height, width), np.uint8)
    polygons = [p.tolist() for p in segments if isinstance(p, np.ndarray)]
    if polygons:
        whole |= coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(polygons, height, width)))
    for segment in segments:
        if isinstance(segment, Rle):
            whole |= segment.mask()
        elif isinstance(segment, Painted):
            numbers = _painted_numbers(segment.path)
            if numbers.shape != whole.shape:
                raise UserError(
                    f"{segment.path} is {numbers.shape[1]}x{numbers.shape[0]} pixels, and its annotations say "
                    f"{width}x{height}; give the pictures that belong to the annotations"
                )
            whole |= (numbers == segment.number).astype(np.uint8)
    return whole


def read_picture(path: str) -> NDArray[Any]:
    """Reads a PNG of numbers (palette, grey, 16 bits) as [height, width], or of colours as uint8 [height, width, 3].

    Raises UserError where it can't be read, or has more pixels than are decoded.
    """
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(path, formats=("PNG",)) as picture:
            if picture.width * picture.height > MAX_PIXELS:
                raise UserError(f"{path} has {picture.width}x{picture.height} pixels; at most {MAX_PIXELS} are read")
            return np.asarray(picture if picture.mode in ("L", "P", "1", "I", "I;16") else picture.convert("RGB"))
    except UserError:
        raise
    except Exception as error:  # Pillow raises a dozen kinds for a damaged PNG
        raise UserError(f"the masks of {path} can't be read ({error}); give the PNG again, or leave it out") from None


@lru_cache(maxsize=1)  # an image's instances are asked for one after another
def _painted_numbers(path: str) -> NDArray[np.int32]:
    """Returns the number of each pixel, int32 [height, width]: R + 256 G + 65536 B, or its value in a grey picture."""
    pixels = read_picture(path).astype(np.int32)
    return pixels if pixels.ndim == 2 else pixels[..., 0] + 256 * pixels[..., 1] + 65536 * pixels[..., 2]


def check_polygon(numbers: Sequence[float], height: int, width: int) -> Polygon | None:
    """Checks a polygon before pycocotools draws it.

    Parameters
    ----------
    numbers
        x, y, x, y, … in pixels of the image.
    height, width
        Of the image in pixels, 0 where they are not stated.

    Returns
    -------
    float64 [2 × points], or None for fewer than three points, which cover nothing.

    Raises
    ------
    BadMask
        A coordinate is missing, not finite or more than `REACH` image sizes outside of the image; or the outline is
        longer than `MAX_OUTLINE_PX`.
    """
    if len(numbers) % 2:
        raise BadMask("a polygon with an odd number of coordinates")
    if len(numbers) < 6:  # pycocotools takes a polygon of four numbers for a box
        return None
    points = np.array(numbers, np.float64)
    if not np.isfinite(points).all():
        raise BadMask("a polygon with a coordinate that is not a finite number")
    side = max(height, width) or MAX_SIDE
    if points.min() < -REACH * side or points.max() > (1 + REACH) * side:
        raise BadMask("a polygon that lies far outside of its image")
    x, y = points[0::2], points[1::2]
    steps = np.maximum(np.abs(x - np.roll(x, 1)), np.abs(y - np.roll(y, 1)))
    if steps.sum() > MAX_OUTLINE_PX:
        raise BadMask("a polygon whose outline is longer than a million pixels")
    return points


def check_rle(size: Sequence[int], counts: str | Sequence[int], height: int, width: int) -> Rle:
    """Checks run lengths, and unpacks them where they are text.

    Parameters
    ----------
    size
        [height, width] of the mask in pixels.
    counts
        The run lengths, or COCO's text of them.
    height, width
        As `check_polygon`.

    Returns
    -------
    The mask, whose lengths are int64 and not negative.

    Raises
    ------
    BadMask
        The mask has another size than the image, or more pixels than are decoded; a length is negative; the lengths
        don't add up to the size; or the text is damaged.
    """
    if len(size) != 2 or min(size) <= 0:
        raise BadMask("an RLE without a size")
    if height and width and tuple(size) != (height, width):
        raise BadMask("an RLE of another size than its image")
    if size[0] * size[1] > MAX_PIXELS:
        raise BadMask("an RLE of more pixels than are decoded")
    if len(counts) > 8 * size[0] * size[1] + 8:
        raise BadMask("an RLE that does not add up to its size")
    lengths = _unpack(counts) if isinstance(counts, str) else _whole_numbers(counts)
    if (lengths < 0).any() or (lengths > size[0] * size[1]).any() or lengths.sum() != size[0] * size[1]:
        raise BadMask("an RLE that does not add up to its size")
    return Rle(size[0], size[1], lengths)


def _whole_numbers(counts: Sequence[int]) -> NDArray[np.int64]:
    try:
        return np.array(counts, np.int64)
    except (OverflowError, ValueError, TypeError):
        raise BadMask("an RLE that does not add up to its size") from None


def _unpack(text: str) -> NDArray[np.int64]:
    """Returns the run lengths that COCO's text stands for.

    A letter holds 5 bits of a number, the lowest first. From the fourth number on, a number is the difference to the
    length two places before. Source: `rleFrString` of pycocotools, which reads past the end of a damaged text.
    """
    if text[:2] in ("b'", 'b"') and text[-1:] == text[1]:  # bytes as Python prints them
        text = text[2:-1].replace("\\\\", "\\")
    letters = text.encode("utf-8", "replace")
    if not letters or not _RLE_TEXT.fullmatch(letters):
        raise BadMask("an RLE with letters that none has")
    codes = np.frombuffer(letters, np.uint8).astype(np.int64) - 48
    ends = np.flatnonzero(codes & 0x20 == 0)
    if not len(ends) or ends[-1] != len(codes) - 1:
        raise BadMask("an RLE that is cut off")
    starts = np.concatenate([[0], ends[:-1] + 1])
    digits = ends - starts + 1
    if digits.max() > 7:  # 35 bits, more pixels than any image has
        raise BadMask("an RLE that does not add up to its size")
    place = np.arange(len(codes)) - np.repeat(starts, digits)
    lengths = np.add.reduceat((codes & 0x1F) << (5 * place), starts)
    lengths -= np.where(codes[ends] & 0x10, np.int64(1) << (5 * digits), 0)
    lengths[1::2] = np.cumsum(lengths[1::2])
    lengths[2::2] = np.cumsum(lengths[2::2])
    return lengths


def read_masks(
    instances: Sequence[Instance],
    height: int,
    width: int,
    wanted: NDArray[np.integer[Any]] | None = None,
    *,
    crowds: bool = False,
) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    """Draws the masks of an image's instances, one after another.

    Parameters
    ----------
    instances
        Of the image.
    height, width
        Of the image in pixels.
    wanted
        Numbers of the instances to draw; None for all.
    crowds
        Whether crowds are drawn too.

    Yields
    ------
    (number among `instances`, mask uint8 [height, width]) of each instance that covers a pixel.

    Raises
    ------
    UserError
        As `mask_of`.
    """
    numbers = None if wanted is None else set(wanted.tolist())
    for number, instance in enumerate(instances):
        is_wanted = (crowds or not instance.crowd) and (numbers is None or number in numbers)
        if is_wanted and instance.segments:
            mask = mask_of(instance.segments, height, width)
            if mask.any():
                yield number, mask
