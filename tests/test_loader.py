import itertools
import multiprocessing
import os
import pickle
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchjob.errors import UserError
from batchjob.geometry import Geometry
from batchjob.images import STATUS, ReadFailure, decode
from batchjob.index import IndexBuilder
from batchjob.jpeg import accelerate
from batchjob.loader import Loader, bottleneck
from batchjob.sources import ImageIndex, index_images
from batchjob.workers import sizing
from tests.pictures import bad_files, jpeg, png
from tests.poison import Poisoned

GEOMETRY = Geometry(28, 28, 14, 14)
FILL = (1, 2, 3)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> tuple[Path, list[str]]:
    """A folder of good and bad files, and their names."""
    root = tmp_path_factory.mktemp("files")
    for i in range(4):
        (root / f"good{i}.jpg").write_bytes(jpeg(40 + i, 30, seed=i))
        (root / f"good{i}.png").write_bytes(png(30, 40 + i, seed=i))
    for name, (data, _) in bad_files().items():
        (root / name).write_bytes(data)
    (root / "dangling.jpg").symlink_to("nowhere")
    os.mkfifo(root / "fifo.jpg")
    (root / "folder.jpg").mkdir()
    return root, sorted(p.name for p in root.iterdir())


@pytest.fixture(scope="module")
def expected(files):
    """Name -> (status, height, width, pixels), read one by one in this process."""
    root, names = files
    found = {}
    for name in [*names, "missing.jpg"]:
        try:
            image = decode(root / name, GEOMETRY, FILL, accelerate=accelerate)
            found[name] = (0, image.height, image.width, image.pixels)
        except ReadFailure as failure:
            found[name] = (STATUS[failure.cause], 0, 0, None)
    return found


def rows_of(root: Path, names: list[str]) -> ImageIndex:
    builder = IndexBuilder()
    for i, name in enumerate(names):
        builder.add(os.fsencode(name), id=f"{i}")
    return builder.build(os.fsencode(root))


def good_rows(root: Path, count: int) -> ImageIndex:
    return rows_of(root, [f"good{i % 4}.jpg" for i in range(count)])


def open_loader(index, *, batch_size=4, workers=2, **options) -> Loader:
    return Loader(index, GEOMETRY, fill_rgb=FILL, batch_size=batch_size, workers=workers, **options)


def check(loader, names, ranges, expected, batch_size):
    """Everything that a loader promises, for these ranges."""
    for start, stop in ranges:
        batches = list(loader.batches(start, stop))
        assert [len(b.rows) for b in batches[:-1]] == [batch_size] * (len(batches) - 1)
        assert [row for b in batches for row in b.rows] == list(range(start, stop))
        for batch in batches:
            assert batch.pixels.shape == (len(batch.rows), 3, 28, 28)
            for i, row in enumerate(batch.rows):
                status, height, width, pixels = expected[names[row]]
                assert (batch.status[i], batch.heights[i], batch.widths[i]) == (status, height, width), names[row]
                assert pixels is None or np.array_equal(batch.pixels[i].numpy(), pixels)
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


@settings(max_examples=5, deadline=None)
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
        check(loader, names, [(0, 5), (5, 12), (2, 3)], expected, 3)
        assert list(loader.batches(4, 4)) == []


@pytest.mark.parametrize("deed", ["segfault", "out of memory", "exit"])
def test_a_file_that_kills_its_worker_is_found_and_marked_and_the_rest_is_read(files, expected, deed):
    names = [f"good{i % 4}.jpg" for i in range(30)]
    index = Poisoned(good_rows(files[0], 30), {7: deed, 20: deed})
    with open_loader(index) as loader:
        batches = list(loader.batches(0, 30))
    failures = [f for b in batches for f in b.failures]
    assert [(row, cause) for row, cause, _ in failures] == [(7, "killed_worker"), (20, "killed_worker")]
    how = {"segfault": "SIGSEGV", "out of memory": "out of memory?", "exit": "ended with 3"}[deed]
    assert all("given up after 2 tries" in message and how in message for _, _, message in failures)
    status = np.concatenate([b.status for b in batches])
    assert np.flatnonzero(status).tolist() == [7, 20]
    pixels = np.concatenate([b.pixels.numpy() for b in batches])
    assert all(np.array_equal(pixels[i], expected[names[i]][3]) for i in range(30) if i not in (7, 20))


def test_a_worker_killed_once_costs_no_row(files, tmp_path):
    index = Poisoned(good_rows(files[0], 12), {5: "once"}, str(tmp_path / "marker"))
    with open_loader(index) as loader:
        assert not np.concatenate([b.status for b in loader.batches(0, 12)]).any()


def test_a_read_that_never_ends_is_given_up(files):
    index = Poisoned(good_rows(files[0], 12), {5: "hang"})
    with open_loader(index, stall_s=1.0) as loader:
        began = time.monotonic()
        failures = [f for b in loader.batches(0, 12) for f in b.failures]
    assert [(row, cause) for row, cause, _ in failures] == [(5, "timeout")]
    assert time.monotonic() - began < 60


def test_workers_that_die_with_nothing_in_hand_end_the_job_with_a_word(files, monkeypatch):
    monkeypatch.setattr("batchjob.workers._enter_worker", os._exit)  # called with the worker's number
    with open_loader(good_rows(files[0], 4), workers=1) as loader, pytest.raises(UserError, match="--workers 0"):
        list(loader.batches(0, 4))


def test_a_mistake_in_the_worker_is_raised_and_not_retried(files):
    index = Poisoned(good_rows(files[0], 4), {2: "bug"})
    with open_loader(index) as loader, pytest.raises(RuntimeError, match="a mistake of ours"):
        list(loader.batches(0, 4))


def test_full_shared_memory_is_named_with_the_way_out(files):
    index = Poisoned(good_rows(files[0], 4), {2: "shared memory"})
    with open_loader(index) as loader, pytest.raises(UserError, match="--shm-size"):
        list(loader.batches(0, 4))


def test_too_little_shared_memory_is_refused_before_any_work(files, monkeypatch):
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2000))
    with pytest.raises(UserError, match="/dev/shm has"):
        open_loader(good_rows(files[0], 4))


@pytest.mark.parametrize("workers", [0, 1, 16, 200])
@pytest.mark.parametrize("image_px", [28, 224, 1024, 4096])
@pytest.mark.parametrize("batch_size", [1, 16, 256])
def test_what_is_decoded_ahead_is_bounded_in_bytes(workers, image_px, batch_size):
    free = 16 * 2**30
    row_bytes = 3 * image_px**2
    if workers * row_bytes > 2**30:
        with pytest.raises(UserError, match="--workers 200 need 9600 MB"):
            sizing(row_bytes=row_bytes, batch_size=batch_size, workers=workers, free_bytes=free)
        return
    found = sizing(row_bytes=row_bytes, batch_size=batch_size, workers=workers, free_bytes=free)
    assert 1 <= found.rows_per_chunk <= batch_size
    assert found.bytes_in_flight <= 2**30
    if workers and image_px == 224:
        assert found.rows_per_chunk * found.prefetch_factor * workers >= min(2 * batch_size, 2**30 // row_bytes // 2)
    scarce = sizing(row_bytes=150_528, batch_size=256, workers=4, free_bytes=64 * 2**20)
    assert scarce.bytes_in_flight <= 32 * 2**20


def test_a_saved_index_costs_a_worker_its_folder_s_name_only(files, tmp_path):
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


SIGNALLED = """
import os, signal, sys
from pathlib import Path
from batchjob.geometry import Geometry
from batchjob.loader import Loader
from batchjob.sources import index_images
if __name__ == "__main__":
    index = index_images(sys.argv[1])
    with Loader(index, Geometry(28, 28, 14, 14), fill_rgb=(0, 0, 0), batch_size=2, workers=2) as loader:
        batches = loader.batches(0, len(index))
        rows = list(next(batches).rows)
        if sys.argv[2] == "wait":
            print("ready", flush=True)
            signal.pause()
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, signal.SIG_IGN)
            os.killpg(0, number)
        for batch in batches:
            rows += list(batch.rows)
        print(rows == list(range(len(index))))
"""


def run_script(root: Path, what: str, **options):
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    script = root.parent / "signalled.py"
    script.write_text(SIGNALLED)
    command = [sys.executable, str(script), str(root), what]
    return subprocess.Popen(command, env=env, start_new_session=True, text=True, stdout=subprocess.PIPE, **options)


@pytest.fixture
def photos(tmp_path) -> Path:
    (tmp_path / "photos").mkdir()
    for i in range(60):
        (tmp_path / "photos" / f"{i:02}.jpg").write_bytes(jpeg(seed=i % 3))
    return tmp_path / "photos"


def test_a_scheduler_s_signals_to_all_processes_do_not_end_the_workers(photos):
    process = run_script(photos, "go on", stderr=subprocess.PIPE)
    out, err = process.communicate(timeout=120)
    assert (out, err, process.returncode) == ("True\n", "", 0)


@pytest.mark.slow
def test_workers_do_not_outlive_a_killed_job(photos):
    process = run_script(photos, "wait")
    assert process.stdout.readline() == "ready\n"
    process.kill()
    process.wait()
    for _ in range(60):
        left = [p for p in Path("/proc").iterdir() if p.name.isdigit() and session_of(p) == process.pid]
        if not left:
            break
        time.sleep(0.5)
    assert not left


def session_of(folder: Path) -> int:
    try:
        return os.getsid(int(folder.name))
    except OSError:
        return -1


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
    with pytest.raises(UserError, match="is no folder now"):
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
    ],
)
def test_the_bottleneck_is_named_with_the_option_that_helps(numbers, expected):
    usual = {"total_s": 100, "read_s": 1, "decode_s": 1, "workers": 4, "cores": 16, "device": "cuda"}
    sentence = bottleneck(**(usual | numbers)).replace("%", " %")
    assert re.search(expected, sentence), sentence


def test_what_the_caller_waited_and_the_workers_did_is_counted(files):
    with open_loader(good_rows(files[0], 40), workers=0) as loader:
        list(loader.batches(0, 40))
        assert loader.read_s > 0
        assert loader.decode_s > 0
        assert loader.waited_s >= loader.read_s + loader.decode_s


def resident_mb(pid: int) -> float:
    line = next(li for li in Path(f"/proc/{pid}/status").read_text().splitlines() if li.startswith("VmRSS"))
    return int(line.split()[1]) / 1024


@pytest.mark.slow
def test_a_soak_of_20000_images_with_bad_ones_of_every_kind_keeps_its_memory(files, expected):
    root, names = files
    bad = [n for n in [*names, "missing.jpg"] if expected[n][0]]
    order = [f"good{i % 4}.{'jpg' if i % 3 else 'png'}" for i in range(20_000)]
    for i in range(200):
        order[100 * i + 37] = bad[i % len(bad)]
    deeds = {4000: "segfault", 9000: "out of memory", 13_000: "hang", 17_000: "exit"}
    index = Poisoned(rows_of(root, order), deeds)
    seen, sizes = 0, []
    with open_loader(index, batch_size=64, stall_s=3.0) as loader:
        for start in range(0, 20_000, 2000):
            for batch in loader.batches(start, start + 2000):
                for i, row in enumerate(batch.rows):
                    assert row == seen
                    seen += 1
                    status, _, _, pixels = expected[order[row]]
                    if row in deeds:
                        assert batch.status[i] == STATUS["timeout" if deeds[row] == "hang" else "killed_worker"]
                    else:
                        assert batch.status[i] == status
                        assert pixels is None or np.array_equal(batch.pixels[i].numpy(), pixels)
            workers = [resident_mb(p.pid) for p in multiprocessing.active_children() if p.pid]
            sizes.append((resident_mb(os.getpid()), max(workers)))
    assert seen == 20_000
    main, worker = np.array(sizes).T
    assert main[-1] - main[1] < 30, sizes
    assert worker[2:].max() - worker[1] < 60, sizes
