import itertools
import multiprocessing
import pickle
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from batchjob.codes import STATUS
from batchjob.data.sources import ImageIndex, index_images
from batchjob.errors import UserError
from batchjob.loader import chunks
from batchjob.loader.loader import bottleneck
from batchjob.loader.workers import sizing
from batchjob.machine import choose_workers
from tests.pictures import jpeg
from tests.poison import good_rows, make_files, open_loader, read_alone, rows_of


@pytest.fixture(scope="module", autouse=True)
def no_waits() -> Iterator[None]:
    """Switches off the waits before missing files are read again, since they stay missing in these tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks, "RETRY_AFTER_S", (0.0, 0.0))
        yield


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> tuple[Path, list[str]]:
    """Makes a folder of good and bad files, and returns it with their names."""
    root = tmp_path_factory.mktemp("files")
    return root, make_files(root)


@pytest.fixture(scope="module")
def expected(files):
    return read_alone(*files)


def check(loader, names, ranges, expected, batch_size):
    """Checks everything that a loader promises, for these ranges."""
    for start, stop in ranges:
        batches = list(loader.batches(start, stop))
        assert [len(b.rows) for b in batches[:-1]] == [batch_size] * (len(batches) - 1)
        assert [row for b in batches for row in b.rows] == list(range(start, stop))
        for batch in batches:
            assert batch.pixels.shape == (len(batch.rows), 3, 28, 28)
            for i, row in enumerate(batch.rows):
                status, height, width, pixels = expected[names[row]]
                assert (batch.status[i], batch.heights[i], batch.widths[i]) == (status, height, width), names[row]
                assert np.array_equal(batch.pixels[i].numpy(), np.zeros((3, 28, 28)) if pixels is None else pixels)
            failed = [row for row, status in zip(batch.rows, batch.status, strict=True) if status]
            assert [row for row, _, _ in batch.failures] == failed
            assert all(STATUS[cause] and message for _, cause, message in batch.failures)


def data_of(draw, names):
    order = draw(st.lists(st.sampled_from([*names, "missing.jpg"]), min_size=1, max_size=40))
    cuts = draw(st.lists(st.integers(1, len(order)), max_size=4, unique=True))
    borders = [0, *sorted(cuts), *([len(order)] if len(order) not in cuts else [])]
    ranges = list(itertools.pairwise(borders))
    return order, ranges, draw(st.integers(1, 9)), draw(st.booleans())


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_order_of_good_and_bad_files_any_batch_and_any_partitions_give_the_same_rows(files, expected, data):
    order, ranges, batch_size, is_announced = data_of(data.draw, files[1])
    with open_loader(rows_of(files[0], order), batch_size=batch_size, workers=0) as loader:
        if is_announced:
            loader.announce(ranges)
        check(loader, order, ranges, expected, batch_size)


@settings(max_examples=4, deadline=None)
@given(data=st.data(), workers=st.integers(1, 3))
def test_any_number_of_workers_gives_the_same_rows(files, expected, data, workers):
    order, ranges, batch_size, is_announced = data_of(data.draw, files[1])
    with open_loader(rows_of(files[0], order), batch_size=batch_size, workers=workers) as loader:
        if is_announced:
            loader.announce(ranges)
        check(loader, order, ranges, expected, batch_size)


def test_ranges_may_be_asked_for_in_any_order_and_be_left_half_read(files, expected):
    names = files[1]
    with open_loader(rows_of(*files), batch_size=3) as loader:
        loader.announce([(0, 9), (9, 12)])
        next(loader.batches(0, 9))
        check(loader, names, [(5, 11), (0, 4)], expected, 3)
        loader.announce([(0, 5), (5, 5), (5, 12), (20, 22)])
        check(loader, names, [(0, 5), (5, 12), (5, 12), (20, 22), (2, 3)], expected, 3)
        loader.announce([(0, 5), (5, 12), (12, 14), (14, 18)])
        check(loader, names, [(5, 12), (14, 18), (12, 14), (14, 18)], expected, 3)
        assert list(loader.batches(4, 4)) == []


@pytest.mark.parametrize("workers", [0, 1, 16, 200])
@pytest.mark.parametrize("image_px", [28, 224, 1024, 4096])
@pytest.mark.parametrize("batch_size", [1, 16, 256])
def test_what_is_decoded_ahead_is_bounded_in_bytes(workers, image_px, batch_size):
    row_bytes = 3 * image_px**2
    if workers * row_bytes > 2**30:
        with pytest.raises(UserError, match="--workers 200 need 9648 MB"):
            sizing(row_bytes=row_bytes, batch_size=batch_size, workers=workers)
        return
    found = sizing(row_bytes=row_bytes, batch_size=batch_size, workers=workers)
    assert 1 <= found.rows_per_chunk <= batch_size
    assert found.slots == max(1, workers) * found.prefetch_factor + 1
    assert found.bytes_in_flight == found.slots * found.rows_per_chunk * row_bytes <= 2**30
    if workers and image_px == 224:
        assert found.rows_per_chunk * found.prefetch_factor * workers >= min(2 * batch_size, 2**30 // row_bytes // 2)


def test_a_worker_receives_only_the_folder_of_a_saved_index(files, tmp_path):
    index = good_rows(files[0], 5000)
    index.save(tmp_path / "index")
    assert len(pickle.dumps(ImageIndex.load(tmp_path / "index"))) < 1000


def anonymous_kb() -> int:
    line = next(li for li in Path("/proc/self/status").read_text().splitlines() if li.startswith("RssAnon"))
    return int(line.split()[1])


def test_reading_every_row_of_a_mapped_index_takes_no_memory_of_the_process(files, tmp_path):
    good_rows(files[0], 200_000).save(tmp_path / "index")
    index = ImageIndex.load(tmp_path / "index")
    index.id(0)
    before = anonymous_kb()
    assert sum(len(index.id(i)) for i in range(len(index))) == sum(len(str(i)) for i in range(200_000))
    assert anonymous_kb() - before < 2000


def test_a_closed_loader_leaves_no_process(files):
    before = set(multiprocessing.active_children())
    with open_loader(good_rows(files[0], 20)) as loader:
        next(loader.batches(0, 20))
        assert len(set(multiprocessing.active_children()) - before) == 2
    assert set(multiprocessing.active_children()) <= before


def test_data_that_is_gone_or_has_changed_is_refused_before_any_work(tmp_path, files):
    root = tmp_path / "gone"
    root.mkdir()
    (root / "a.jpg").write_bytes(jpeg())
    index = index_images(str(root))
    shutil.rmtree(root)
    with pytest.raises(UserError, match="is not a folder now"):
        open_loader(index)


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [
        ({"waited_s": 2}, "waited 2 %.*the model and the clustering set the pace.*--gpus"),
        ({"waited_s": 2, "device": "cpu"}, "--device cuda"),
        ({"waited_s": 60, "decode_s": 200}, "waited 60 %.*decoding sets the pace; --workers 16"),
        ({"waited_s": 60, "decode_s": 200, "workers": 16}, "decoding sets the pace, on all of 16 cores"),
        ({"waited_s": 60, "read_s": 200}, "reading sets the pace.*--workers 8.*packed in tars"),
        ({"waited_s": 0, "total_s": 0}, "waited 0 %"),
        ({"waited_s": 1, "device": "cpu"}, "a GPU .--device cuda. would help"),
        ({"waited_s": 1, "device": "cpu", "in_job": True}, "more tasks or nodes would help"),
    ],
)
def test_the_bottleneck_is_named_with_the_option_that_helps(numbers, expected):
    usual = {"total_s": 100, "read_s": 1, "decode_s": 1, "workers": 4, "cores": 16, "device": "cuda"}
    sentence = bottleneck(**(usual | numbers)).replace("%", " %")
    assert re.search(expected, sentence), sentence


def test_workers_are_the_cores_but_one_shared_by_the_ranks_of_a_node(monkeypatch):
    monkeypatch.setattr("batchjob.machine.usable_cores", lambda: 33)
    assert [choose_workers(asked, {}) for asked in ("auto", "0", "5")] == [16, 0, 5]
    assert choose_workers("auto", {"LOCAL_WORLD_SIZE": "4"}) == 7
    assert choose_workers("auto", {"LOCAL_WORLD_SIZE": "64"}) == 1


def test_the_times_of_waiting_and_of_the_workers_are_counted(files):
    with open_loader(good_rows(files[0], 40), workers=0) as loader:
        list(loader.batches(0, 40))
        assert loader.read_s > 0
        assert loader.decode_s > 0
        assert loader.waited_s >= loader.read_s + loader.decode_s


@pytest.mark.parametrize("workers", [0, 1])
def test_reading_does_not_change_torch_s_random_numbers(files, workers):
    with torch.random.fork_rng(), open_loader(good_rows(files[0], 4), workers=workers) as loader:
        torch.manual_seed(3)
        wanted = torch.rand(4)
        torch.manual_seed(3)
        list(loader.batches(0, 4))
        assert torch.equal(torch.rand(4), wanted)
