"""Opens the annotations of a data set, COCO's or VOC's: finds those of each image, and lays them on the patch grid."""

import glob
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from batchjob.data import coco, voc
from batchjob.data.joining import have_same_folders, join_ids, join_names
from batchjob.data.masks import Box, Instance, Rle, read_masks
from batchjob.errors import UserError, counted
from batchjob.geometry import Geometry

MIN_PATCHES = 2  # an instance that owns fewer patches is left out: the grid is too coarse for it
COVERAGE_STEPS = 100_000  # coverage is rounded to 5 decimals before it is compared


@dataclass(frozen=True, slots=True)
class ImageAnnotations:
    """The annotations of one image; `height` and `width` are in pixels, and 0 where the entry does not state them."""

    key: str  # the file name of the entry, or its id
    height: int
    width: int
    instances: tuple[Instance, ...] = ()
    voc_objects: str = ""  # the SegmentationObject PNG, read when it is needed
    voc_classes: str = ""

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels that the entry or a mask of it states. Raises UserError where neither does."""
        if sizes := self._sizes():
            return sizes[0]
        raise UserError(f"the annotations of {self.key} have neither height nor width; add them to `images`")

    @property
    def has_size(self) -> bool:
        """Whether the entry or a mask of it states the image's size."""
        return bool(self._sizes())

    def fits(self, height: int, width: int) -> bool:
        """Says whether the annotations were drawn on an image of this size.

        Parameters
        ----------
        height, width
            Of the image in pixels, after the EXIF rotation.

        Returns
        -------
        Whether every size that the entry and its masks state is this one; True where they state none.
        """
        return all(size == (height, width) for size in self._sizes())

    def _sizes(self) -> list[tuple[int, int]]:
        said = [(self.height, self.width)] if self.height and self.width else []
        return said + [(s.height, s.width) for i in self.instances for s in i.segments if isinstance(s, Rle)]


@dataclass(frozen=True, slots=True)
class PatchInstances:
    """The m instances of one image that own at least `MIN_PATCHES` patches of its grid."""

    owner: NDArray[np.int16]  # [P] place among the m instances, -1 where none of them covers half of the patch
    category: NDArray[np.int32]  # [m]
    coverage: NDArray[np.float32]  # [m, P] share of each patch that the instance covers
    boxes: NDArray[np.float32]  # [m, 4] left, top, right, bottom in pixels of the model's input
    total: int  # instances that are not crowds, those that own too few patches included
    index: NDArray[np.int32]  # [m] the number of each among the image's annotations, the same on every grid

    def only(self, wanted: NDArray[np.integer[Any]]) -> "PatchInstances":
        """Returns a copy with those instances whose `index` is in `wanted`; the patches of the others get owner −1."""
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


@dataclass(slots=True)
class AnnotationFiles:
    """The entries of one or several annotation files; an entry holds the annotations of one image.

    `left_out` counts by cause the annotations that have no usable mask.
    """

    source: str
    categories: dict[int, str] = field(default_factory=dict)
    left_out: Counter[str] = field(default_factory=Counter)
    keys: list[str] = field(default_factory=list)  # file names; ids where no entry has one
    has_names: bool = True
    _coco: list[tuple[int, coco.CocoFile]] = field(default_factory=list)  # number of the file's first entry, ascending
    _voc: list[voc.File] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.keys)

    def __iter__(self) -> Iterator[ImageAnnotations]:
        return (self.at(i) for i in range(len(self)))

    def at(self, i: int) -> ImageAnnotations:
        """Reads entry i from its file."""
        if self._voc:
            one = self._voc[i]
            return ImageAnnotations(one.stem, one.height, one.width, voc_objects=one.objects, voc_classes=one.classes)
        first, file = next((first, file) for first, file in reversed(self._coco) if first <= i)
        height, width = file.size(i - first)
        return ImageAnnotations(self.keys[i], height, width, file.instances(i - first))

    def image(self, image_id: str) -> ImageAnnotations | None:
        """Returns the annotations of one image by its id, or None where no entry is of it; `join` is for a data set.

        Raises UserError where two entries fit the id equally well.
        """
        entry = int(self._find([image_id])[0])
        return self.at(entry) if entry >= 0 else None

    def join(self, ids: Sequence[str], data: str) -> "Annotations":
        """Finds the entry of each image of a data set.

        Parameters
        ----------
        ids
            Of all images of the data set, as its index gives them.
        data
            What an error message calls the data set.

        Returns
        -------
        The entries that were found, by the ids of their images.

        Raises
        ------
        UserError
            No image is annotated, two entries fit one image equally well, or two images fit one entry equally well.
        """
        found = self._find(ids)
        if (found < 0).all():
            all_of = f"the {len(ids):,} images" if len(ids) > 1 else "the one image"
            known = next((key for key in self.keys if key), "(no name)")
            raise UserError(
                f"{self.source} annotates none of {all_of} of {data}: it knows images such as "
                f"{known!r}, the data has images such as {ids[0]!r}; give the annotations of these images"
            )
        return Annotations(self, {ids[i]: int(found[i]) for i in np.flatnonzero(found >= 0).tolist()}, len(ids))

    def _find(self, ids: Sequence[str]) -> NDArray[np.int64]:
        return (join_names if self.has_names else join_ids)(ids, self.keys, self.source)


@dataclass(slots=True)
class Annotations:
    """The annotations of a data set, found by the ids of its images, such as `val2017/000000000139.jpg`."""

    files: AnnotationFiles
    entries: dict[str, int]  # id → number of the entry, for the images that are annotated
    image_count: int  # of the data set

    @property
    def source(self) -> str:
        """The path or paths that were given; for VOC the folder that holds SegmentationObject/."""
        return self.files.source

    @property
    def categories(self) -> dict[int, str]:
        """The names of the categories by their numbers."""
        return self.files.categories

    @property
    def left_out(self) -> Counter[str]:
        """How many annotations of the files have no usable mask, by cause."""
        return self.files.left_out

    def image(self, image_id: str) -> ImageAnnotations | None:
        """Returns the annotations of one of the data's images by its id, or None where it has none."""
        entry = self.entries.get(image_id)
        return None if entry is None else self.files.at(entry)

    def remarks(self) -> list[str]:
        """Returns lines for the user: how many images are annotated, whether folders differ, what was left out."""
        are = "is" if len(self.entries) == 1 else "are"
        lines = [f"annotations: {len(self.entries):,} of {counted(self.image_count, 'image')} {are} annotated"]
        pairs = ((row, self.files.keys[entry]) for row, entry in self.entries.items())
        apart = [pair for pair in pairs if self.files.has_names and not have_same_folders(*pair)]
        if apart:
            lines.append(
                f"annotations: the folders of {len(apart):,} of them have other names than the entry's: "
                f"{apart[0][0]!r} was taken for {apart[0][1]!r}"
            )
        return lines + [f"annotations: {n:,} left out: {cause}" for cause, n in self.left_out.most_common()]


def open_annotations(path: str | os.PathLike[str]) -> AnnotationFiles:
    """Opens the annotations of a COCO JSON, of several (paths joined by commas), of a COCO root or of a VOC folder.

    Raises UserError where nothing is annotated, or a file can't be read as annotations.
    """
    text = os.fspath(path)
    paths = _paths_of(text)
    if len(paths) == 1 and os.path.isdir(paths[0]):
        root = voc.find_root(Path(paths[0]))
        if root is not None:
            files = voc.list_files(root)
            return AnnotationFiles(str(root), dict(voc.CATEGORIES), keys=[file.stem for file in files], _voc=files)
        found = glob.glob(os.path.join(glob.escape(paths[0]), "**", "instances_*.json"), recursive=True)
        found += glob.glob(os.path.join(glob.escape(paths[0]), "**", "panoptic_*.json"), recursive=True) * (not found)
        if not found:
            raise UserError(
                f"the folder {text} holds neither SegmentationObject/ (VOC) nor instances_*.json (COCO); "
                "name the JSON file"
            )
        paths = sorted(found)
    files_of = AnnotationFiles(text)
    opened = [coco.scan(p, prefix=_split_of(p) if len(paths) > 1 else "") for p in paths]
    files_of.has_names = any(file.has_names for file in opened)
    for file in opened:
        files_of._coco.append((len(files_of.keys), file))
        files_of.keys += file.keys if file.has_names or not files_of.has_names else [""] * len(file.keys)
        files_of.categories |= file.categories
        files_of.left_out += file.left_out
    if not len(files_of):
        raise UserError(f"{text} annotates no image; give a file with `images` and `annotations`")
    return files_of


def raise_for_missing(text: str) -> None:
    """Raises UserError where a path of `--annotations` (several are joined by commas) is not there."""
    for path in _paths_of(text):
        if not os.path.exists(path):
            raise UserError(f"--annotations {path} is not a file or a folder; give a COCO JSON or a VOC folder")


def _paths_of(text: str) -> list[str]:
    return [text] if os.path.exists(text) else [path for path in text.split(",") if path]


def _split_of(path: str) -> str:
    """Returns `val2017/` for instances_val2017.json, since two splits may hold files of one name; else nothing."""
    name = os.path.splitext(os.path.basename(path))[0]
    return name.partition("_")[2] + "/" if name.startswith(("instances_", "panoptic_")) else ""


def instances_on_grid(
    ann: ImageAnnotations,
    geometry: Geometry,
    height: int,
    width: int,
    *,
    known: NDArray[np.integer[Any]] | None = None,
) -> PatchInstances:
    """Lays the instances of one image on the patch grid, and finds the instance that owns each patch.

    The owner is the instance that covers most of the patch, if that is at least half of it. Where two cover a patch
    equally (to 5 decimals), the one with the smaller mask owns it, since it lies in front; of equal masks, the first.
    Coverage is a quotient of whole numbers, so the owners are the same on every machine. Crowds are not instances.
    Instances that own fewer than `MIN_PATCHES` patches are left out.

    Parameters
    ----------
    ann
        The annotations of the image.
    geometry
        The patch grid, and how the image is fitted to it.
    height, width
        Of the image in pixels, after the EXIF rotation.
    known
        [P] number of each patch's owner among the image's annotations, −1 for none, where it was found before: the
        masks that own nothing are then not decoded. None: the owners are found.

    Raises
    ------
    ValueError
        The annotations were drawn on an image of another size.
    UserError
        A picture that holds the masks can't be read, or is of another size.
    """
    if not ann.fits(height, width):
        raise ValueError(f"{ann.key}: annotated at {ann.height}x{ann.width}, the image is {height}x{width}")
    lengths = geometry.patch_lengths(height, width)
    patches = geometry.grid[0] * geometry.grid[1]
    wanted = None if known is None else np.unique(known[known >= 0])
    found = list(_masks(ann, height, width, wanted))
    coverage = np.zeros((len(found), patches), np.float32)
    boxes = np.zeros((len(found), 4), np.float32)
    for i, (_, _, box, mask) in enumerate(found):
        coverage[i], extent = _pool(mask, lengths)
        boxes[i] = _to_input(box or extent, geometry, height, width)
    index = np.array([number for number, *_ in found], np.int32)
    if known is None:
        owner = find_owners(coverage, np.array([np.count_nonzero(mask) for *_, mask in found], np.int64))
    else:
        owner = np.where(known >= 0, np.searchsorted(index, known), -1).astype(np.int16)
    owned = np.bincount(owner[owner >= 0], minlength=len(found))
    everything = PatchInstances(
        owner=owner,
        category=np.array([category for _, category, _, _ in found], np.int32),
        coverage=coverage,
        boxes=boxes,
        total=sum(not i.crowd for i in ann.instances) if not ann.voc_objects else len(found),
        index=index,
    )
    return everything.only(everything.index[owned >= MIN_PATCHES])


def find_owners(coverage: NDArray[np.floating[Any]], area: NDArray[np.integer[Any]]) -> NDArray[np.int16]:
    """Finds the instance that covers most of each patch, if that is at least half of it.

    Parameters
    ----------
    coverage
        [m, P] share of each patch that each instance covers, rounded to 5 decimals.
    area
        [m] of each mask in pixels. Where two cover a patch equally, the smaller owns it; of equal areas, the first.

    Returns
    -------
    int16 [P], the instance's place among the m; −1 where no instance covers half of the patch.
    """
    if not len(coverage):
        return np.full(coverage.shape[1], -1, np.int16)
    front_first = np.argsort(area, kind="stable")
    best = front_first[coverage[front_first].argmax(axis=0)]  # argmax takes the first of equals
    return np.where(coverage.max(axis=0) >= 0.5, best, -1).astype(np.int16)


def k_instances(owner: NDArray[np.integer[Any]]) -> int:
    """Returns the study's k for an image: 1 + the number of instances that own at least 2 patches, within [2, 16].

    `owner` [P] is the number of each patch's instance, −1 for none.
    """
    counts = np.bincount(owner[owner >= 0].astype(np.int64)) if (owner >= 0).any() else np.zeros(1, np.int64)
    return int(np.clip(1 + (counts >= MIN_PATCHES).sum(), 2, 16))


def _pool(
    mask: NDArray[np.uint8], lengths: tuple[NDArray[np.float64], NDArray[np.float64], float]
) -> tuple[NDArray[np.float64], tuple[float, float, float, float]]:
    """Returns the share [P] of each patch that a mask covers, to 5 decimals, and the mask's bounding box in pixels.

    Only pixels inside the box enter the products, which is faster.
    """
    rows, columns, area = lengths
    ys, xs = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    y, x = slice(ys[0], ys[-1] + 1), slice(xs[0], xs[-1] + 1)
    covered = rows[:, y] @ mask[y, x].astype(np.float64) @ columns[:, x].T
    box = (float(xs[0]), float(ys[0]), float(xs[-1] + 1), float(ys[-1] + 1))
    return np.rint(covered.ravel() / area * COVERAGE_STEPS) / COVERAGE_STEPS, box


def _to_input(box: Box, geometry: Geometry, height: int, width: int) -> Box:
    left, top, right, bottom = geometry.source_box(height, width)
    content_height, content_width = geometry.content_size(height, width)
    x = (np.array([box[0], box[2]]) - left) * content_width / (right - left)
    y = (np.array([box[1], box[3]]) - top) * content_height / (bottom - top)
    x, y = np.clip(x, 0, content_width), np.clip(y, 0, content_height)
    return float(x[0]), float(y[0]), float(x[1]), float(y[1])


def _masks(
    ann: ImageAnnotations, height: int, width: int, wanted: NDArray[np.integer[Any]] | None
) -> Iterator[tuple[int, int, Box | None, NDArray[np.uint8]]]:
    """Yields (number in the image, category, box, mask uint8 [height, width]) of each instance that covers a pixel.

    Crowds are left out. Of COCO only the `wanted` numbers come, or all. VOC keeps the masks of an image in one picture,
    so all of them come.
    """
    if ann.voc_objects:
        for number, (category, mask) in enumerate(voc.masks(ann.voc_objects, ann.voc_classes)):
            yield number, category, None, mask
        return
    for number, mask in read_masks(ann.instances, height, width, wanted):
        yield number, ann.instances[number].category, ann.instances[number].box, mask
