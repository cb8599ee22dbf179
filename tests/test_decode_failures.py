import io
import os
import socket
import threading
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile, PngImagePlugin

from batchjob.data.decode import MAX_PIXELS, Decoded, decode
from batchjob.data.reading import ReadFailure, read_file
from batchjob.geometry import Geometry
from batchjob.loader import jpeg as fast_jpeg
from tests.decoding import FILL, SQUARE, cause_of, outcome
from tests.pictures import bad_files, bomb, encoded, jpeg, photo, png

BAD = bad_files()


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("fast", [None, fast_jpeg], ids=["pillow", "fast"])
def test_a_file_that_is_not_a_whole_picture_fails_with_its_cause(name, fast):
    data, cause = BAD[name]
    assert cause_of(data, accelerate=fast) == cause


def test_a_text_chunk_that_unpacks_to_gigabytes_is_too_large():
    info = PngImagePlugin.PngInfo()
    info.add_text("bomb", "x" * (PngImagePlugin.MAX_TEXT_CHUNK + 1), zip=True)
    assert cause_of(encoded(photo(40, 30), "PNG", pnginfo=info)) == "too_large"
    many = PngImagePlugin.PngInfo()
    for i in range(PngImagePlugin.MAX_TEXT_MEMORY // 1_000_000 + 1):
        many.add_text(f"bomb{i}", "x" * 1_000_000, zip=True)
    assert cause_of(encoded(photo(40, 30), "PNG", pnginfo=many)) == "too_large"


@pytest.mark.parametrize("size", [(20000, 20000), (10000, 9000), (9460, 9460)])
def test_a_bomb_is_judged_by_its_header_and_never_decoded(size, monkeypatch):
    assert 9459**2 < MAX_PIXELS < 9460**2
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("it was decoded"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cause_of(bomb(*size)) == "too_large"


def test_what_cannot_be_opened_says_why(tmp_path):
    good = tmp_path / "good.jpg"
    good.write_bytes(jpeg())
    (tmp_path / "dangling.jpg").symlink_to("nowhere.jpg")
    (tmp_path / "loop.jpg").symlink_to("pool.jpg")
    (tmp_path / "pool.jpg").symlink_to("loop.jpg")
    (tmp_path / "folder.jpg").mkdir()
    os.mkfifo(tmp_path / "fifo.jpg")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket.jpg"))
    causes = {
        "dangling.jpg": "unreadable",
        "loop.jpg": "unreadable",
        "folder.jpg": "unreadable",
        "fifo.jpg": "unreadable",
        "socket.jpg": "unreadable",
        "none.jpg": "missing",
        "good.jpg/x.jpg": "missing",
    }
    assert {name: cause_of(tmp_path / name) for name in causes} == causes
    assert isinstance(decode(good, SQUARE, FILL), Decoded)


def test_a_fifo_that_replaces_the_file_after_the_look_does_not_block(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "x.jpg")
    (tmp_path / "good.jpg").write_bytes(jpeg())
    regular = os.stat(tmp_path / "good.jpg")
    monkeypatch.setattr(os, "stat", lambda path: regular)
    outcome = []

    def read():
        try:
            read_file(os.fsencode(tmp_path / "x.jpg"))
        except ReadFailure as failure:
            outcome.append(failure.cause)

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    thread.join(timeout=60)
    assert outcome == ["unreadable"]


def test_a_file_without_permission_is_unreadable(tmp_path):
    path = tmp_path / "secret.jpg"
    path.write_bytes(jpeg())
    path.chmod(0)
    me = os.geteuid()
    if me == 0:  # root may read everything, so read as the user nobody
        os.seteuid(65534)
    try:
        assert cause_of(path) == "unreadable"
    finally:
        os.seteuid(me)


def test_a_huge_file_is_too_large_and_not_read(tmp_path):
    with open(tmp_path / "huge.png", "wb") as file:
        file.write(png())
        file.truncate(2**40)  # a sparse file, which takes no space on the disk
    assert cause_of(tmp_path / "huge.png") == "too_large"


def test_too_little_memory_is_a_cause_and_not_a_crash(monkeypatch):
    def exhausted(self):
        raise MemoryError

    monkeypatch.setattr(ImageFile.ImageFile, "load", exhausted)
    assert cause_of(jpeg()) == "too_large"


SEEDS = [jpeg(), jpeg(progressive=True), png()] + [
    encoded(photo(40, 30), format) for format in ("WEBP", "GIF", "TIFF", "BMP", "AVIF", "PPM", "JPEG2000")
]


@settings(max_examples=250, deadline=None)
@given(
    data=st.sampled_from(SEEDS),
    cut=st.one_of(st.none(), st.floats(0, 1)),
    changes=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=4),
)
def test_whatever_the_bytes_are_there_is_a_picture_or_a_cause_and_both_decoders_agree(data, cut, changes):
    spoilt = bytearray(data if cut is None else data[: int(cut * len(data))])
    for where, value in changes:
        if spoilt:
            spoilt[int(where * len(spoilt))] = value
    slow = outcome(bytes(spoilt), SQUARE, None)
    fast = outcome(bytes(spoilt), SQUARE, fast_jpeg)
    assert slow.shape == fast.shape
    assert np.abs(slow.astype(int) - fast).max() <= 2


def test_a_kind_of_image_that_is_not_read_is_not_called_damaged() -> None:
    file = io.BytesIO()
    Image.new("RGB", (40, 40)).save(file, "BMP")
    data = bytearray(file.getvalue())
    data[30:34] = (9).to_bytes(4, "little")  # an unknown compression
    with pytest.raises(ReadFailure, match="format that is not read: Unsupported BMP compression") as error:
        decode(bytes(data), Geometry(32, 32, 16, 16), (0, 0, 0))
    assert error.value.cause == "unsupported"
