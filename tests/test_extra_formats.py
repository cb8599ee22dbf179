"""HEIC and JPEG XL: read if the package of the extra is installed, else refused with the extra's name."""

import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from batchjob.data import extra_formats
from batchjob.data.decode import decode
from batchjob.data.reading import ReadFailure
from batchjob.data.sources import index_images
from batchjob.geometry import Geometry
from tests.conftest import ROOT
from tests.pictures import photo

SQUARE, FILL = Geometry(56, 56, 14, 14), (10, 200, 30)
HEAD_OF_HEIC = b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic" + bytes(200)
HEAD_OF_AVIF = b"\0\0\0\x1cftypmif1\0\0\0\0mif1avifmiaf" + bytes(200)
PACKAGES = {"HEIF": ("pillow_heif", "heic"), "JXL": ("pillow_jxl", "jxl")}


def encoded(format: str, image: Image.Image, **options: Any) -> bytes:
    """Writes the picture with the format's own package; skips the test if that is absent."""
    package = pytest.importorskip(PACKAGES[format][0], reason=f"the extra {PACKAGES[format][1]} is not installed")
    if format == "HEIF":
        package.register_heif_opener()
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def cause_of(data: bytes) -> str:
    with pytest.raises(ReadFailure) as failure:
        decode(data, SQUARE, FILL)
    assert "\n" not in failure.value.message
    return f"{failure.value.cause}: {failure.value.message}"


@pytest.mark.parametrize("format", PACKAGES)
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L"])
def test_a_picture_is_read_as_its_pixels_are(format: str, mode: str) -> None:
    image = photo(120, 90).convert(mode)
    lossless: dict[str, Any] = {"lossless": True} if format == "JXL" else {"quality": -1}
    found = decode(encoded(format, image, **lossless), SQUARE, FILL)
    png = io.BytesIO()
    image.save(png, "PNG")
    wanted = decode(png.getvalue(), SQUARE, FILL)
    assert (found.height, found.width) == (90, 120)
    assert np.abs(found.pixels.astype(int) - wanted.pixels).mean() < (0.01 if format == "JXL" else 2)


def test_a_phone_s_rotation_is_applied_once() -> None:
    image, exif = Image.new("RGB", (120, 90), "red"), Image.Exif()
    image.paste("blue", (0, 0, 120, 45))  # the top, which is the left after a quarter turn to the left
    exif[0x0112] = 8
    found = decode(encoded("HEIF", image, exif=exif.tobytes()), SQUARE, FILL)
    assert (found.height, found.width) == (120, 90)
    assert found.pixels[:, 28, 5].argmax() == 2
    assert found.pixels[:, 28, 50].argmax() == 0


def test_a_jpeg_xl_s_own_orientation_counts_and_not_its_exif_s() -> None:
    exif = Image.Exif()
    exif[0x0112] = 8
    found = decode(encoded("JXL", photo(120, 90), exif=exif.tobytes()), SQUARE, FILL)
    assert (found.height, found.width) == (90, 120)


def test_a_jpeg_inside_a_jpeg_xl_is_that_jpeg(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    photo(120, 90).save(tmp_path / "a.jpg", exif=exif)
    with Image.open(tmp_path / "a.jpg") as image:
        data = encoded("JXL", image, lossless_jpeg=True)
    found, wanted = decode(data, SQUARE, FILL), decode((tmp_path / "a.jpg").read_bytes(), SQUARE, FILL)
    assert (found.height, found.width) == (120, 90)
    assert np.array_equal(found.pixels, wanted.pixels)


@pytest.mark.parametrize("size", [(8, 8), (256, 256), (1, 1), (513, 300), (16, 9000), (48, 64), (160, 90), (7, 3000)])
@pytest.mark.parametrize("boxed", [False, True])
def test_the_size_of_a_jpeg_xl_is_known_before_it_is_decoded(size: tuple[int, int], boxed: bool) -> None:
    data = encoded("JXL", Image.new("RGB", size), use_container=boxed)
    assert extra_formats.jxl_size(data) == size[::-1]


def bits(*fields: tuple[int, int]) -> bytes:
    """Packs (value, width) pairs one after the other, the lowest bit first."""
    number = at = 0
    for value, width in fields:
        number |= value << at
        at += width
    return number.to_bytes(20, "little")


def test_a_jpeg_xl_bomb_is_too_large_and_not_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extra_formats, "_load_jxl", lambda: True)
    head = bits((0, 1), (3, 2), (99_999, 30), (0, 3), (3, 2), (199_999, 30))  # SizeHeader of 200,000 × 100,000
    assert cause_of(b"\xff\x0a" + head).startswith("too_large: 200000×100000 pixels")
    parts = [head[:3], head[3:]]
    boxes = b"\0\0\0\x0cJXL \r\n\x87\n\0\0\0\x14ftypjxl \0\0\0\0jxl "
    for number, part in enumerate(parts):
        body = number.to_bytes(4, "big") + (b"\xff\x0a" if number == 0 else b"") + part
        boxes += (8 + len(body)).to_bytes(4, "big") + b"jxlp" + body
    assert cause_of(boxes).startswith("too_large: 200000×100000 pixels")


@pytest.mark.parametrize("format", PACKAGES)
def test_a_damaged_picture_is_a_cause_wherever_it_is_cut(format: str) -> None:
    data = encoded(format, photo(120, 90))
    assert cause_of(data[: len(data) // 2]).startswith("truncated: ")
    for cut in range(2, 60, 3):
        assert cause_of(data[:cut]).partition(":")[0] in ("truncated", "not_an_image")


@pytest.mark.parametrize(
    ("data", "said"),
    [(HEAD_OF_HEIC, "HEIC needs .*batchjob\\[heic\\]"), (b"\xff\x0a" + bytes(99), "JPEG XL needs .*batchjob\\[jxl\\]")],
    ids=["heic", "jxl"],
)
def test_without_its_package_a_format_is_unsupported_and_the_extra_is_named(
    data: bytes, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package, _ in PACKAGES.values():
        monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    monkeypatch.setattr(extra_formats, "_load_heif", extra_formats._load_heif.__wrapped__)
    monkeypatch.setattr(extra_formats, "_load_jxl", extra_formats._load_jxl.__wrapped__)
    with pytest.raises(ReadFailure, match=said) as failure:
        decode(data, SQUARE, FILL)
    assert failure.value.cause == "unsupported"


def test_an_avif_with_the_general_brand_is_not_taken_for_heic() -> None:
    assert extra_formats.format_of(HEAD_OF_AVIF) == ""


def test_their_extensions_are_images_in_a_folder(tmp_path: Path) -> None:
    for name in ("a.HEIC", "b.heif", "c.hif", "d.jxl"):
        (tmp_path / name).write_bytes(HEAD_OF_HEIC)
    assert index_images(str(tmp_path)).ids() == ["a.HEIC", "b.heif", "c.hif", "d.jxl"]


def test_their_packages_are_not_imported_before_such_a_picture_is_there() -> None:
    code = (
        "import sys, batchjob.data.decode\nsys.exit(any(name in sys.modules for name in ('pillow_heif', 'pillow_jxl')))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def damaged_tiff() -> bytes:
    """Makes an LZW TIFF with codes missing in its table, about which libtiff itself writes to stderr."""
    file = io.BytesIO()
    photo(120, 90).save(file, "TIFF", compression="tiff_lzw")
    data = bytearray(file.getvalue())
    data[500:600] = bytes(range(100, 200))
    return bytes(data)


def test_what_libtiff_writes_to_the_terminal_goes_into_the_message(capfd: pytest.CaptureFixture[str]) -> None:
    said = cause_of(damaged_tiff())
    assert capfd.readouterr().err == ""
    assert said.startswith("truncated: cut off or damaged: decoder error -2: ")
    assert "code" in said.rpartition(": ")[2] or "LZW" in said
    os.write(2, b"after\n")  # stderr is restored
    assert capfd.readouterr().err == "after\n"
    with pytest.raises(OSError, match="decoder error"), Image.open(io.BytesIO(damaged_tiff())) as plain:
        plain.load()
    assert capfd.readouterr().err, "libtiff is silent by itself, so this test shows nothing"
