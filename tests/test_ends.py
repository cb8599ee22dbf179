"""Ends of commands: exit codes and one line for signals, pipes, disks and limits; no process is left, none hangs."""

import errno
import io
import os
import signal
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from batchjob.data.sources import index_images
from batchjob.errors import UserError
from batchjob.launch import ends
from batchjob.launch.signals import Stop
from batchjob.model.weights import Weights, state_dict
from batchjob.store import lifecycle as store
from batchjob.store.partitions import marker_path, published
from tests.chaos_verbs import is_running, session, wait_for_handlers
from tests.conftest import ROOT, TINY, Command
from tests.made_up_runs import write_annotations, write_run
from tests.runs import Ids, label, made_up_plan
from tests.test_job import make_photos

COMMAND = [sys.executable, "-m", "batchjob"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_ends_with_work_left_and_handlers_are_restored(number: signal.Signals, capfd) -> None:  # type: ignore[no-untyped-def]
    before = signal.getsignal(number)

    def work() -> int:
        os.kill(os.getpid(), number)
        time.sleep(5)
        return 0

    assert ends.code_of(work) == 75
    assert number.name in capfd.readouterr().err
    assert signal.getsignal(number) is before


@pytest.mark.parametrize(
    ("number", "code"),
    [(errno.ENOSPC, 75), (errno.EDQUOT, 75), (errno.EROFS, 2), (errno.EACCES, 2), (errno.EMFILE, 75), (errno.EIO, 75)],
)
def test_an_error_of_the_system_is_one_line_with_the_file(number: int, code: int, capfd) -> None:  # type: ignore[no-untyped-def]
    def work() -> int:
        raise OSError(number, os.strerror(number), "/runs/a\x1b[31m\nb/stats")

    assert ends.code_of(work) == code
    said = capfd.readouterr().err
    assert "/runs/a\\x1b[31m\\nb/stats" in said
    assert said.count("\n") == 1


def test_an_interrupt_that_a_library_takes_for_its_own_failure_is_an_interrupt(
    capfd: pytest.CaptureFixture[str],
) -> None:
    def work() -> int:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        except KeyboardInterrupt:
            raise TypeError("got an unexpected keyword argument") from None
        return 0

    assert ends.code_of(work) == 75
    assert capfd.readouterr().err == "batchjob: interrupted (SIGTERM); the same command goes on where it stopped\n"


class Signalled:
    """An object in whose `__del__` the process gets a signal; Python drops what is raised there."""

    def __init__(self, number: signal.Signals) -> None:
        self._number = number

    def __del__(self) -> None:
        os.kill(os.getpid(), self._number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_inside_a_del_interrupts_right_after_it(
    number: signal.Signals, capfd: pytest.CaptureFixture[str]
) -> None:
    hook = sys.unraisablehook

    def work() -> int:
        Signalled(number)
        time.sleep(5)
        return 0

    assert ends.code_of(work) == 75
    assert (
        capfd.readouterr().err == f"batchjob: interrupted ({number.name}); the same command goes on where it stopped\n"
    )
    assert sys.unraisablehook is hook


def test_a_second_interrupt_inside_a_del_ends_a_loop_that_notes_signals() -> None:
    hook = sys.unraisablehook

    def work() -> None:
        with Stop() as stop:
            os.kill(os.getpid(), signal.SIGINT)
            assert stop()
            Signalled(signal.SIGINT)
            time.sleep(5)

    with pytest.raises(KeyboardInterrupt):
        work()
    assert sys.unraisablehook is hook


def test_a_loop_in_another_thread_leaves_signals_to_the_main_one() -> None:
    before, found = signal.getsignal(signal.SIGTERM), []

    def work() -> None:
        with Stop() as stop:
            found.append((stop(), signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [(False, before)]


def test_a_signal_inside_a_del_of_the_first_imports_ends_75_without_a_word(tmp_path: Path) -> None:
    (tmp_path / "signalled.py").write_text(
        "import os, signal, time\nfrom batchjob.launch import signals\n"
        "class Signalled:\n    def __del__(self):\n        os.kill(os.getpid(), signal.SIGTERM)\n"
        "signals.exit_at_once()\nSignalled()\ntime.sleep(5)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "signalled.py"], cwd=tmp_path, env=environment, check=False, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (75, "")


def test_numpys_error_on_a_full_disk_is_recognised(capfd: pytest.CaptureFixture[str]) -> None:
    def work() -> int:
        with open("/dev/full", "wb") as full:
            np.save(full, np.zeros(100_000))  # this error does not have an errno
        return 0

    assert ends.code_of(work) == 75
    assert "No space left on device; free some space" in capfd.readouterr().err


def test_a_bug_keeps_its_traceback() -> None:
    def work() -> int:
        raise FileNotFoundError(errno.ENOENT, "gone")

    with pytest.raises(FileNotFoundError):
        ends.code_of(work)


@pytest.mark.parametrize("delay_s", [0.0, 2.5])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_plan_that_gets_a_signal_ends_75_without_a_traceback(
    tmp_path: Path, number: signal.Signals, delay_s: float
) -> None:
    photos = make_photos(tmp_path / "photos", 2)
    arguments = ["plan", str(photos), str(tmp_path / "run"), *TINY]
    process = subprocess.Popen([*COMMAND, *arguments], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    wait_for_handlers(process)
    time.sleep(delay_s)
    is_planned = (tmp_path / "run" / "plan.json").exists()  # a fast machine may be done by now
    process.send_signal(number)
    _, said = process.communicate(timeout=300)
    assert process.returncode in ({0, 75} if is_planned else {75}), said
    assert "Traceback" not in said


def test_an_interrupt_inside_an_exec_ends_75_too(tmp_path: Path) -> None:
    """Tests a module run by `-m`, where Python checks for an unhandled interrupt and ends by SIGINT."""
    (tmp_path / "interrupted.py").write_text(
        "import sys\nfrom batchjob.launch import ends\n"
        "sys.exit(ends.code_of(lambda: exec('raise KeyboardInterrupt')))\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "interrupted"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, check=False, capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("interrupted")) == (75, 1)


END_IN_A_READ = """
import os, signal, sys, threading
import zarr
from batchjob import __main__ as command
from batchjob.launch import ends
from batchjob.launch.signals import Stop

array = zarr.create_array(sys.argv[1], shape=100_000, chunks=1, dtype="u1")

def work():
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()
    array[:]
    raise AssertionError("the read ended before the signal came")

command.main = lambda: ends.code_of(work)
command.entry()
"""


def test_a_command_that_ends_while_zarr_reads_says_one_line(tmp_path: Path) -> None:
    """zarr's thread goes on reading while Python ends, and has a traceback for each chunk that it can't read."""
    command = [sys.executable, "-c", END_IN_A_READ, str(tmp_path / "a.zarr")]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 75
    assert ended.stderr == "batchjob: interrupted (SIGTERM); the same command goes on where it stopped\n"


def test_a_run_whose_reader_goes_away_ends_with_work_left_and_goes_on(tmp_path: Path) -> None:
    photos, run = make_photos(tmp_path / "photos", 2), tmp_path / "run"
    arguments = ["run", str(photos), str(run), *TINY, "--workers", "0"]
    reading, writing = os.pipe()
    process = subprocess.Popen([*COMMAND, *arguments], cwd=ROOT, stdout=writing, stderr=writing)
    os.close(writing)
    os.read(reading, 1)
    os.close(reading)
    assert process.wait(300) == 75
    assert subprocess.run([*COMMAND, *arguments], cwd=ROOT, check=False, capture_output=True).returncode == 0


def test_a_full_stdout_is_one_line(tmp_path: Path) -> None:
    photos, run = make_photos(tmp_path / "photos", 2), tmp_path / "run"
    with open("/dev/full", "wb") as full:
        arguments = ["plan", str(photos), str(run), *TINY]
        done = subprocess.run(
            [*COMMAND, *arguments], cwd=ROOT, check=False, stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert done.returncode == 75, done.stderr
    assert "batchjob: No space left on device; free some space" in done.stderr


def children_of(process: int) -> list[int]:
    return [int(p) for p in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


POOL = """
import sys
from batchjob.children import ChildPool
if __name__ == "__main__":
    with ChildPool(2, method=sys.argv[1]) as pool:
        found = [pool.submit(exec, f"import time; open('begun-{i}', 'w').close(); time.sleep(3600)") for i in range(2)]
        found[0].result()
"""


@pytest.mark.parametrize("method", ["spawn", "fork"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_the_processes_of_a_pool_end_with_their_parent(tmp_path: Path, method: str, number: signal.Signals) -> None:
    script = tmp_path / "pool.py"
    script.write_text(POOL)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, script, method], cwd=tmp_path, env=environment, stderr=subprocess.PIPE)
    while len(list(tmp_path.glob("begun-*"))) < 2 and process.poll() is None:
        time.sleep(0.02)
    born = children_of(process.pid)
    assert len(born) >= 2
    process.send_signal(number)
    process.communicate(timeout=300)
    until = time.monotonic() + 120
    while any(is_running(child) for child in born) and time.monotonic() < until:
        time.sleep(0.1)
    assert not any(is_running(child) for child in born)


def test_statistics_that_are_killed_leave_no_process(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 12)
    write_annotations(tmp_path / "instances.json", 12)
    command = [*COMMAND, "stats", run, "--annotations", tmp_path / "instances.json", "--jobs", "3"]
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True, stderr=subprocess.DEVNULL)
    born: list[int] = []
    until = time.monotonic() + 300
    while len(born) < 3 and process.poll() is None and time.monotonic() < until:
        time.sleep(0.02)
        born = [child for child in session(process.pid) if child != process.pid]
    process.kill()
    process.wait()
    assert len(born) >= 3, "the kill came too early or too late to prove anything"
    until = time.monotonic() + 120
    while session(process.pid) and time.monotonic() < until:
        time.sleep(0.1)
    assert session(process.pid) == []


# ---- cases that once hung, or ended in a traceback ----


def tar_with(header: bytes, path: Path) -> Path:
    """Makes a tar of a good photo, a member with the given header, and another good photo."""
    parts = []
    for name in ("a.jpg", "b.jpg", "c.jpg"):
        info = tarfile.TarInfo(name)
        info.size = 4
        parts.append(info.tobuf() + b"\xff\xd8\xff\xe0".ljust(512, b"\0"))
    parts[1] = header + parts[1][512:]
    path.write_bytes(b"".join(parts) + bytes(1024))
    return path


def header(**changes: bytes) -> bytes:
    """Makes a member's header with other bytes in these fields and the right checksum."""
    info = tarfile.TarInfo("b.jpg")
    info.size = 4
    data = bytearray(info.tobuf())
    for name, value in changes.items():
        at = {"size": 124, "type": 156, "magic": 257, "sparse": 386}[name]
        data[at : at + len(value)] = value
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data)
    return bytes(data)


@pytest.mark.parametrize(
    "bad",
    [
        header(size=b"\xff" + b"\xff" * 9 + b"\xfc\x00"),  # -1024
        header(size=b"\x80" + (1 << 62).to_bytes(11, "big")),
        header(size=b"\x80" + (1 << 80).to_bytes(11, "big")),
        header(type=b"S", sparse=b"\xff" * 100),
        header(type=b"S", sparse=b"zz"),
        header(type=b"L", size=b"\x80" + (1 << 62).to_bytes(11, "big")),
        header(type=b"x"),
        header(size=b"zzzzzzzzzzz\0"),
    ],
    ids=["negative", "2^62", "2^80", "sparse ones", "sparse text", "long name", "pax", "no number"],
)
def test_reading_a_tar_of_absurd_headers_ends_and_keeps_what_came_before(tmp_path: Path, bad: bytes) -> None:
    def too_long(number: int, frame: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(20)
    try:
        index = index_images(str(tar_with(bad, tmp_path / "mad.tar")))
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    assert index.id(0) == "mad.tar/a"
    assert index.read(0) == b"\xff\xd8\xff\xe0"
    assert 2 <= len(index) <= 3


def test_a_checkpoint_that_unpacks_to_a_thousand_times_its_size_is_refused(tmp_path: Path) -> None:
    plain, bomb = tmp_path / "plain.pth", tmp_path / "bomb.pth"
    torch.save({"w": torch.zeros(4_000_000)}, plain)
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as target:
        for entry in source.infolist():
            target.writestr(entry.filename, source.read(entry))
    from batchjob.inputs import sha256_of

    assert state_dict(Weights("m", "file", str(plain), sha256_of(plain))) is not None
    with pytest.raises(UserError, match="bytes that unpack to"):
        state_dict(Weights("m", "file", str(bomb), sha256_of(bomb)))


def test_files_that_people_leave_in_done_are_not_markers(tmp_path: Path) -> None:
    run, plan = tmp_path / "run", made_up_plan()
    store.create(run, plan, Ids(plan.row_count))
    label(run, plan, [0, 1, 2])
    data = marker_path(run, 1).read_bytes()
    for name in ("000001 (copy).json", ".000001.json", "000001.json~", "1.json", "notes.json"):
        (run / "done" / name).write_bytes(data)
    assert published(run) == [0, 1, 2]
    assert store.verify(run) == []
    marker_path(run, 2).write_bytes(data)  # of another partition
    assert store.missing(run, plan) == [2]


def test_a_run_of_three_hundred_characters_is_one_line(tmp_path: Path, batchjob: Command) -> None:
    photos = make_photos(tmp_path / "photos", 2)
    for arguments in (("plan", photos, tmp_path / ("r" * 300), *TINY), ("show", tmp_path / ("r" * 300))):
        ended = batchjob(*arguments)
        assert ended.code == 2
        assert ended.err.splitlines()[-1].startswith("batchjob: ")
        assert "Traceback" not in ended.err


def test_too_few_open_files_are_one_line(tmp_path: Path) -> None:
    photos = make_photos(tmp_path / "photos", 2)
    arguments = " ".join(map(str, ["run", photos, tmp_path / "run", *TINY]))
    command = f"ulimit -n 20; exec {sys.executable} -m batchjob {arguments}"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, check=False, capture_output=True, text=True, timeout=300)
    assert done.returncode in (0, 75), done.stderr
    assert "Traceback" not in done.stderr
    assert io.StringIO(done.stderr).readlines()
