"""Reads COCO JSON, of instances or panoptic: scans and checks a file once, then reads the annotations of single images.

Between the two, the memory holds the images' names, and where each annotation lies in the file.
"""

import mmap
import os
import re
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import msgspec
import numpy as np

from batchjob.data.coco_schema import Annotation, Broken, Category, Photo, Piece, Run, as_number, id_text, read_loosely
from batchjob.data.decode import MAX_PIXELS
from batchjob.data.masks import MAX_INSTANCES, BadMask, Box, Instance, Painted, Segment, check_polygon, check_rle
from batchjob.errors import UserError

Entry = TypeVar("Entry", Category, Photo)
MAX_CATEGORY = 2**31 - 1  # the store keeps categories as int32
_NOT_JSON = re.compile(rb'"(?:[^"\\]|\\.)*"|-?Infinity|NaN', re.DOTALL)
_BOM = b"\xef\xbb\xbf"


class _Content(msgspec.Struct):
    images: list[msgspec.Raw]
    annotations: list[msgspec.Raw]
    categories: list[msgspec.Raw] | None = None


@dataclass(slots=True)
class CocoFile:
    """The images of one file, and where their annotations lie in it.

    `left_out` counts by cause the annotations that have no usable mask.
    """

    path: str
    keys: list[str] = field(default_factory=list)  # file_name of each image, its id where no image has a file name
    has_names: bool = True
    categories: dict[int, str] = field(default_factory=dict)
    left_out: Counter[str] = field(default_factory=Counter)
    _heights: "array[int]" = field(default_factory=lambda: array("q"))
    _widths: "array[int]" = field(default_factory=lambda: array("q"))
    _starts: Any = None  # [images + 1] where an image's annotations begin in the next two arrays
    _offsets: Any = None  # [annotations] bytes into the file
    _lengths: Any = None  # [annotations] bytes
    _stuff: frozenset[int] = frozenset()
    _has_odd_numbers: bool = False
    _stamp: tuple[int, int] = (0, 0)

    def size(self, i: int) -> tuple[int, int]:
        """Returns (height, width) of image i in pixels as the file states them, 0 where it does not."""
        return self._heights[i], self._widths[i]

    def instances(self, i: int) -> tuple[Instance, ...]:
        """Reads the instances of image i, in the file's order. Raises UserError where the file changed since `scan`."""
        spans = range(int(self._starts[i]), int(self._starts[i + 1]))
        if not spans:
            return ()
        with open(self.path, "rb") as file:
            self._check_stamp(file.fileno())
            parts = [bytearray(os.pread(file.fileno(), int(self._lengths[s]), int(self._offsets[s]))) for s in spans]
        if self._has_odd_numbers:  # NaN and Infinity are replaced as `scan` replaced them
            for part in parts:
                _replace_numbers(part)
        return tuple(one for part in parts for one in self._read(part, i, Counter()))

    def _check_stamp(self, fd: int) -> None:
        found = os.fstat(fd)
        if (found.st_size, found.st_mtime_ns) != self._stamp:
            raise UserError(f"--annotations {self.path} changed while it was in use; run the command again")

    def _read(self, raw: Any, i: int, left_out: Counter[str]) -> Iterator[Instance]:
        """Yields the instances of one annotation of image i; `left_out` counts those that have no usable mask."""
        try:
            found = _decode(raw)
        except Broken as broken:
            left_out[str(broken)] += 1
            yield Instance(-1, False, None, ())
            return
        if found.segments_info is None:
            piece: Annotation | Piece = found
            yield self._instance(piece, i, left_out, found.segmentation)
            return
        path = self._picture(found.file_name or "")
        for piece in found.segments_info:
            if _category(piece.category_id, self.categories) in self._stuff:
                left_out["a segment of stuff, which has no instances"] += 1
            elif not path or not isinstance(piece.id, int):
                left_out["a segment whose picture is not there"] += 1
                yield Instance(-1, False, None, ())
            else:
                yield self._instance(piece, i, left_out, Painted(path, piece.id))

    def _instance(self, found: Annotation | Piece, i: int, left_out: Counter[str], drawn: Any) -> Instance:
        crowd, cause = False, ""
        segments: tuple[Segment, ...] = ()
        category = _category(found.category_id, self.categories)
        try:
            crowd = _is_crowd(found.iscrowd)
            if category < 0:
                raise BadMask("a category_id that is not a whole number from 0 to 2147483647")
            height, width = self.size(i)
            if height * width > MAX_PIXELS:
                raise BadMask("a mask of more pixels than are decoded")
            segments = (drawn,) if isinstance(drawn, Painted) else _segments(drawn, height, width)
            cause = "" if segments or crowd else "no mask"
        except BadMask as bad:
            cause = str(bad)
        if cause:
            left_out[cause] += 1
        return Instance(category, crowd, _box(found.bbox), segments)

    def _picture(self, name: str) -> str:
        """Finds the PNG of a panoptic annotation: in the folder named like the JSON, or beside the JSON; else ""."""
        for folder in (os.path.splitext(self.path)[0], os.path.dirname(self.path)):
            path = os.path.join(folder, os.path.basename(name.replace("\\", "/")))
            if name and os.path.isfile(path):
                return path
        return ""


def scan(path: str, *, prefix: str = "") -> CocoFile:
    """Reads a COCO JSON from its beginning to its end, and checks every annotation.

    A single annotation that is wrong is left out and counted.

    Parameters
    ----------
    path
        Of the JSON file.
    prefix
        Put before every file name: the folder of a split, such as `val2017/`; empty for none.

    Raises
    ------
    UserError
        The file can't be read, is not JSON or not a COCO JSON of instances; an image or a category has an id or a size
        that is not possible, or two images have one id; none of the annotations can be used; an image has more than
        `MAX_INSTANCES` annotations.
    """
    try:
        with open(path, "rb") as file:
            found = os.fstat(file.fileno())
            # not closed here: the frames of an error still point into the mapping
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except OSError as error:
        raise UserError(f"--annotations {path}: {error.strerror}; give a COCO JSON or a VOC folder") from error
    except ValueError as error:  # an empty file can't be mapped
        raise UserError(f"--annotations {path} is not JSON ({error}); give a COCO JSON or a VOC folder") from error
    result = CocoFile(path, _stamp=(found.st_size, found.st_mtime_ns))
    _fill(result, data, prefix)
    return result


def _fill(into: CocoFile, data: mmap.mmap, prefix: str) -> None:
    content, into._has_odd_numbers = _parse(into.path, data)
    _read_categories(into, content.categories or [])
    entries = _read_images(into, content.images, prefix)
    base = np.frombuffer(data, np.uint8).__array_interface__["data"][0]
    owners, offsets, lengths = array("q"), array("Q"), array("I")
    used: set[int] = set()
    for number, raw in enumerate(content.annotations):
        view = np.frombuffer(raw, np.uint8)  # of the file's own pages
        image_id, missing = _image_of(raw)
        entry = entries.get(image_id, -1)
        if entry < 0:
            into.left_out[missing or "an image_id that no image has"] += 1
            continue
        used |= {one.category for one in into._read(raw, entry, into.left_out) if one.category >= 0}
        owners.append(entry)
        offsets.append(view.__array_interface__["data"][0] - base)
        lengths.append(len(view))
        del view
        content.annotations[number] = _NOTHING  # its memory is not needed any more
    if not used and content.annotations:
        causes = "; ".join(f"{n} × {cause}" for cause, n in into.left_out.most_common(3))
        many = len(content.annotations)
        none = f"none of its {many:,} annotations can" if many > 1 else "its one annotation can't"
        raise UserError(f"--annotations {into.path}: {none} be used ({causes}); give instances, not captions")
    into.categories |= {c: str(c) for c in sorted(used) if c not in into.categories}
    order = np.argsort(np.frombuffer(owners, np.int64), kind="stable") if owners else np.zeros(0, np.int64)
    counts = np.bincount(np.array(owners, np.int64), minlength=len(into.keys)) if owners else [0] * len(into.keys)
    into._starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    into._offsets, into._lengths = np.array(offsets, np.uint64)[order], np.array(lengths, np.uint32)[order]
    most = int(np.max(counts, initial=0))
    if most > MAX_INSTANCES:
        key = into.keys[int(np.argmax(counts))]
        raise UserError(f"--annotations {into.path}: {key!r} has {most} annotations; at most {MAX_INSTANCES} are read")


_NOTHING = msgspec.Raw(b"null")


def _parse(path: str, data: mmap.mmap) -> tuple[_Content, bool]:
    """Returns the three lists, whose members are still bytes, and whether the file held NaN or Infinity.

    Python writes NaN and Infinity, and JSON forbids them. They become texts of the same length in this process's copy
    of the page, so that only their annotation is left out and not the whole file.
    """
    for retry in (True, False):
        try:
            start = len(_BOM) if data[:3] == _BOM else 0
            return msgspec.json.decode(memoryview(data)[start:], type=_Content), not retry
        except msgspec.ValidationError as error:
            name = next((n for n in ("images", "annotations") if n in str(error)), "images")
            raise UserError(f"--annotations {path} has no list of `{name}`; give a COCO instances JSON") from None
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            if not retry or not _replace_numbers(data):
                raise UserError(
                    f"--annotations {path} is not JSON ({error}); give a COCO JSON or a VOC folder"
                ) from None
    raise AssertionError("two tries end in one of the above")


def _replace_numbers(data: mmap.mmap | bytearray) -> bool:
    spans = [m.span() for m in _NOT_JSON.finditer(data) if m[0][:1] != b'"']
    for start, stop in spans:
        data[start:stop] = b'""'.ljust(stop - start)
    return bool(spans)


def _read_entry(raw: msgspec.Raw, kind: type[Entry], where: str, fields: str) -> Entry:
    """Reads a member of `categories` or `images`. Raises UserError, which names its place, where it is not one."""
    try:
        return msgspec.json.decode(raw, type=kind)
    except (
        msgspec.DecodeError,
        UnicodeDecodeError,
    ) as error:  # the second before msgspec 0.23, for a text that is not UTF-8
        raise UserError(f"{where} is not an object with {fields} ({error}); correct it") from None


def _read_categories(into: CocoFile, raws: list[msgspec.Raw]) -> None:
    stuff = set()
    for i, raw in enumerate(raws):
        where = f"--annotations {into.path}: `categories`[{i}]"
        found = _read_entry(raw, Category, where, "a number as id and a name")
        number = as_number(found.id)
        if number is None or not 0 <= number <= MAX_CATEGORY:
            raise UserError(
                f"{where} has the id {found.id!r}; an id is a whole number from 0 to {MAX_CATEGORY}: renumber them"
            )
        into.categories[number] = str(found.name if found.name not in (None, "") else number)
        if found.isthing is not None and not found.isthing:
            stuff.add(number)
    into._stuff = frozenset(stuff)


def _read_images(into: CocoFile, raws: list[msgspec.Raw], prefix: str) -> dict[str, int]:
    """Fills in the keys and sizes, and returns image id → number."""
    entries: dict[str, int] = {}
    photos = []
    for i, raw in enumerate(raws):
        where = f"--annotations {into.path}: `images`[{i}]"
        found = _read_entry(raw, Photo, where, "id, file_name, height and width")
        own = id_text(found.id)
        if own in entries:
            raise UserError(f"{where} has the id {own} that `images`[{entries[own]}] has too; give each its own")
        entries[own] = i
        photos.append((own, str(found.file_name) if found.file_name not in (None, "") else ""))
        for name, value, sizes in (("height", found.height, into._heights), ("width", found.width, into._widths)):
            number = as_number(value) if value is not None else 0
            if number is None or not 0 <= number < 2**31:
                label = f" ({photos[-1][1]})" if photos[-1][1] else ""
                raise UserError(f"{where}{label} has the {name} {value!r}; give pixels as a whole number")
            sizes.append(number)
    into.has_names = any(name for _, name in photos)
    into.keys = [f"{prefix}{name}" if name else "" if into.has_names else own for own, name in photos]
    return entries


def _image_of(raw: Any) -> tuple[str, str]:
    """Returns (id of the annotation's image, why it has none); one of the two is empty."""
    try:
        return id_text(msgspec.json.decode(raw, type=_ImageId).image_id), ""
    except (msgspec.DecodeError, UnicodeDecodeError):
        return "", "an annotation without an image_id"


class _ImageId(msgspec.Struct):
    image_id: int | float | str


def _decode(raw: Any) -> Annotation:
    """Reads an annotation by its schema, else by `read_loosely`. Raises Broken with the cause."""
    try:
        try:
            return msgspec.json.decode(raw, type=Annotation)
        except msgspec.ValidationError:
            plain = msgspec.json.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise Broken("an annotation with a text that is not UTF-8") from None
    return read_loosely(plain)


def _segments(found: Any, height: int, width: int) -> tuple[Segment, ...]:
    if found is None:
        return ()
    segments: list[Segment] = []
    for part in [found] if isinstance(found, Run) else found:
        if isinstance(part, Run):
            segments.append(check_rle(part.size, part.counts, height, width))
        elif (polygon := check_polygon(part, height, width)) is not None:
            segments.append(polygon)
    return tuple(segments)


def _category(value: Any, known: dict[int, str]) -> int:
    """Returns the number of a category that is given by number or by name; −1 for anything else."""
    number = as_number(value)
    if number is None and isinstance(value, str):
        number = next((c for c, name in known.items() if name == value), None)
    return number if number is not None and 0 <= number <= MAX_CATEGORY else -1


def _is_crowd(value: Any) -> bool:
    meaning = {"0": False, "1": True, "false": False, "true": True, "none": False, "": False}
    text = str(as_number(value) if as_number(value) is not None else value).strip().lower()
    if text not in meaning:
        raise BadMask("an iscrowd that is neither 0 nor 1")
    return meaning[text]


def _box(value: Any) -> Box | None:
    if value is None or len(value) != 4 or not np.isfinite(value).all():
        return None
    left, top, width, height = value
    return float(left), float(top), float(left + width), float(top + height)
