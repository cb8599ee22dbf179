"""Parquet files as DATA: of the Hugging Face hub, damaged, changed, huge; each row group is read once."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import xarray
from pyarrow import parquet

import batchjob as package
from batchjob.codes import STATUS
from batchjob.data.index import ImageIndex
from batchjob.data.reading import ReadFailure
from batchjob.data.sources import index_images
from batchjob.errors import UserError
from batchjob.machine import choose_workers, total_memory_bytes
from tests.conftest import ROOT, TINY, Command
from tests.pictures import png
from tests.poison import open_loader

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
PNG = png(40, 30)


def picture(i: int) -> bytes:
    return png(20 + i, 30, seed=i)


def write(path: Path, table: dict[str, Any], *, rows_per_group: int = 3, **metadata: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    made = pa.table(table).replace_schema_metadata(metadata or None)
    parquet.write_table(made, path, row_group_size=rows_per_group)
    return path


def structs(count: int, *, first: int = 0, path: str | None = "{}.png") -> pa.Array:
    rows = [{"bytes": picture(i), "path": path and path.format(i)} for i in range(first, first + count)]
    return pa.array(rows, IMAGE)


def cause_of(index: ImageIndex, row: int) -> str:
    try:
        index.read(row)
    except ReadFailure as failure:
        return failure.cause if "\n" not in failure.message else "not one line"
    return "ok"


@pytest.mark.parametrize(
    "column",
    [
        pa.array([picture(i) for i in range(7)], pa.binary()),
        pa.array([picture(i) for i in range(7)], pa.large_binary()),
        pa.array([picture(i) for i in range(7)]).dictionary_encode(),
        structs(7, path=None),
        structs(7, path="same.png"),
    ],
    ids=["bytes", "large", "dictionary", "struct", "equal paths"],
)
def test_rows_are_called_by_file_and_number_and_hold_the_bytes_of_their_image(column: pa.Array, tmp_path: Path) -> None:
    index = index_images(str(write(tmp_path / "a.parquet", {"image": column})))
    assert index.ids() == [f"a.parquet/{i}" for i in range(7)]
    assert [index.read(i) for i in range(7)] == [picture(i) for i in range(7)]
    assert [index.read(i) for i in (6, 0, 3, 2)] == [picture(i) for i in (6, 0, 3, 2)]
    index.close()


def test_paths_in_a_struct_are_the_ids_if_they_are_unique_in_the_file(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", {"image": structs(3, path="x/{}.png")})
    write(tmp_path / "b.parquet", {"image": structs(2, path="x/{}.png")})
    write(tmp_path / "c.parquet", {"image": structs(2, path="one.png")})
    index = index_images(str(tmp_path / "{a,b,c}.parquet"))
    wanted = ["a.parquet/x/0.png", "a.parquet/x/1.png", "a.parquet/x/2.png", "b.parquet/x/0.png", "b.parquet/x/1.png"]
    assert index.ids() == [*wanted, "c.parquet/0", "c.parquet/1"]
    assert index_images(str(tmp_path / "{a,b,c}.parquet"), limit=4).ids() == wanted[:4]


def test_a_folder_of_the_hub_is_read_by_name_and_by_split(tmp_path: Path) -> None:
    for name in ("data/train-00001-of-00002", "data/train-00000-of-00002", "data/test-00000-of-00001"):
        write(tmp_path / f"{name}.parquet", {"image": structs(1, path=None)})
    (tmp_path / "README.md").write_text("---\n")
    ids = [f"{name}.parquet/0" for name in ("test-00000-of-00001", "train-00000-of-00002", "train-00001-of-00002")]
    assert index_images(str(tmp_path)).ids() == ids
    assert index_images(str(tmp_path), split="train").ids() == ids[1:]
    assert index_images(str(tmp_path / "data" / "train-*.parquet")).ids() == ids[1:]
    with pytest.raises(UserError, match="begins no name of 3 Parquet files; did you mean 'train'"):
        index_images(str(tmp_path), split="trian")


def test_a_split_may_be_a_folder_of_parquet_files(tmp_path: Path) -> None:
    for name in ("train/0000", "train/0001", "test/0000"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path / f"{name}.parquet", {"image": structs(1, path=None)})
    assert index_images(str(tmp_path), split="train").ids() == ["0000.parquet/0", "0001.parquet/0"]
    assert index_images(str(tmp_path), split="test").ids() == ["0000.parquet/0"]
    with pytest.raises(UserError, match=r"--split train is of a folder, and .* is a range of files; leave it out"):
        index_images(str(tmp_path / "train" / "*.parquet"), split="train")
    whole = index_images(str(tmp_path)).ids()
    assert len(set(whole)) == 3


def test_labels_are_kept_as_text_with_the_hub_s_names(tmp_path: Path) -> None:
    feature = {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}, "image": {"_type": "Image"}}
    hub = json.dumps({"info": {"features": feature}}).encode()
    columns = {"image": structs(4), "label": pa.array([1, 0, None, 7]), "category": ["x", "y", None, "x"]}
    write(tmp_path / "a.parquet", columns, huggingface=hub)
    write(tmp_path / "b.parquet", {"image": structs(2, first=4), "label": pa.array([3.0, np.nan])})
    index = index_images(str(tmp_path / "*.parquet"))
    assert index.columns == ("label", "category")
    assert index.column("label") == ["dog", "cat", "", "7", "3", ""]
    assert index.column("category") == ["x", "y", "", "x", "", ""]
    index.save(tmp_path / "index")
    assert ImageIndex.load(tmp_path / "index").column("label", 1, 3) == ["cat", ""]


def test_a_column_that_does_not_hold_classes_is_left_out_with_a_remark(tmp_path: Path) -> None:
    file = write(tmp_path / "a.parquet", {"image": structs(2), "label": [[1, 2], [3]], "category": ["a", "b"]})
    index = index_images(str(file))
    assert index.columns == ("category",)
    assert index.remarks == [f"{file}: the column label is of list<element: int64>, not of classes; left out"]


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"picture": [PNG]}, r"has no column of images: its columns are picture \(binary\); one named image or img"),
        ({"image": ["a.png"]}, r"image \(string\)"),
        ({"image": [[PNG]]}, r"image \(list<element: binary>\)"),
        ({"image": pa.array([{"path": "a.png"}])}, r"image \(struct<path: string>\)"),
        ({"image": pa.array([], pa.binary())}, "has no image in 1 Parquet file$"),
    ],
)
def test_a_file_without_images_is_refused_with_its_columns(table: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        index_images(str(write(tmp_path / "a.parquet", table)))


def test_a_file_that_is_cut_off_or_is_not_parquet_is_refused_in_one_line(tmp_path: Path) -> None:
    whole = write(tmp_path / "a.parquet", {"image": structs(9)}).read_bytes()
    for cut in (whole[:-1], whole[: len(whole) // 2], whole[:4], b"", b"<html>" * 99, whole[:-40] + whole[-8:]):
        (tmp_path / "a.parquet").write_bytes(cut)
        with pytest.raises(UserError, match=r"a\.parquet is not a whole Parquet file .*get it again") as error:
            index_images(str(tmp_path / "a.parquet"))
        assert "\n" not in str(error.value)


def test_a_file_that_is_named_twice_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", {"image": structs(2)})
    with pytest.raises(UserError, match=r"names \S+a\.parquet twice"):
        index_images(str(tmp_path / "{a,a}.parquet"))


def test_damage_is_refused_or_loses_rows_but_never_ends_the_process(tmp_path: Path) -> None:
    """Runs in a process of its own, since pyarrow ends the process on some damaged files."""
    write(tmp_path / "a.parquet", {"image": structs(2), "label": [1, 2]})
    write(tmp_path / "b.parquet", {"image": [PNG, PNG]}, rows_per_group=1)
    code = """if True:
        import contextlib, pathlib, random, sys
        from batchjob.data.reading import ReadFailure
        from batchjob.data.sources import index_images
        from batchjob.errors import UserError

        folder, random = pathlib.Path(sys.argv[1]), random.Random(2)
        whole = [(folder / name).read_bytes() for name in ("a.parquet", "b.parquet")]
        outcomes = {"refused": 0, "rows": 0}
        for i in range(500):
            data = bytearray(random.choice(whole))
            for _ in range(random.randint(1, 6)):
                data[random.randrange(len(data) // 2 * (i % 2), len(data))] = random.randrange(256)
            (folder / "c.parquet").write_bytes(data)
            try:
                index = index_images(str(folder / "c.parquet"))
                outcomes["rows"] += 1
            except UserError as error:
                outcomes["refused"] += 1
                assert "\\n" not in str(error), error
                continue
            for row in range(len(index)):
                with contextlib.suppress(ReadFailure):
                    index.read(row)
        print(min(outcomes.values()))
    """
    done = subprocess.run([sys.executable, "-c", code, tmp_path], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 50


def test_null_in_place_of_an_image_is_a_row_with_a_status(tmp_path: Path) -> None:
    rows = [{"bytes": PNG, "path": "a"}, None, {"bytes": None, "path": "b"}, {"bytes": b"", "path": "c"}]
    file = write(tmp_path / "a.parquet", {"image": pa.array(rows, IMAGE)})
    index = index_images(str(file))
    assert index.ids() == [f"a.parquet/{i}" for i in range(4)]
    assert [cause_of(index, i) for i in range(4)] == ["ok", "not_an_image", "not_an_image", "ok"]
    with open_loader(index, workers=0) as loader:
        (batch,) = loader.batches(0, 4)
    assert batch.status.tolist() == [0] + [STATUS["not_an_image"]] * 3


def test_rows_behind_damage_in_a_row_group_are_truncated_and_not_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = pa.table({"image": pa.array([picture(i) for i in range(8)])})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=4, compression="gzip", use_dictionary=False)
    chunk = parquet.ParquetFile(tmp_path / "a.parquet").metadata.row_group(0).column(0)
    with (tmp_path / "a.parquet").open("r+b") as file:
        file.seek(chunk.data_page_offset + chunk.total_compressed_size // 2)
        file.write(bytes(range(100)))
    index = index_images(str(tmp_path / "a.parquet"))
    starts = count_starts(monkeypatch)
    assert [cause_of(index, i) for i in range(8)] == ["truncated"] * 4 + ["ok"] * 4
    assert starts == {0: 1, 1: 1}


def count_starts(monkeypatch: pytest.MonkeyPatch) -> Counter[int]:
    """Counts how often each row group is opened from now on."""
    starts: Counter[int] = Counter()
    whole = parquet.ParquetFile.iter_batches

    def counted(self: Any, *args: Any, row_groups: list[int], **options: Any) -> Any:
        starts.update(row_groups)
        return whole(self, *args, row_groups=row_groups, **options)

    monkeypatch.setattr(parquet.ParquetFile, "iter_batches", counted)
    return starts


def test_rows_in_order_read_each_row_group_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = index_images(str(write(tmp_path / "a.parquet", {"image": structs(90)}, rows_per_group=30)))
    starts = count_starts(monkeypatch)
    with open_loader(index, workers=0, batch_size=8) as loader:
        assert all((batch.status == 0).all() for batch in loader.batches(0, 90))
    assert starts == {0: 1, 1: 1, 2: 1}
    index.close()
    starts.clear()
    assert all(index.read(row) == picture(row) for row in range(5, 90, 16))  # the rows that one of several workers gets
    assert starts == {0: 1, 1: 1, 2: 1}


def test_workers_give_the_rows_of_parquet_files_in_order(tmp_path: Path) -> None:
    for number in range(3):
        write(tmp_path / f"{number}.parquet", {"image": structs(20, first=20 * number)}, rows_per_group=7)
    index = index_images(str(tmp_path))
    index.save(tmp_path / "index")
    with open_loader(ImageIndex.load(tmp_path / "index"), workers=2, batch_size=8) as loader:
        widths = np.concatenate([batch.widths for batch in loader.batches(0, 60)])
    assert widths.tolist() == list(range(20, 80))


def test_a_file_that_changes_during_a_run_gives_no_pixels(tmp_path: Path) -> None:
    file = write(tmp_path / "a.parquet", {"image": structs(40)}, rows_per_group=20)
    index = index_images(str(file))
    assert index.read(0) == picture(0)
    write(file, {"image": structs(40, first=1)}, rows_per_group=20)
    os.utime(file, ns=(0, 1))
    assert [cause_of(index, row) for row in (1, 19, 20, 39)] == ["ok", "changed", "changed", "changed"]
    with pytest.raises(UserError, match=r"a\.parquet has changed since it was planned"):
        index.check()
    file.unlink()
    assert cause_of(index, 0) == "missing"


def test_a_name_that_is_not_utf_8_is_read(tmp_path: Path) -> None:
    file = write(tmp_path / "a.parquet", {"image": structs(2, path="ü.png")})
    odd = tmp_path / os.fsdecode(b"\xff.parquet")
    file.rename(odd)
    index = index_images(str(odd))
    assert index.ids() == [os.fsdecode(b"\xff.parquet") + "/0", os.fsdecode(b"\xff.parquet") + "/1"]
    assert index.read(1) == picture(1)


def test_a_huge_row_group_is_streamed_and_bounds_the_workers(tmp_path: Path) -> None:
    """Reads a row group of 256 MB in pages of 64 images of 0.5 MB: memory depends on the size of a page."""
    rng = np.random.default_rng(0)
    file = tmp_path / "a.parquet"
    schema = pa.schema([("image", pa.binary())])
    options: dict[str, Any] = {"write_batch_size": 64, "data_page_size": 1, "use_dictionary": False}
    with parquet.ParquetWriter(file, schema, **options) as writer:
        writer.write_table(pa.table({"image": pa.array([rng.bytes(500_000) for _ in range(512)])}), 512)
    code = (
        "import re, sys\nfrom batchjob.data.sources import index_images\n"
        "index = index_images(sys.argv[1])\n"
        "assert sum(len(index.read(i)) for i in range(512)) == 256_000_000\n"
        "print(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1], index.bytes_a_worker)"
    )
    done = subprocess.run([sys.executable, "-c", code, file], cwd=ROOT, capture_output=True, text=True, check=True)
    most_kb, need = (int(word) for word in done.stdout.split())
    assert most_kb * 1024 < 300e6
    assert 0.75e9 < need < 0.8e9
    assert choose_workers("auto", {}, bytes_each=need) <= max(1, total_memory_bytes() // (4 * need))
    assert choose_workers("auto", {}, bytes_each=total_memory_bytes()) == 1
    assert choose_workers("3", {}, bytes_each=total_memory_bytes()) == 3


def test_a_run_over_parquet_has_its_columns_as_coordinates(tmp_path: Path, batchjob: Command) -> None:
    columns = {"image": structs(5), "label": [0, 1, 0, 1, None], "category": ["a", "a", "b", "b", "b"]}
    file, run = write(tmp_path / "a.parquet", columns), tmp_path / "run"
    entry = {"height": 30, "width": 21, "id": 1, "file_name": "1.png"}
    shape = {"id": 1, "image_id": 1, "category_id": 3, "segmentation": [[0, 0, 21, 0, 21, 30, 0, 30]], "iscrowd": 0}
    known = tmp_path / "known.json"
    known.write_text(json.dumps({"images": [entry], "annotations": [shape], "categories": [{"id": 3, "name": "c"}]}))
    ended = batchjob("run", file, run, *TINY, "--workers", 0, "--annotations", known)
    assert ended.code == 0, ended.err
    for labels in (package.open(run), xarray.open_zarr(run / "labels.zarr")):
        assert labels.coords["label"].values.tolist() == ["0", "1", "0", "1", ""]
        assert labels.coords["image_category"].values.tolist() == ["a", "a", "b", "b", "b"]
        assert labels["category"].dims == ("image", "y", "x")
    assert (package.open(run)["category"].values[1] == 3).all()
    assert package.open(run).sel(image="a.parquet/3.png").label == "1"
    assert batchjob("show", run, "--verify").code == 0
