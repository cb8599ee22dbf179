"""Annotations to patches: COCO JSON (polygons, both kinds of RLE) or VOC folders, through the image's own geometry."""

import glob
import json
import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from batchjob.data import voc
from batchjob.errors import UserError
from batchjob.geometry import Geometry

MIN_PATCHES = 2  # an instance that owns fewer is left out: the grid is too coarse for it
COVERAGE_STEPS = 100_000  # coverage is rounded to 5 decimals before it is compared


@dataclass(frozen=True, slots=True)
class Instance:
    """One annotated object. `segments` holds polygons (flat x, y arrays), or one compressed RLE, or nothing."""

    category: int
    crowd: bool
    box: tuple[float, float, float, float] | None  # left, top, right, bottom in source pixels
    segments: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class ImageAnnotations:
    """What is known about one image; `height` and `width` are 0 where the file does not say them."""

    key: str
    height: int
    width: int
    instances: tuple[Instance, ...] = ()
    voc_objects: str = ""  # the SegmentationObject PNG, read when it is needed
    voc_classes: str = ""

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) as the file says it. Raises UserError where it does not."""
        if sizes := self._sizes():
            return sizes[0]
        raise UserError(f"the annotations of {self.key} have neither height nor width; add them to `images`")

    def fits(self, height: int, width: int) -> bool:
        """Whether the annotation was drawn on an image of this size (after the EXIF rotation)."""
        return all(size == (height, width) for size in self._sizes())

    def _sizes(self) -> list[tuple[int, int]]:
        said = [(self.height, self.width)] if self.height and self.width else []
        rles = [s for instance in self.instances for s in instance.segments if isinstance(s, dict)]
        return said + [(int(rle["size"][0]), int(rle["size"][1])) for rle in rles]


@dataclass(frozen=True, slots=True)
class PatchInstances:
    """The instances of one image on its patch grid; m of them own at least `MIN_PATCHES` patches."""

    owner: NDArray[np.int16]  # [P] index into the m instances, -1 where none covers half of the patch
    category: NDArray[np.int32]  # [m]
    coverage: NDArray[np.float32]  # [m, P] share of each patch that the instance covers
    boxes: NDArray[np.float32]  # [m, 4] left, top, right, bottom in pixels of the model's input
    total: int  # instances that are not crowds, before the small ones were left out
    index: NDArray[np.int32]  # [m] which of the image's masks each is: the same on every grid

    def only(self, wanted: NDArray[np.integer[Any]]) -> "PatchInstances":
        """The same without the instances whose `index` is not in `wanted`; their patches are nobody's."""
        kept = np.flatnonzero(np.isin(self.index, wanted))
        renumber = np.full(len(self.index) + 1, -1, np.int16)  # the last entry answers for -1
        renumber[kept] = np.arange(len(kept))
        return PatchInstances(
            owner=renumber[self.owner],
            category=self.category[kept],
            coverage=self.coverage[kept],
            boxes=self.boxes[kept],
            total=self.total,
            index=self.index[kept],
        )

    @property
    def area(self) -> NDArray[np.float32]:
        """[m] in patches, the parts of patches counted."""
        return np.asarray(self.coverage.sum(axis=1, dtype=np.float32))


@dataclass(slots=True)
class Annotations:
    """All annotations of a data set, found by an image's id: `image("val2017/000000000139.jpg")`."""

    source: str
    categories: dict[int, str]
    _images: dict[str, ImageAnnotations] = field(default_factory=dict)
    _by_name: dict[str, str | None] = field(default_factory=dict)  # base name, stem, id -> key; None: not unique

    def __len__(self) -> int:
        return len(self._images)

    def __iter__(self) -> Iterator[ImageAnnotations]:
        return iter(self._images.values())

    def add(self, image: ImageAnnotations, *aliases: str) -> None:
        """Files one image under its key (its path) and, where no other has them, under shorter names."""
        if image.key in self._images:
            raise UserError(f"{self.source} names the image {image.key!r} twice; give every image one entry")
        self._images[image.key] = image
        path = PurePosixPath(image.key)
        for name in {path.name, path.stem, *aliases} - {image.key}:
            self._by_name[name] = None if name in self._by_name else image.key

    def image(self, image_id: str) -> ImageAnnotations | None:
        """The annotations of a row, by its path or the end of it, its file name, its stem or its COCO id; else None.

        A shorter name that two annotated images share joins neither.
        """
        parts = PurePosixPath(image_id).parts
        for start in range(len(parts)):
            found = self._images.get("/".join(parts[start:]))
            if found is not None:
                return found
        path = PurePosixPath(image_id)
        for name in (path.name, path.stem):
            key = self._by_name.get(name) or (name if name in self._images else None)
            if key is not None:
                return self._images[key]
        return None


def open_annotations(path: str | os.PathLike[str]) -> Annotations:
    """The annotations of a COCO JSON, several of them (joined by commas), a COCO root or a VOC folder.

    Raises UserError where there are none, or the file is not what it should be.
    """
    text = os.fspath(path)
    files = [text] if os.path.exists(text) else [p for p in text.split(",") if p]
    if len(files) == 1 and os.path.isdir(files[0]):
        root = voc.find_root(Path(files[0]))
        if root is not None:
            return _open_voc(root)
        found = glob.glob(os.path.join(glob.escape(files[0]), "**", "instances_*.json"), recursive=True)
        if not found:
            raise UserError(
                f"the folder {text} holds neither SegmentationObject/ (VOC) nor instances_*.json (COCO); "
                "name the JSON file"
            )
        files = sorted(found)
    annotations = Annotations(source=text, categories={})
    for file in files:
        _read_coco(file, annotations)
    if not len(annotations):
        raise UserError(f"{text} annotates no image; give a file with `images` and `annotations`")
    return annotations


def instances_on_grid(ann: ImageAnnotations, geometry: Geometry, height: int, width: int) -> PatchInstances:
    """The instances of a `height` × `width` image on the patch grid: a patch's owner covers it most, and at least half.

    Of instances that cover a patch equally, to 5 decimals, the one of the smaller mask (in pixels of the image) owns
    it, since it lies in front; then the earlier one. Coverage is a quotient of whole numbers, so the owners are the
    same on every machine. Crowds are no instances; those that own fewer than `MIN_PATCHES` patches are left out.

    Raises
    ------
    ValueError
        The annotation was drawn on an image of another size.
    """
    if not ann.fits(height, width):
        raise ValueError(f"{ann.key}: annotated at {ann.height}x{ann.width}, the image is {height}x{width}")
    lengths = geometry.patch_lengths(height, width)
    patches = geometry.grid[0] * geometry.grid[1]
    found = [(c, box, m) for c, box, m in _masks(ann, height, width) if m.any()]
    coverage = np.zeros((len(found), patches), np.float32)
    boxes = np.zeros((len(found), 4), np.float32)
    for i, (_, box, mask) in enumerate(found):
        coverage[i], extent = _pool(mask, lengths)
        boxes[i] = _to_input(box or extent, geometry, height, width)
    owner = find_owners(coverage, np.array([np.count_nonzero(mask) for _, _, mask in found], np.int64))
    owned = np.bincount(owner[owner >= 0], minlength=len(found))
    everything = PatchInstances(
        owner=owner,
        category=np.array([category for category, _, _ in found], np.int32),
        coverage=coverage,
        boxes=boxes,
        total=sum(not i.crowd for i in ann.instances) if not ann.voc_objects else len(found),
        index=np.arange(len(found), dtype=np.int32),
    )
    return everything.only(np.flatnonzero(owned >= MIN_PATCHES))


def find_owners(coverage: NDArray[np.floating[Any]], area: NDArray[np.integer[Any]]) -> NDArray[np.int16]:
    """int16 [P]: the instance that covers each patch most, −1 where none covers half of it.

    Parameters
    ----------
    coverage
        [m, P] share of each patch that each instance covers, rounded to 5 decimals.
    area
        [m] of each instance; of equal coverage the smaller owns the patch, of equal areas the earlier.
    """
    if not len(coverage):
        return np.full(coverage.shape[1], -1, np.int16)
    front_first = np.argsort(area, kind="stable")
    best = front_first[coverage[front_first].argmax(axis=0)]  # argmax takes the first of equals
    return np.where(coverage.max(axis=0) >= 0.5, best, -1).astype(np.int16)


def k_instances(owner: NDArray[np.integer[Any]]) -> int:
    """1 + the number of instances that own at least 2 patches, clipped to [2, 16]: the study's rule for k."""
    counts = np.bincount(owner[owner >= 0].astype(np.int64)) if (owner >= 0).any() else np.zeros(1, np.int64)
    return int(np.clip(1 + (counts >= MIN_PATCHES).sum(), 2, 16))


def _pool(
    mask: NDArray[np.uint8], lengths: tuple[NDArray[np.float64], NDArray[np.float64], float]
) -> tuple[NDArray[np.float64], tuple[float, float, float, float]]:
    """[P] coverage of the patches by a mask, to 5 decimals, computed in the mask's bounding box alone; and that box."""
    rows, columns, area = lengths
    ys, xs = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    y, x = slice(ys[0], ys[-1] + 1), slice(xs[0], xs[-1] + 1)
    covered = rows[:, y] @ mask[y, x].astype(np.float64) @ columns[:, x].T
    box = (float(xs[0]), float(ys[0]), float(xs[-1] + 1), float(ys[-1] + 1))
    return np.rint(covered.ravel() / area * COVERAGE_STEPS) / COVERAGE_STEPS, box


def _to_input(
    box: tuple[float, float, float, float], geometry: Geometry, height: int, width: int
) -> tuple[float, float, float, float]:
    left, top, right, bottom = geometry.source_box(height, width)
    content_height, content_width = geometry.content_size(height, width)
    x = (np.array([box[0], box[2]]) - left) * content_width / (right - left)
    y = (np.array([box[1], box[3]]) - top) * content_height / (bottom - top)
    x, y = np.clip(x, 0, content_width), np.clip(y, 0, content_height)
    return float(x[0]), float(y[0]), float(x[1]), float(y[1])


def _masks(
    ann: ImageAnnotations, height: int, width: int
) -> Iterator[tuple[int, tuple[float, float, float, float] | None, NDArray[np.uint8]]]:
    """(category, box, mask uint8 [height, width]) of every instance that is no crowd and has a mask."""
    if ann.voc_objects:
        yield from ((category, None, mask) for category, mask in voc.masks(ann.voc_objects, ann.voc_classes))
        return
    for instance in ann.instances:
        if instance.crowd or not instance.segments:
            continue
        first = instance.segments[0]
        rle: Any = first if isinstance(first, dict) else _polygons_rle(instance.segments, height, width)
        yield instance.category, instance.box, coco_mask.decode(rle)


def _polygons_rle(polygons: Sequence[NDArray[np.float64]], height: int, width: int) -> Any:
    return coco_mask.merge(coco_mask.frPyObjects([p.tolist() for p in polygons], height, width))


def _read_coco(path: str, into: Annotations) -> None:
    try:
        with open(path, "rb") as file:
            content = json.load(file, object_hook=_shrink)
    except OSError as error:
        raise UserError(f"--annotations {path}: {error.strerror}; give a COCO JSON or a VOC folder") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"--annotations {path} is no JSON ({error}); give a COCO JSON or a VOC folder") from error
    if not isinstance(content, dict) or not isinstance(content.get("images"), list):
        raise UserError(f"--annotations {path} has no list of `images`; give a COCO instances JSON")
    if not isinstance(content.get("annotations"), list):
        raise UserError(f"--annotations {path} has no list of `annotations`; give a COCO instances JSON")
    for category in content.get("categories") or ():
        into.categories[int(category["id"])] = str(category.get("name", category["id"]))
    by_image: dict[str, list[Instance]] = defaultdict(list)
    for annotation in content["annotations"]:
        if not isinstance(annotation, tuple):
            raise UserError(
                f"--annotations {path}: an annotation lacks image_id or category_id; give instances, not captions"
            )
        by_image[annotation[0]].append(annotation[1])
    for image in content["images"]:
        image_id = str(image.get("id", ""))
        key = str(image.get("file_name") or image_id)
        into.add(
            ImageAnnotations(
                key=PurePosixPath(key).as_posix(),
                height=int(image.get("height") or 0),
                width=int(image.get("width") or 0),
                instances=tuple(by_image.pop(image_id, ())),
            ),
            image_id,
        )


def _shrink(value: dict[str, Any]) -> Any:
    """One JSON object while it is parsed; an annotation becomes (image id, Instance): no lists of floats pile up."""
    if "image_id" not in value or "category_id" not in value:
        return value
    box = value.get("bbox")
    return str(value["image_id"]), Instance(
        category=int(value["category_id"]),
        crowd=bool(value.get("iscrowd", 0)),
        box=(box[0], box[1], box[0] + box[2], box[1] + box[3]) if isinstance(box, list) and len(box) == 4 else None,
        segments=_segments(value.get("segmentation")),
    )


def _segments(value: Any) -> tuple[Any, ...]:
    if isinstance(value, dict) and "counts" in value and "size" in value:
        if isinstance(value["counts"], list):
            uncompressed: Any = value
            return (coco_mask.frPyObjects(uncompressed, *value["size"]),)
        return ({"size": value["size"], "counts": value["counts"]},)
    if not isinstance(value, list):
        return ()
    polygons = [value] if value and not isinstance(value[0], list) else value
    # three points at least: pycocotools takes a polygon of four numbers for a box
    return tuple(np.array(p, np.float64) for p in polygons if len(p) >= 6 and len(p) % 2 == 0)


def _open_voc(root: Path) -> Annotations:
    annotations = Annotations(source=str(root), categories=dict(enumerate(voc.CLASSES, start=1)))
    for file in voc.list_files(root):
        annotations.add(
            ImageAnnotations(file.stem, file.height, file.width, voc_objects=file.objects, voc_classes=file.classes)
        )
    return annotations
