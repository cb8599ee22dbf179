"""Decodes one image: turns the bytes of a file into the model's uint8 input, or says why that is not possible.

Pillow is the reference; docs/input.md says what becomes of each kind of image.
"""

import io
import math
import os
import warnings
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

# Imported for their effect: `Image.open(formats=...)` knows only the plugins that are loaded.
from PIL import (  # noqa: F401
    AvifImagePlugin,
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageOps,
    Jpeg2KImagePlugin,
    JpegImagePlugin,
    MpoImagePlugin,
    PngImagePlugin,
    PpmImagePlugin,
    TiffImagePlugin,
    UnidentifiedImageError,
    WebPImagePlugin,
)

from batchjob.data import extra_formats
from batchjob.data.quiet import quiet
from batchjob.data.reading import ReadFailure, one_line, read_file
from batchjob.geometry import Geometry

FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "AVIF", "JPEG2000", "PPM")  # not EPS, which runs programs
MAX_PIXELS = 89_478_485  # above this, Pillow warns of a decompression bomb; it is 268 MB as RGB
RESAMPLE = {name.lower(): Image.Resampling[name] for name in Image.Resampling.__members__}
RGB = tuple[int, int, int]
Box = tuple[float, float, float, float]


@dataclass(frozen=True, slots=True)
class Decoded:
    """The model's input, RGB as uint8 [3, H, W], and the photo's own size in pixels after the EXIF rotation."""

    pixels: NDArray[np.uint8]
    height: int
    width: int


@dataclass(frozen=True, slots=True)
class Placing:
    """Which part of one photo is resized to which size: what `Geometry` says, in the numbers that a resize needs."""

    hull: tuple[int, int, int, int]  # left, top, right, bottom: whole pixels around the source box
    box: Box  # the source box, measured from the hull's corner
    size: tuple[int, int]  # height, width of the content area in the input

    @property
    def is_whole(self) -> bool:
        """Whether the box is the whole hull, so that a crop to whole pixels and a plain resize are enough."""
        left, top, right, bottom = self.hull
        return self.box == (0, 0, right - left, bottom - top)

    @property
    def is_vertical_first(self) -> bool:
        """Whether the vertical pass of the resize comes first; between the two passes, pixels are rounded to bytes.

        This is Pillow's rule since 13.0 (`ImagingResampleInner` in its Resample.c). It is computed here, so that older
        versions of Pillow and other resizers give the same pixels.
        """
        left, top, right, bottom = self.hull
        less_rows, less_columns = bottom - top - self.size[0], right - left - self.size[1]
        return less_rows > 0 and less_rows > 2 * less_columns


class Accelerator(Protocol):
    """A decoder that takes ordinary JPEGs in Pillow's place. Where it returns None, Pillow decodes the image."""

    def plain_size(self, data: bytes) -> tuple[int, int] | None:
        """Returns (height, width) in pixels of a JPEG in colour or grey that needs no rotation, else None."""

    def pixels(self, data: bytes, orientation: int, place: Placing, interpolation: str) -> NDArray[np.uint8] | None:
        """Decodes a JPEG in colour or grey, turns it upright and resizes it.

        Parameters
        ----------
        data
            The bytes of the file.
        orientation
            EXIF's, from 1 (upright) to 8.
        place
            Of the upright photo.
        interpolation
            As `decode`.

        Returns
        -------
        uint8 [3, h, w] of the size `place.size`, or None.
        """


def decode(
    data: bytes | str | os.PathLike[str],
    geometry: Geometry,
    fill: RGB,
    *,
    interpolation: str = "bicubic",
    accelerate: Accelerator | None = None,
) -> Decoded:
    """Decodes an image, and fits it to the model's input.

    Parameters
    ----------
    data
        The bytes of an image file, or its path.
    geometry
        The size of the input in pixels, and how the photo is fitted to it.
    fill
        Red, green and blue from 0 to 255, behind transparent pixels and in the padding.
    interpolation
        The filter of the resize, a name of `RESAMPLE`.
    accelerate
        What takes ordinary JPEGs in Pillow's place; None: Pillow decodes them too.

    Raises
    ------
    ReadFailure
        The image gives no pixels. Nothing else is raised, whatever the bytes are.
    """
    if not isinstance(data, bytes):
        data = read_file(os.fsencode(data))
    try:
        return _decode(data, geometry, fill, interpolation, accelerate)
    except ReadFailure:
        raise
    except MemoryError:
        raise ReadFailure("too_large", f"the memory did not suffice to decode its {len(data)} bytes") from None
    except Exception as error:  # a damaged file makes decoders raise a dozen kinds; one must not end a run of millions
        if "MAX_TEXT_" in str(error):  # Pillow's guards against text chunks that unpack to gigabytes
            raise ReadFailure("too_large", one_line(error)) from None
        reason = one_line(": ".join([str(error), *getattr(error, "__notes__", ())]))
        if any(words in str(error).lower() for words in ("unsupported", "not supported", "unknown compression")):
            raise ReadFailure("unsupported", f"a kind of its format that is not read: {reason}") from None
        raise ReadFailure("truncated", f"cut off or damaged: {reason}") from None


def placing(geometry: Geometry, height: int, width: int) -> Placing:
    """Works out which part of a photo is resized to which size.

    Parameters
    ----------
    geometry
        The size of the input, and how the photo is fitted to it.
    height, width
        Of the photo in pixels, after the EXIF rotation.

    Returns
    -------
    A hull inside the photo, the box that is measured from its corner, and the size in pixels of the input.
    """
    box = geometry.source_box(height, width)
    left, top, right, bottom = (round(v, 6) for v in box)  # 0.1 + 0.2 must not widen the hull by a pixel
    x0, y0 = max(0, math.floor(left)), max(0, math.floor(top))
    x1, y1 = min(width, math.ceil(right)), min(height, math.ceil(bottom))
    inner = (max(left - x0, 0.0), max(top - y0, 0.0), min(right, x1) - x0, min(bottom, y1) - y0)
    return Placing((x0, y0, x1, y1), inner, geometry.content_size(height, width))


def resize(image: Image.Image, place: Placing, interpolation: str) -> NDArray[np.uint8]:
    """Resizes the part of an image that `place` names.

    Parameters
    ----------
    image
        RGB and upright.
    place
        From `placing`. Pixels outside of its hull have no influence.
    interpolation
        A name of `RESAMPLE`.

    Returns
    -------
    uint8 [3, h, w] of the size `place.size`.
    """
    if place.hull != (0, 0, *image.size):
        image = image.crop(place.hull)
    (height, width), (left, top, right, bottom), filter = place.size, place.box, RESAMPLE[interpolation]
    if place.is_vertical_first:
        image = image.resize((image.width, height), filter, box=(0, top, image.width, bottom))
        top, bottom = 0, height
    small = image.resize((width, height), filter, box=(left, top, right, bottom))
    return np.ascontiguousarray(np.asarray(small).transpose(2, 0, 1))


def _decode(data: bytes, geometry: Geometry, fill: RGB, interpolation: str, accelerate: Accelerator | None) -> Decoded:
    plain = accelerate.plain_size(data) if accelerate is not None else None
    if accelerate is not None and plain is not None:
        place = _place(*plain, geometry)
        content = accelerate.pixels(data, 1, place, interpolation)
        if content is not None:
            return _on_canvas(content, *plain, geometry, fill)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's notes on odd metadata; bombs are judged by `_check_pixels`
        return _open_and_decode(data, geometry, fill, interpolation, None if plain is not None else accelerate)


def _open_and_decode(
    data: bytes, geometry: Geometry, fill: RGB, interpolation: str, accelerate: Accelerator | None
) -> Decoded:
    """Decodes what Pillow has to look at. Pillow reads the metadata; `accelerate` the pixels of ordinary JPEGs."""
    image = _open(data)
    _check_pixels(*image.size[::-1])
    if image.format in ("JPEG", "MPO"):
        orientation = _orientation(image)
        size = _upright_size(image, orientation)
        place = _place(*size, geometry)
        if accelerate is not None and image.mode in ("RGB", "L"):
            content = accelerate.pixels(data, orientation, place, interpolation)
            if content is not None:
                return _on_canvas(content, *size, geometry, fill)
    _load(image)  # before the orientation is asked for: of a TIFF, Pillow turns the pixels itself
    orientation = _orientation(image)
    size = _upright_size(image, orientation)
    content = resize(_to_rgb(_orient(image, orientation), fill), _place(*size, geometry), interpolation)
    return _on_canvas(content, *size, geometry, fill)


def _load(image: Image.Image) -> None:
    """Decodes the pixels. The line that a C library writes to the terminal meanwhile becomes a note of the error."""
    try:
        with quiet() as said:
            image.load()
    except Exception as error:  # raised again with the library's line, whatever it is
        if said.line:
            error.add_note(said.line)
        raise


def _upright_size(image: Image.Image, orientation: int) -> tuple[int, int]:
    """Returns (height, width) after the rotation."""
    return image.size if orientation >= 5 else image.size[::-1]


def _place(height: int, width: int, geometry: Geometry) -> Placing:
    """Returns the placing of a photo. Raises ReadFailure where it has too many pixels, none, or too few when padded."""
    _check_pixels(height, width)
    if geometry.resize == "pad" and geometry.content_patches(height, width).sum() < 2:
        raise ReadFailure("degenerate", f"{width}×{height} pixels, padded, fill less than two patches")
    return placing(geometry, height, width)


def _on_canvas(content: NDArray[np.uint8], height: int, width: int, geometry: Geometry, fill: RGB) -> Decoded:
    if content.shape[1:] == (geometry.height, geometry.width):
        return Decoded(content, height, width)
    canvas = np.empty((3, geometry.height, geometry.width), np.uint8)
    canvas[:] = np.array(fill, np.uint8)[:, None, None]
    canvas[:, : content.shape[1], : content.shape[2]] = content
    return Decoded(canvas, height, width)


def _open(data: bytes) -> Image.Image:
    if not data:
        raise ReadFailure("not_an_image", "empty file")
    extra = extra_formats.format_of(data)
    if extra == "JXL" and (size := extra_formats.jxl_size(data)):
        _check_pixels(*size)  # its package decodes as it opens
    try:
        return Image.open(io.BytesIO(data), formats=(extra,) if extra else FORMATS)
    except UnidentifiedImageError:
        raise ReadFailure("not_an_image", f"no image format that is read; it starts with {data[:16]!r}") from None
    except Image.DecompressionBombError as error:
        raise ReadFailure("too_large", one_line(error)) from None
    except Exception as error:  # Pillow's openers raise what they like where a header ends early
        if len(data) > 64:  # more than a header: `decode` says what is wrong
            raise
        raise ReadFailure("not_an_image", f"nothing but the beginning of a header: {one_line(error)}") from None


def _check_pixels(height: int, width: int) -> None:
    if height * width > MAX_PIXELS:
        raise ReadFailure("too_large", f"{width}×{height} pixels; at most {MAX_PIXELS} are decoded")
    if height * width == 0:
        raise ReadFailure("degenerate", f"{width}×{height} pixels")


def _orientation(image: Image.Image) -> int:
    if image.format == "JXL" and not getattr(image, "jpeg", None):
        return 1  # the codestream's own orientation counts, which its decoder has applied
    try:
        value = image.getexif().get(0x0112, 1)
    except Exception:  # Pillow parses metadata without checks; a photo with damaged EXIF is still read
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _orient(image: Image.Image, orientation: int) -> Image.Image:
    return image.transpose(_TRANSPOSE[orientation]) if orientation in _TRANSPOSE else image


def _to_rgb(image: Image.Image, fill: RGB) -> Image.Image:
    """Returns the image as 8-bit RGB, laid on `fill` where it is transparent.

    `convert("RGB")` alone would turn 16-bit images white and drop the alpha.
    """
    transparent = image.info.get("transparency")
    if image.mode in ("I;16", "I;16L", "I;16B", "I;16N", "I", "F"):
        values = np.asarray(image)
        grey = Image.fromarray(_to_8_bits(values, is_16_bit=image.mode.startswith("I;16") or image.format == "PPM"))
        if isinstance(transparent, int):
            grey.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
        image = grey
    elif image.mode == "RGB" and transparent is None:
        return image
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or image.info.get("transparency") is not None:
        over = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", over.size, (*fill, 255)), over).convert("RGB")
    return image.convert("RGB")


def _to_8_bits(values: NDArray[np.generic], *, is_16_bit: bool) -> NDArray[np.uint8]:
    """Returns the high byte of 16-bit values; stretches 32-bit integers and floats from their least to their greatest.

    The range of the latter is not stated anywhere.
    """
    if is_16_bit:
        return (values.astype(np.uint32) >> 8).astype(np.uint8)
    numbers = values.astype(np.float64)
    finite = np.isfinite(numbers)
    if not finite.any():
        raise ReadFailure("degenerate", "no pixel of it is a finite number")
    low, high = float(numbers[finite].min()), float(numbers[finite].max())
    scaled = (np.where(finite, numbers, low) - low) * (255 / (high - low) if high > low else 0.0)
    return np.asarray(np.rint(scaled), np.uint8)
