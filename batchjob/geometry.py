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

    def patch_weights(self, height: int, width: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Box-filter weights [rows, height] and [columns, width]: `rows @ mask @ columns.T` is the area average.

        Exact for any scale. Weights of a patch sum to 1, or to its share inside the content where it is padded.
        """
        left, top, right, bottom = self.source_box(height, width)
        content = self.content_size(height, width)
        return (
            _overlaps(height, top, bottom, content[0], self.height, self.patch_height),
            _overlaps(width, left, right, content[1], self.width, self.patch_width),
        )

    def pool(self, mask: NDArray[np.generic]) -> NDArray[np.float32]:
        """[rows, columns]: the exact area average of a [height, width] mask of the source over each patch."""
        rows, columns = self.patch_weights(*mask.shape)
        return np.asarray(rows @ mask.astype(np.float32) @ columns.T)

    def to_json(self) -> dict[str, object]:
        """The fields, for `plan.json` and the store's attributes."""
        return {name: getattr(self, name) for name in self.__slots__}


def _share_inside(content_px: int, input_px: int, patch_px: int) -> NDArray[np.float64]:
    starts = np.arange(input_px // patch_px) * patch_px
    return np.clip(content_px - starts, 0, patch_px) / patch_px


def _overlaps(
    source_px: int, low: float, high: float, content_px: int, input_px: int, patch_px: int
) -> NDArray[np.float32]:
    scale = (high - low) / content_px  # source pixels an input pixel
    starts = low + np.arange(input_px // patch_px)[:, None] * patch_px * scale
    ends = np.minimum(starts + patch_px * scale, high)
    pixels = np.arange(source_px)[None, :]
    covered = np.clip(np.minimum(ends, pixels + 1) - np.maximum(starts, pixels), 0, None)
    return np.asarray(covered / (patch_px * scale), dtype=np.float32)
