"""The mapping from an image's pixels to the model's input and its patch grid, for images, masks and figures."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Resize = Literal["squash", "crop", "pad"]


@dataclass(frozen=True, slots=True)
class Geometry:
    """Where each pixel of an image lands in the model's input.

    A box of the image (floats, in its pixels) is resized to a content area (integers, in pixels of the input), whose
    top left corner is that of the input. `squash` takes the whole image to the whole input. `crop` takes the largest
    centred box that has the input's aspect ratio. `pad` takes the whole image to the largest area that has the image's
    aspect ratio; the rest of the input is padding.
    """

    height: int  # of the model's input, in pixels
    width: int
    patch_height: int  # of a patch, in pixels of the input
    patch_width: int
    resize: Resize = "squash"

    @property
    def grid(self) -> tuple[int, int]:
        """The number of patches as (rows, columns)."""
        return self.height // self.patch_height, self.width // self.patch_width

    def source_box(self, height: int, width: int) -> tuple[float, float, float, float]:
        """Finds the box of an image that is taken for the input.

        Parameters
        ----------
        height, width
            Of the image, in pixels.

        Returns
        -------
        (left, top, right, bottom) in pixels of the image.
        """
        if self.resize != "crop":
            return 0.0, 0.0, float(width), float(height)
        scale = max(self.height / height, self.width / width)
        box_height, box_width = self.height / scale, self.width / scale
        top, left = (height - box_height) / 2, (width - box_width) / 2
        return left, top, left + box_width, top + box_height

    def content_size(self, height: int, width: int) -> tuple[int, int]:
        """Finds the area of the input that the image fills.

        Parameters
        ----------
        height, width
            Of the image, in pixels.

        Returns
        -------
        (height, width) in pixels of the input, at least 1 each.
        """
        if self.resize != "pad":
            return self.height, self.width
        scale = min(self.height / height, self.width / width)
        return (
            min(self.height, max(1, round(height * scale))),
            min(self.width, max(1, round(width * scale))),
        )

    def content_patches(self, height: int, width: int) -> NDArray[np.bool_]:
        """Finds the patches of which at least half is image rather than padding.

        Parameters
        ----------
        height, width
            Of the image, in pixels.

        Returns
        -------
        bool [rows, columns].
        """
        content = self.content_size(height, width)
        rows = _share_inside(content[0], self.height, self.patch_height)
        columns = _share_inside(content[1], self.width, self.patch_width)
        return np.asarray(np.outer(rows, columns) >= 0.5)

    def content_shape(self, height: int, width: int) -> int:
        """Gives a number that is equal for images whose content covers the same patches (`content_patches`).

        Parameters
        ----------
        height, width
            Of the image, in pixels; 0 where they are not known.

        Returns
        -------
        The number; 0 without padding, and for an image of unknown size.
        """
        if self.resize != "pad" or not (height and width):
            return 0
        content = self.content_patches(height, width)
        return int(content.any(axis=1).sum()) * (self.grid[1] + 1) + int(content.any(axis=0).sum())

    def patch_lengths(self, height: int, width: int) -> tuple[NDArray[np.float64], NDArray[np.float64], float]:
        """Measures how far each pixel of an image reaches into each patch.

        Parameters
        ----------
        height, width
            Of the image, in pixels.

        Returns
        -------
        Lengths of the overlap with each row of patches [R, height] and each column of patches [C, width] in steps, and
        the area of a patch in squared steps. `rows @ mask @ columns.T / area` is the average of a mask [height, width]
        over each patch; padding counts as a part of the patch that no mask covers.

        Notes
        -----
        Lengths are whole numbers of steps. A step is the smallest power of two of a pixel (2⁻²⁰ where a patch has 1,200
        pixels), and not below 2⁻³⁰, for which all sums over a binary mask stay below 2⁵³. float64 holds such sums
        exactly, so they are the same on every machine and for any number of threads.
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
        """float64 [rows, columns]: the exact area average over each patch of a mask [height, width] of the image."""
        rows, columns, area = self.patch_lengths(*mask.shape)
        return np.asarray(rows @ mask.astype(np.float64) @ columns.T / area)

    def to_json(self) -> dict[str, object]:
        """The fields by name, for `plan.json` and the store's attributes."""
        return {name: getattr(self, name) for name in self.__slots__}


def _share_inside(content_px: int, input_px: int, patch_px: int) -> NDArray[np.float64]:
    """[patches]: the share of each patch along one axis that lies in the content."""
    starts = np.arange(input_px // patch_px) * patch_px
    return np.clip(content_px - starts, 0, patch_px) / patch_px


def _lengths(
    source_px: int, box: tuple[float, float], patch_px: float, patches: int, steps: int
) -> NDArray[np.float64]:
    """[patches, source_px]: how many steps of each pixel lie inside each patch and inside the box, along one axis."""
    edges = np.rint(np.minimum(box[0] + np.arange(patches + 1) * patch_px, box[1]) * steps)
    pixels = np.arange(source_px + 1, dtype=np.float64) * steps
    ends = np.minimum(edges[1:, None], pixels[None, 1:])
    return np.asarray(np.clip(ends - np.maximum(edges[:-1, None], pixels[None, :-1]), 0, None))
