"""What the objects of a COCO JSON have to be, and how the exporters' own ways of writing them are read."""

from typing import Any

import msgspec


class Broken(Exception):
    """An annotation that can't be read; the text is the cause that is counted."""


class Photo(msgspec.Struct):
    """One of `images`."""

    id: int | float | str | None = None
    file_name: int | float | str | None = None
    height: int | float | str | None = None
    width: int | float | str | None = None


class Category(msgspec.Struct):
    """One of `categories`; `isthing` is 0 for the stuff of panoptic files, which has no instances."""

    id: int | float | str
    name: int | float | str | None = None
    isthing: int | bool | None = None


class Run(msgspec.Struct):
    """Run lengths: size is [height, width]; counts are numbers, or COCO's text."""

    size: list[int]
    counts: list[int] | str


class Piece(msgspec.Struct):
    """One of `segments_info` of a panoptic annotation."""

    id: int | float | str | None = None
    category_id: int | float | str | None = None
    iscrowd: bool | int | float | str | None = 0
    bbox: list[float] | None = None


class Annotation(msgspec.Struct):
    """One of `annotations`: of an instance, or with `segments_info` of a whole panoptic image."""

    category_id: int | float | str | None = None
    iscrowd: bool | int | float | str | None = 0
    bbox: list[float] | None = None
    segmentation: list[list[float] | Run] | Run | None = None
    segments_info: list[Piece] | None = None
    file_name: str | None = None


def read_loosely(value: Any) -> Annotation:
    """The annotation of a JSON object that is not as the schema wants it, where it is plain what it means.

    Boxes that are not four numbers are dropped, numbers may be texts, polygons pairs of numbers. Raises Broken.
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
    """The whole number that a number or a text is, else None."""
    if isinstance(value, str):
        text = value.strip()
        return int(text) if text.lstrip("-").isascii() and text.lstrip("-").isdigit() and len(text) < 20 else None
    if isinstance(value, float):
        return int(value) if value.is_integer() else None
    return int(value) if isinstance(value, int) else None


def id_text(value: Any) -> str:
    """One spelling for the ids 7, 7.0 and "7"."""
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
