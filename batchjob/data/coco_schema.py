"""The schema of the objects of a COCO JSON, and the reading of objects that exporters write in ways of their own."""

from typing import Any

import msgspec


class Broken(Exception):
    """Raised for an annotation that can't be read; the text is the cause that is counted."""


class Photo(msgspec.Struct):
    """A member of `images`."""

    id: int | float | str | None = None
    file_name: int | float | str | None = None
    height: int | float | str | None = None
    width: int | float | str | None = None


class Category(msgspec.Struct):
    """A member of `categories`; `isthing` is 0 for the stuff of panoptic files, which has no instances."""

    id: int | float | str
    name: int | float | str | None = None
    isthing: int | bool | None = None


class Run(msgspec.Struct):
    """A mask as run lengths: `size` is [height, width]; `counts` are numbers, or COCO's text of them."""

    size: list[int]
    counts: list[int] | str


class Piece(msgspec.Struct):
    """A member of `segments_info` of a panoptic annotation."""

    id: int | float | str | None = None
    category_id: int | float | str | None = None
    iscrowd: bool | int | float | str | None = 0
    bbox: list[float] | None = None


class Annotation(msgspec.Struct):
    """A member of `annotations`: of one instance, or with `segments_info` of a whole panoptic image."""

    category_id: int | float | str | None = None
    iscrowd: bool | int | float | str | None = 0
    bbox: list[float] | None = None
    segmentation: list[list[float] | Run] | Run | None = None
    segments_info: list[Piece] | None = None
    file_name: str | None = None


def read_loosely(value: Any) -> Annotation:
    """Reads the annotation of a JSON object that does not follow the schema, where its meaning is plain.

    Boxes that are not four numbers are dropped. Numbers may be texts. Polygons may be lists of pairs, and a single
    polygon need not be inside a list. Raises Broken with the cause for anything else.
    """
    if not isinstance(value, dict):
        raise Broken("an annotation that is not an object")
    plain = dict(value)
    box = plain.get("bbox")
    if not isinstance(box, list) or len(box) != 4 or not all(_is_number(v) for v in box):
        plain["bbox"] = None
    if isinstance(plain.get("segmentation"), list):
        plain["segmentation"] = _polygons(plain["segmentation"])
    for name in ("category_id", "iscrowd"):
        if isinstance(plain.get(name), list | dict):
            raise Broken(f"a {name} that is not a number")
    try:
        return msgspec.convert(plain, Annotation, strict=False)
    except msgspec.ValidationError as error:
        if "$.segmentation[" in str(error):
            raise Broken("a polygon with a coordinate that is not a number") from None
        if "$.segmentation" in str(error):
            raise Broken("a segmentation that is neither polygons nor an RLE") from None
        raise Broken("an annotation whose fields are not what COCO says") from None


def as_number(value: Any) -> int | None:
    """Returns the whole number that a number or a text stands for, else None."""
    if isinstance(value, str):
        text = value.strip()
        return int(text) if text.lstrip("-").isascii() and text.lstrip("-").isdigit() and len(text) < 20 else None
    if isinstance(value, float):
        return int(value) if value.is_integer() else None
    return int(value) if isinstance(value, int) else None


def id_text(value: Any) -> str:
    """Returns one spelling for the ids 7, 7.0 and "7"; "" for None."""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return "" if value is None else str(value).strip()


def _polygons(value: list[Any]) -> list[Any]:
    if value and all(_is_number(v) for v in value):
        return [value]  # one polygon without its list
    if len(value) >= 3 and all(_is_point(v) for v in value):
        return [_flat(value)]
    return [_flat(part) if _is_points(part) else part for part in value]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) or (isinstance(value, str) and value.strip() != "")


def _is_point(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(_is_number(v) for v in value)


def _is_points(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 0 and all(_is_point(v) for v in value)


def _flat(points: list[Any]) -> list[Any]:
    return [number for point in points for number in point]
