"""Reads Pascal VOC's folders: SegmentationObject/STEM.png for the instances, SegmentationClass/ for the categories."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from batchjob.data.masks import MAX_INSTANCES, read_picture
from batchjob.errors import UserError

VOID = 255  # the border around objects, which belongs to none of them

# The development kit's own order, which SegmentationClass counts from 1. Other sets of this layout have more classes.
CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)
CATEGORIES = {0: "object"} | dict(enumerate(CLASSES, start=1)) | {n: str(n) for n in range(len(CLASSES) + 1, VOID)}


@dataclass(frozen=True, slots=True)
class File:
    """One segmented image: the stem of its name, its size in pixels, and the paths of its pictures.

    `classes` is empty where the image has no picture of classes.
    """

    stem: str
    height: int
    width: int
    objects: str
    classes: str


def find_root(folder: Path) -> Path | None:
    """Finds the folder that holds SegmentationObject/: the given one, its parent, or one up to two levels below it.

    Returns None where none of them holds it. The parent counts where the given folder is SegmentationObject/ itself.
    """
    if folder.name == "SegmentationObject":
        return folder.parent
    candidates = [folder, *sorted(folder.glob("*/")), *sorted(folder.glob("*/*/"))]
    return next((c for c in candidates if (c / "SegmentationObject").is_dir()), None)


def list_files(root: Path) -> list[File]:
    """Lists every segmented image of the folder, by name. Raises UserError where it has no PNG, or a damaged one."""
    files = []
    for path in sorted((root / "SegmentationObject").glob("*.png")):
        classes = root / "SegmentationClass" / path.name
        files.append(File(path.stem, *_png_size(path), str(path), str(classes) if classes.exists() else ""))
    if not files:
        raise UserError(f"{root}/SegmentationObject holds no PNG; give a VOC folder with segmentations")
    return files


def masks(objects_png: str, classes_png: str) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    """Reads the masks of an image's objects, in the order of their numbers.

    Parameters
    ----------
    objects_png
        Path of the picture whose pixels hold the number of their object.
    classes_png
        Path of the picture whose pixels hold the number of their class; empty for none.

    Yields
    ------
    (category, mask uint8 [height, width]) of each object. The category is the most frequent class of its pixels, 0
    where no class is drawn.

    Raises
    ------
    UserError
        A picture can't be read or holds colours, the two are of different sizes, or there are more than `MAX_INSTANCES`
        objects.
    """
    objects = _numbers(objects_png)
    classes = _numbers(classes_png) if classes_png else np.zeros_like(objects)
    if classes.shape != objects.shape:
        raise UserError(
            f"{classes_png} is {classes.shape[1]}x{classes.shape[0]} pixels, and {objects_png} "
            f"{objects.shape[1]}x{objects.shape[0]}; give the pictures that belong together"
        )
    found = np.unique(objects)
    if len(found) > MAX_INSTANCES:
        raise UserError(f"{objects_png} has {len(found)} objects; at most {MAX_INSTANCES} of an image are read")
    for number in found:
        if number in (0, VOID):
            continue
        mask = objects == number
        named = classes[mask]
        named = named[(named > 0) & (named != VOID)]
        yield int(np.bincount(named).argmax()) if len(named) else 0, mask.astype(np.uint8)


def _numbers(path: str) -> NDArray[np.integer[Any]]:
    found = read_picture(path)
    if found.ndim != 2:
        raise UserError(f"{path} is a picture of colours; VOC's hold numbers, of objects or classes: give those")
    return found


def _png_size(path: Path) -> tuple[int, int]:
    with path.open("rb") as file:  # the header alone: thousands of files are listed
        header = file.read(24)
    if header[:8] != b"\x89PNG\r\n\x1a\n":
        raise UserError(f"{path} is not a PNG; give VOC's own SegmentationObject files")
    return int.from_bytes(header[20:24], "big"), int.from_bytes(header[16:20], "big")
