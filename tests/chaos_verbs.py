"""Forks whole commands on request from a parent that has imported torch, so that each command starts at once.

Each child is a `batchjob` command in a session of its own: it parses, works, cleans up and exits like the command line.
"""

import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

ROOT = Path(__file__).parent.parent
IMPORTED = (
    "batchjob.__main__ torch timm xarray matplotlib.pyplot numba dask.array pyarrow.dataset scipy.ndimage "
    "batchjob.commands batchjob.job.prepare batchjob.job.dispatch batchjob.job.label batchjob.job.fit "
    "batchjob.clustering.search batchjob.stats.run batchjob.figures.write batchjob.report.page"
)


class Commands:
    """Starts commands in `folder`, forked from the parent or as new interpreters; their output goes to a log."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._log = folder / "log"

    def __enter__(self) -> "Commands":
        command = [sys.executable, "-m", "tests.chaos_verbs"]
        pipe = subprocess.PIPE
        self._parent = subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, text=True, env=_environment())
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._parent.communicate("null\n", timeout=60)

    def run(self, arguments: Sequence[str], moment: "Moment | None" = None, *, is_new: bool = False) -> "Ended":
        """Runs a command to its end, with a signal at that moment; with `is_new`, in an interpreter of its own."""
        self._log.write_bytes(b"")
        own: subprocess.Popen[bytes] | None = None
        if is_new:
            command = [sys.executable, "-m", "batchjob", *arguments]
            with self._log.open("ab") as log:
                own = subprocess.Popen(
                    command,
                    cwd=self._folder,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                    env=_environment(),
                    preexec_fn=_heed_interrupts,
                )
            wait_for_handlers(own)
            pid = own.pid
        else:
            pid = int(self._ask({"arguments": list(arguments), "folder": str(self._folder), "log": str(self._log)}))
        began, landed = time.monotonic(), False
        if moment is not None:
            time.sleep(moment.after_s)
            if landed := is_running(pid):
                moment.send(pid)
        code = int(self._ask({"wait": pid})) if own is None else own.wait()
        return Ended(pid, code, landed, time.monotonic() - began, self._log.read_text(errors="replace"))

    def _ask(self, order: dict[str, Any]) -> Any:
        assert self._parent.stdin is not None
        assert self._parent.stdout is not None
        self._parent.stdin.write(json.dumps(order) + "\n")
        self._parent.stdin.flush()
        return json.loads(self._parent.stdout.readline())


class Moment:
    """A signal to send so many seconds after a command's start, to it alone or to all processes of its session."""

    def __init__(self, number: signal.Signals, after_s: float, *, to_all: bool) -> None:
        self.number, self.after_s, self._to_all = number, after_s, to_all

    def send(self, pid: int) -> None:
        # a child that has ended is a zombie until it is waited for, so no other process can get its id
        os.killpg(pid, self.number) if self._to_all and os.getpgid(pid) == pid else os.kill(pid, self.number)

    def __str__(self) -> str:
        return f"{self.number.name} to {'all' if self._to_all else 'one'} after {self.after_s:.2f} s"


class Ended:
    """How a command ended: its exit code (or minus a signal's number), whether the signal came in time, its output."""

    def __init__(self, pid: int, code: int, landed: bool, seconds: float, said: str) -> None:
        self.pid, self.code, self.landed, self.seconds, self.said = pid, code, landed, seconds, said


def is_running(pid: int) -> bool:
    """Says whether the process exists and is not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_for_handlers(process: "subprocess.Popen[Any]") -> None:
    """Waits until a command answers to signals: Python itself takes a moment, and dies of SIGTERM before that."""
    while process.poll() is None:
        caught = re.search(r"SigCgt:\s*(\w+)", Path(f"/proc/{process.pid}/status").read_text())
        if caught and int(caught[1], 16) >> (signal.SIGUSR1 - 1) & 1:  # the last one that a command takes over
            return
        time.sleep(0.005)


def session(pid: int) -> list[int]:
    """Returns the processes of the session that process `pid` began."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            facts = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(facts[3]) == pid and facts[0] != "Z":
            found.append(int(folder.name))
    return found


def _environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def _heed_interrupts() -> None:
    """Restores the interrupt's default: a shell's background job ignores it, and its children would inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _begin(order: dict[str, Any], begun: int) -> NoReturn:
    """Becomes the command; writes to the pipe `begun` as soon as it can answer to signals."""
    from batchjob.__main__ import entry
    from batchjob.launch import signals

    _heed_interrupts()
    signals.exit_at_once()
    os.write(begun, b".")
    os.setsid()
    os.chdir(order["folder"])
    log = os.open(order["log"], os.O_WRONLY | os.O_APPEND)
    for number, handle in enumerate((os.open(os.devnull, os.O_RDONLY), log, log)):
        os.dup2(handle, number)
    sys.argv = ["batchjob", *order["arguments"]]
    entry()


def main() -> None:
    """Reads a JSON line for each command to start or to wait for, answers with its id or code; a null ends the loop."""
    for name in IMPORTED.split():
        importlib.import_module(name)
    for line in sys.stdin:
        order = json.loads(line)
        if order is None:
            return
        if "wait" in order:
            print(os.waitstatus_to_exitcode(os.waitpid(order["wait"], 0)[1]), flush=True)
            continue
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            _begin(order, writer)
        os.read(reader, 1)  # a busy machine may take longer to begin with the child than the signal takes
        for end in (reader, writer):
            os.close(end)
        print(child, flush=True)


if __name__ == "__main__":
    main()
