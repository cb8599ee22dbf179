import errno
import functools
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from multiprocessing.queues import Queue
from pathlib import Path

import numpy as np
import pytest
import torch

from batchjob.codes import STATUS
from batchjob.errors import UserError
from batchjob.loader import fork_server
from batchjob.loader.chunks import Recipe
from batchjob.loader.workers import Chunks
from tests.pictures import jpeg
from tests.poison import FILL, GEOMETRY, Poisoned, good_rows, make_files, open_loader, read_alone, rows_of


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> tuple[Path, list[str]]:
    """Makes a folder of good and bad files, and returns it with their names."""
    root = tmp_path_factory.mktemp("files")
    return root, make_files(root)


@pytest.fixture(scope="module")
def expected(files):
    return read_alone(*files)


def test_files_that_kill_their_worker_are_found_and_marked_and_the_rest_is_read(files, expected):
    names = [f"good{i % 4}.jpg" for i in range(30)]
    index = Poisoned(good_rows(files[0], 30), {7: "segfault", 20: "out of memory", 21: "exit"})
    with open_loader(index) as loader:
        batches = list(loader.batches(0, 30))
    failures = [f for b in batches for f in b.failures]
    assert [(row, cause) for row, cause, _ in failures] == [(row, "killed_worker") for row in (7, 20, 21)]
    for (_, _, message), how in zip(failures, ("SIGSEGV", "out of memory?", "ended with 3"), strict=True):
        assert "given up after 2 tries" in message
        assert how in message
    status = np.concatenate([b.status for b in batches])
    assert np.flatnonzero(status).tolist() == [7, 20, 21]
    pixels = np.concatenate([b.pixels.numpy() for b in batches])
    assert all(np.array_equal(pixels[i], expected[names[i]][3]) for i in range(30) if i not in (7, 20, 21))


def test_a_row_whose_worker_was_killed_once_is_read(files, tmp_path):
    index = Poisoned(good_rows(files[0], 12), {5: "once"}, str(tmp_path / "marker"))
    with open_loader(index) as loader:
        assert not np.concatenate([b.status for b in loader.batches(0, 12)]).any()


def test_a_read_that_never_ends_is_given_up(files):
    index = Poisoned(good_rows(files[0], 12), {5: "hang"})
    with open_loader(index, stall_s=1.0) as loader:
        began = time.monotonic()
        failures = [f for b in loader.batches(0, 12) for f in b.failures]
    assert [(row, cause) for row, cause, _ in failures] == [(5, "timeout")]
    assert time.monotonic() - began < 300


def test_workers_that_die_without_a_row_end_the_job_with_an_error(files, monkeypatch):
    monkeypatch.setattr("batchjob.loader.workers._enter_worker", os._exit)  # called with the worker's number
    with open_loader(good_rows(files[0], 4), workers=1) as loader, pytest.raises(UserError, match="--workers 0"):
        list(loader.batches(0, 4))


def test_a_bug_in_the_worker_is_raised_and_not_retried(files):
    index = Poisoned(good_rows(files[0], 4), {2: "bug"})
    with open_loader(index) as loader, pytest.raises(RuntimeError, match="a mistake of ours"):
        list(loader.batches(0, 4))


def test_full_shared_memory_is_named_with_the_way_out(files, monkeypatch):
    def full():
        raise OSError(errno.ENOSPC, "No space left on device")  # as making a semaphore does

    monkeypatch.setattr(fork_server, "start", full)
    with open_loader(good_rows(files[0], 4)) as loader, pytest.raises(UserError, match="--shm-size"):
        list(loader.batches(0, 4))


def test_an_error_at_the_start_of_the_workers_is_raised_unchanged(files, monkeypatch):
    def too_many():
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(fork_server, "start", too_many)
    with open_loader(good_rows(files[0], 4)) as loader, pytest.raises(OSError, match="Too many open files"):
        list(loader.batches(0, 4))


def test_another_range_may_be_asked_for_while_slow_files_are_being_read(files):
    index = Poisoned(good_rows(files[0], 20), dict.fromkeys(range(8, 20), "slow"))
    with open_loader(index, workers=1) as loader:
        loader.announce([(0, 8), (8, 16), (16, 20)])
        rows = [row for batch in loader.batches(0, 8) for row in batch.rows]
        rows += [row for batch in loader.batches(16, 20) for row in batch.rows]
        assert rows == [*range(8), *range(16, 20)]


def test_a_loader_closes_while_a_read_hangs(files, monkeypatch):
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.5)  # for so long torch waits for a worker
    index = Poisoned(good_rows(files[0], 12), {5: "hang"})
    loader = open_loader(index)
    next(iter(loader.batches(0, 12)))
    began = time.monotonic()
    loader.close()
    assert time.monotonic() - began < 100
    assert not [thread for thread in threading.enumerate() if thread.name == "ahead"]


def test_a_loader_that_is_closed_leaves_no_thread_to_remove_semaphores_while_python_exits(files, monkeypatch):
    feed = Queue._feed

    def feed_late(*arguments):  # the arguments hold the semaphores
        feed(*arguments)
        time.sleep(0.5)

    monkeypatch.setattr(Queue, "_feed", staticmethod(feed_late))
    before = threading.enumerate()  # a pool of processes has such a thread, too
    with open_loader(good_rows(files[0], 4)) as loader:
        list(loader.batches(0, 4))
    assert [t.name for t in threading.enumerate() if t not in before and t.name == "QueueFeederThread"] == []


def test_a_slot_is_not_reused_until_the_next_chunk_is_asked_for(files):
    index = good_rows(files[0], 40)
    recipe = Recipe(index, GEOMETRY, FILL, "bicubic")
    chunks = Chunks(recipe, workers=1, batch_size=3, stall_s=60.0)  # the four photos come again, in other slots
    try:
        for chunk, pixels in chunks.read([(0, 40)]):
            before = pixels.clone()
            time.sleep(0.02)  # the worker goes on as far as free slots allow
            assert torch.equal(pixels, before), chunk.start
    finally:
        chunks.close()


@pytest.mark.gpu
@pytest.mark.parametrize("workers", [0, 1])
def test_batches_for_a_gpu_are_in_page_locked_memory(files, workers):
    with open_loader(good_rows(files[0], 8), workers=workers, pin_for=torch.device("cuda", 0)) as loader:
        assert all(batch.pixels.is_pinned() for batch in loader.batches(0, 8))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a small /dev/shm")
def test_a_dev_shm_of_64_kb_is_enough(photos):
    small = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs -o size=64k none /dev/shm && exec "$@"', "sh"]
    if subprocess.run([*small, "true"], capture_output=True).returncode:
        pytest.skip("this machine does not let root mount")
    process = run_script(photos, "go on", before=small, stderr=subprocess.PIPE)
    assert process.communicate(timeout=300) == ("True\n", "")


def test_a_job_that_ends_by_an_error_with_the_loader_open_ends(photos):
    process = run_script(photos, "fail", stderr=subprocess.PIPE)
    out, err = process.communicate(timeout=300)
    assert (out, process.returncode) == ("", 1)
    assert "RuntimeError: in the middle" in err


SIGNALLED = """
import os, signal, sys
from pathlib import Path
from batchjob.geometry import Geometry
from batchjob.loader.loader import Loader
from batchjob.data.sources import index_images
if __name__ == "__main__":
    index = index_images(sys.argv[1])
    loader = Loader(index, Geometry(28, 28, 14, 14), fill_rgb=(0, 0, 0), batch_size=2, workers=2)
    if sys.argv[2] == "fail":
        for _ in loader.batches(0, len(index)):
            raise RuntimeError("in the middle")
    with loader:
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


def run_script(root: Path, what: str, before: Sequence[str] = (), **options):
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    script = root.parent / "signalled.py"
    script.write_text(SIGNALLED)
    command = [*before, sys.executable, str(script), str(root), what]
    return subprocess.Popen(command, env=env, start_new_session=True, text=True, stdout=subprocess.PIPE, **options)


@pytest.fixture
def photos(tmp_path) -> Path:
    (tmp_path / "photos").mkdir()
    for i in range(60):
        (tmp_path / "photos" / f"{i:02}.jpg").write_bytes(jpeg(seed=i % 3))
    return tmp_path / "photos"


def test_a_scheduler_s_signals_to_all_processes_do_not_end_the_workers(photos):
    process = run_script(photos, "go on", stderr=subprocess.PIPE)
    out, err = process.communicate(timeout=300)
    assert (out, err, process.returncode) == ("True\n", "", 0)


def test_a_terminal_s_interrupt_during_the_start_is_one_line(photos):
    command = [sys.executable, "-m", "batchjob", "run", str(photos), str(photos.parent / "run")]
    # a shell's background job ignores the interrupt, and the command would inherit that
    heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, start_new_session=True, text=True, preexec_fn=heed, **streams)
    server = None
    while server is None and process.poll() is None:  # the fork server imports for seconds
        server = next(
            (p for p in Path("/proc").iterdir() if p.name.isdigit() and "forkserver" in started_by(p, process)), None
        )
    time.sleep(0.3)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=300)
    assert (process.returncode, err) == (
        75,
        "batchjob: interrupted (SIGINT); the same command goes on where it stopped\n",
    )


def started_by(process: Path, job: subprocess.Popen) -> str:
    """Returns the process's command line if it belongs to the job's session, else an empty text."""
    try:
        return (process / "cmdline").read_text() if session_of(process) == job.pid else ""
    except OSError:
        return ""


@pytest.mark.slow
def test_workers_do_not_outlive_a_killed_job(photos):
    process = run_script(photos, "wait", stderr=subprocess.DEVNULL)
    with process.stdout as out:
        assert out.readline() == "ready\n"
    process.kill()
    process.wait()
    for _ in range(600):
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


def resident_mb(pid: int) -> float:
    line = next(li for li in Path(f"/proc/{pid}/status").read_text().splitlines() if li.startswith("VmRSS"))
    return int(line.split()[1]) / 1024


def held(pid: int) -> tuple[int, int]:
    """Returns (threads, open descriptors) of a process."""
    return len(os.listdir(f"/proc/{pid}/task")), len(os.listdir(f"/proc/{pid}/fd"))


@pytest.mark.slow
def test_reading_20000_images_with_bad_ones_of_every_kind_keeps_memory_threads_and_descriptors(files, expected):
    root, names = files
    bad = [n for n in [*names, "missing.jpg"] if expected[n][0]]
    order = [f"good{i % 4}.{'jpg' if i % 3 else 'png'}" for i in range(20_000)]
    for i in range(200):
        order[100 * i + 37] = bad[i % len(bad)]
    deeds = {4000: "segfault", 9000: "out of memory", 13_000: "hang", 17_000: "exit"}
    index = Poisoned(rows_of(root, order), deeds)
    seen, sizes, handles = 0, [], []
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
            handles.append(held(os.getpid()))
    print(f"main and worker, MB: {np.round(sizes).astype(int).tolist()}; threads and descriptors: {handles}")
    assert seen == 20_000
    main, worker = np.array(sizes).T
    assert main[-1] - main[1] < 30, sizes
    assert worker[2:].max() - worker[1] < 60, sizes
    threads, descriptors = np.array(handles).T
    # the thread that restarts a worker may be running, and the new worker be counted beside the old one
    assert threads[1:].max() - threads[1] <= 2, handles
    assert descriptors[1:].max() - descriptors[1] <= 4, handles
