"""Pascal VOC's segmentation folders: SegmentationObject/STEM.png, and SegmentationClass/ for the categories."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from batchjob.errors import UserError

VOID = 255  # the border around objects; it belongs to nobody

# The development kit's own order, which SegmentationClass counts from 1.
CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)


@dataclass(frozen=True, slots=True)
class File:
    """One segmented image: its stem, size in pixels and paths; `classes` is empty where there is none."""

    stem: str
    height: int
    width: int
    objects: str
    classes: str


def find_root(folder: Path) -> Path | None:
    """The folder that holds SegmentationObject/: the given one, its parent, or one of two levels below; else None."""
    if folder.name == "SegmentationObject":
        return folder.parent
    candidates = [folder, *sorted(folder.glob("*/")), *sorted(folder.glob("*/*/"))]
    return next((c for c in candidates if (c / "SegmentationObject").is_dir()), None)


def list_files(root: Path) -> list[File]:
    """Every segmented image of the folder, by name. Raises UserError where there is none."""
    files = []
    for path in sorted((root / "SegmentationObject").glob("*.png")):
        classes = root / "SegmentationClass" / path.name
        files.append(File(path.stem, *_png_size(path), str(path), str(classes) if classes.exists() else ""))
    if not files:
        raise UserError(f"{root}/SegmentationObject holds no PNG; give a VOC folder with segmentations")
    return files


def masks(objects_png: str, classes_png: str) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    """(category, mask uint8 [height, width]) of every object, by its number; category 0 where no class is drawn."""
    from PIL import Image

    objects = np.asarray(Image.open(objects_png))
    classes = np.asarray(Image.open(classes_png)) if classes_png else np.zeros_like(objects)
    for number in np.unique(objects):
        if number in (0, VOID):
            continue
        mask = objects == number
        named = classes[mask]
        named = named[(named > 0) & (named != VOID)]
        yield int(np.bincount(named).argmax()) if len(named) else 0, mask.astype(np.uint8)


def _png_size(path: Path) -> tuple[int, int]:
    with path.open("rb") as file:  # the header alone: thousands of files are listed
        header = file.read(24)
    if header[:8] != b"\x89PNG\r\n\x1a\n":
        raise UserError(f"{path} is no PNG; give VOC's own SegmentationObject files")
    return int.from_bytes(header[20:24], "big"), int.from_bytes(header[16:20], "big")
