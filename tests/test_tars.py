import io
import json
import os
import tarfile
from pathlib import Path

import pytest

from batchjob.data.reading import ReadFailure
from batchjob.data.sources import ImageIndex, index_images
from batchjob.data.tars import expand
from batchjob.errors import UserError
from tests.image_files import PNG, causes, png, write_tar


def test_tars_give_one_row_a_sample_named_by_tar_and_key_or_by_the_json_beside_it(tmp_path):
    write_tar(tmp_path / "s-00.tar", [("x/0001.jpg", png(1)), ("x/0001.txt", b"cat"), ("x/0002.jpg", png(2))])
    write_tar(tmp_path / "s-01.tar", [("7.json", json.dumps({"image_id": 139}).encode()), ("7.jpg", png(3))])
    index = index_images(str(tmp_path / "s-{00..01}.tar"))
    assert index.ids() == ["s-00.tar/x/0001", "s-00.tar/x/0002", "139"]
    assert [index.read(i) for i in range(3)] == [png(1), png(2), png(3)]
    index.close()


def test_a_braced_range_is_expanded_as_a_shell_does_it():
    assert expand("s-{08..11}.tar") == ["s-08.tar", "s-09.tar", "s-10.tar", "s-11.tar"]
    assert expand("{a,b}/{2..0}.tar") == ["a/2.tar", "a/1.tar", "a/0.tar", "b/2.tar", "b/1.tar", "b/0.tar"]
    assert expand("a{b}c.tar") == ["a{b}c.tar"]


def test_the_first_picture_of_a_sample_counts_and_dotted_names_are_samples_of_their_own(tmp_path):
    members = [("a.jpg", png(1)), ("a.png", png(2)), ("a.seg.png", png(3)), ("IMG.2020.jpg", png(4)), ("._a.jpg", PNG)]
    write_tar(tmp_path / "t.tar", members)
    index = index_images(str(tmp_path / "t.tar"))
    assert index.ids() == ["t.tar/a", "t.tar/IMG.2020"]
    assert [index.read(i) for i in (0, 1)] == [png(1), png(4)]
    assert "1 pictures left out" in index.remarks[0]


def test_long_and_strange_names_in_a_tar_are_read(tmp_path):
    names = ["d" * 90 + "/" + "e" * 150 + ".png", "ünï\n\"'.png", os.fsdecode(b"\xff.png")]
    for format in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        with tarfile.open(tmp_path / "t.tar", "w", format=format, errors="surrogateescape") as tar:
            for i, name in enumerate(names):
                info = tarfile.TarInfo(name)
                info.size = len(png(i))
                tar.addfile(info, io.BytesIO(png(i)))
        index = index_images(str(tmp_path / "t.tar"))
        assert index.ids() == ["t.tar/" + names[0][:-4], "t.tar/ünï\n\"'", "t.tar/\\xff"]
        assert [index.read(i) for i in range(3)] == [png(i) for i in range(3)]
        index.close()


def cut_tar(path, at: int) -> ImageIndex:
    path.write_bytes(path.read_bytes()[:at])
    return index_images(str(path))


@pytest.fixture
def four(tmp_path):
    """Makes a tar of four pictures, each with a header of 512 bytes and data of 512, and an end mark."""
    write_tar(tmp_path / "t.tar", [(f"{i}.png", PNG) for i in range(4)])
    assert len(PNG) < 512
    return tmp_path / "t.tar"


def test_a_tar_cut_inside_a_member_costs_that_member_by_name(four):
    index = cut_tar(four, 2 * 1024 + 512 + 20)
    assert index.ids() == ["t.tar/0", "t.tar/1", "t.tar/2"]
    assert causes(index) == ["ok", "ok", "truncated"]
    assert str(four) in index.remarks[0]
    with pytest.raises(ReadFailure, match=r"t\.tar is cut off inside it, after 20 of \d+ bytes"):
        index.read(2)


@pytest.mark.parametrize("at", [2 * 1024, 2 * 1024 + 200])
def test_a_tar_cut_between_members_or_in_a_header_gets_a_row_that_says_so(four, at):
    index = cut_tar(four, at)
    assert index.ids() == ["t.tar/0", "t.tar/1", "t.tar/(cut off)"]
    assert causes(index) == ["ok", "ok", "missing"]
    assert f"{four} is cut off after {at} bytes" in index.remarks[0]


def test_a_damaged_header_and_an_empty_tar_get_a_row_that_says_so(four):
    data = bytearray(four.read_bytes())
    data[1024 + 100] ^= 255
    four.write_bytes(data)
    index = index_images(str(four))
    assert causes(index) == ["ok", "missing"]
    assert index.remarks == [f"{four} is damaged at byte 1024"]
    four.write_bytes(b"")
    assert causes(index_images(str(four))) == ["missing"]


def test_links_in_a_tar_are_rows_that_say_so(tmp_path):
    with tarfile.open(tmp_path / "t.tar", "w") as tar:
        for name, kind in (("a.png", tarfile.SYMTYPE), ("b.png", tarfile.LNKTYPE), ("c", tarfile.DIRTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "x.png"
            tar.addfile(info)
    index = index_images(str(tmp_path / "t.tar"))
    assert causes(index) == ["unreadable", "unreadable"]


def test_a_tar_that_changed_since_it_was_planned_is_refused(four):
    index = index_images(str(four))
    index.check()
    os.utime(four, (1, 1))
    with pytest.raises(UserError, match="has changed since it was planned"):
        index.check()
    four.unlink()
    index.check()
    assert causes(index) == ["missing"] * 4


def test_more_tars_than_descriptors_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr("batchjob.data.shards.OPEN_TARS", 2)
    for i in range(5):
        write_tar(tmp_path / f"{i}.tar", [("a.png", png(i))])
    index = index_images(str(tmp_path / "{0..4}.tar"))
    assert [index.read(i) for i in (0, 1, 2, 3, 4, 0, 4)] == [png(i) for i in (0, 1, 2, 3, 4, 0, 4)]
    assert len(index._reader._open) == 2
    index.close()


def test_concatenated_tars_are_read_and_bytes_that_are_not_a_tar_are_reported(tmp_path: Path) -> None:
    for name, members in (("a.tar", ["a0.jpg", "a1.jpg"]), ("b.tar", ["b0.jpg", "b1.jpg"])):
        with tarfile.open(tmp_path / name, "w") as tar:
            for member in members:
                info = tarfile.TarInfo(member)
                info.size = 3
                tar.addfile(info, io.BytesIO(member[:2].encode() + b"!"))
    both = (tmp_path / "a.tar").read_bytes() + (tmp_path / "b.tar").read_bytes()
    (tmp_path / "cat.tar").write_bytes(both)
    index = index_images(str(tmp_path / "cat.tar"))
    assert index.ids() == [f"cat.tar/{name}" for name in ("a0", "a1", "b0", "b1")]
    assert [index.read(i) for i in range(4)] == [b"a0!", b"a1!", b"b0!", b"b1!"]
    assert index.remarks == []
    (tmp_path / "junk.tar").write_bytes(both + b"x" * 700)
    index = index_images(str(tmp_path / "junk.tar"))
    assert len(index) == 4
    assert index.remarks == [f"{tmp_path / 'junk.tar'}: 700 bytes behind its end mark are not a tar; left out"]


def test_tars_are_found_in_any_letter_case_and_by_a_pattern(tmp_path: Path) -> None:
    for name in ("s-1.TAR", "s-0.tar"):
        with tarfile.open(tmp_path / name, "w") as tar:
            tar.addfile(tarfile.TarInfo("x.jpg"), io.BytesIO())
    assert index_images(str(tmp_path / "s-1.TAR")).ids() == ["s-1.TAR/x"]
    assert index_images(str(tmp_path / "s-*.[tT]*")).ids() == ["s-0.tar/x", "s-1.TAR/x"]
    with pytest.raises(UserError, match="is not a file or a folder"):
        index_images(str(tmp_path / "t-*.tar"))
