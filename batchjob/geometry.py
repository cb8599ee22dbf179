"""From a photo's pixels to the model's input and its patch grid: one mapping for images, masks and figures."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Resize = Literal["squash", "crop", "pad"]


@dataclass(frozen=True, slots=True)
class Geometry:
    """Where each source pixel lands in the model's input.

    A source box (floats, in source pixels) is resized to a content area (integers, in input pixels) whose top left
    corner is the input's. `squash` takes the whole image to the whole input, `crop` the largest centred box of the
    input's aspect ratio, `pad` the whole image to the largest area of its own aspect ratio; the rest is padding.
    """

    height: int  # of the model's input, pixels
    width: int
    patch_height: int  # pixels of the input a patch covers
    patch_width: int
    resize: Resize = "squash"

    @property
    def grid(self) -> tuple[int, int]:
        """Patches as (rows, columns)."""
        return self.height // self.patch_height, self.width // self.patch_width

    def source_box(self, height: int, width: int) -> tuple[float, float, float, float]:
        """(left, top, right, bottom) of what is taken from a `height` × `width` image, in its pixels."""
        if self.resize != "crop":
            return 0.0, 0.0, float(width), float(height)
        scale = max(self.height / height, self.width / width)
        box_height, box_width = self.height / scale, self.width / scale
        top, left = (height - box_height) / 2, (width - box_width) / 2
        return left, top, left + box_width, top + box_height

    def content_size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) in input pixels of the area that the image fills, at least one pixel each."""
        if self.resize != "pad":
            return self.height, self.width
        scale = min(self.height / height, self.width / width)
        return (
            min(self.height, max(1, round(height * scale))),
            min(self.width, max(1, round(width * scale))),
        )

    def content_patches(self, height: int, width: int) -> NDArray[np.bool_]:
        """bool [rows, columns]: patches of which at least half is image rather than padding."""
        content = self.content_size(height, width)
        rows = _share_inside(content[0], self.height, self.patch_height)
        columns = _share_inside(content[1], self.width, self.patch_width)
        return np.asarray(np.outer(rows, columns) >= 0.5)

    def content_shape(self, height: int, width: int) -> int:
        """A number that is equal for images of which the same patches are image rather than padding; 0 if unpadded."""
        if self.resize != "pad" or not (height and width):
            return 0
        content = self.content_patches(height, width)
        return int(content.any(axis=1).sum()) * (self.grid[1] + 1) + int(content.any(axis=0).sum())

    def patch_lengths(self, height: int, width: int) -> tuple[NDArray[np.float64], NDArray[np.float64], float]:
        """How far each pixel reaches into each patch: rows [R, height], columns [C, width], and a patch's area.

        `rows @ mask @ columns.T / area` is the area average of a mask over each patch. A patch that lies partly in the
        padding is covered by at most its other part. Lengths are whole numbers of steps, each the smallest power of
        two of a pixel (2⁻²⁰ where a patch has 1,200 pixels) for which all sums over a binary mask stay below 2⁵³:
        float64 holds them exactly, so they are the same on every machine and for any number of threads.
        """
        left, top, right, bottom = self.source_box(height, width)
        content_height, content_width = self.content_size(height, width)
        patch_rows = (bottom - top) / content_height * self.patch_height  # pixels of the image that a patch is high
        patch_columns = (right - left) / content_width * self.patch_width
        steps = 2**30
        while patch_rows * patch_columns * steps**2 > 2**52:
            steps //= 2
        return (
            _lengths(height, (top, bottom), patch_rows, self.grid[0], steps),
            _lengths(width, (left, right), patch_columns, self.grid[1], steps),
            float(np.rint(patch_rows * steps) * np.rint(patch_columns * steps)),
        )

    def pool(self, mask: NDArray[np.generic]) -> NDArray[np.float64]:
        """[rows, columns]: the exact area average of a [height, width] mask of the source over each patch."""
        rows, columns, area = self.patch_lengths(*mask.shape)
        return np.asarray(rows @ mask.astype(np.float64) @ columns.T / area)

    def to_json(self) -> dict[str, object]:
        """The fields, for `plan.json` and the store's attributes."""
        return {name: getattr(self, name) for name in self.__slots__}


def _share_inside(content_px: int, input_px: int, patch_px: int) -> NDArray[np.float64]:
    starts = np.arange(input_px // patch_px) * patch_px
    return np.clip(content_px - starts, 0, patch_px) / patch_px


def _lengths(
    source_px: int, box: tuple[float, float], patch_px: float, patches: int, steps: int
) -> NDArray[np.float64]:
    """[patches, source_px]: steps of each source pixel that lie inside each patch, and inside the box."""
    edges = np.rint(np.minimum(box[0] + np.arange(patches + 1) * patch_px, box[1]) * steps)
    pixels = np.arange(source_px + 1, dtype=np.float64) * steps
    ends = np.minimum(edges[1:, None], pixels[None, 1:])
    return np.asarray(np.clip(ends - np.maximum(edges[:-1, None], pixels[None, :-1]), 0, None))
