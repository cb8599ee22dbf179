"""Fixtures for the tests of several packages: the command line as a function, the embedded sample, its run."""

import os
import signal
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from _pytest.terminal import TerminalReporter

from batchjob.__main__ import main
from tests.pages import TINY, both_runs, chromium, codebook_page, page, runs  # noqa: F401  # one for all files that ask for it
from tests.runs import empty_run, finished_run  # noqa: F401  # for the tests of the store
from tests.slurm_jobs import calm, cluster, slurm_photos, submit  # noqa: F401  # one for all files that ask for it
from tests.striped import colour_model, striped  # noqa: F401  # one for all files that ask for it

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command line does, before torch is imported
for _name in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL"):  # a make inside a test is not a part of `make test`
    os.environ.pop(_name, None)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a background job ignores it
    signal.signal(signal.SIGINT, signal.default_int_handler)
hypothesis.settings.register_profile("untimed", deadline=None)  # a busy machine must not make tests fail
hypothesis.settings.load_profile("untimed")
ROOT = Path(__file__).parent.parent
SAMPLE = ROOT / "batchjob" / "sample"
# Fixtures that take many seconds and serve several files: name -> the group of tests that run in one process.
SHARED_FIXTURES = {
    "cluster": "slurm",
    "slurm_photos": "slurm",
    "runs": "pages",
    "chromium": "pages",
    "codebook_page": "pages",
    "sample_run": "sample",
}


@dataclass(frozen=True, slots=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str


Command = Callable[..., Ended]
_left_out: Counter[str] = Counter()


@pytest.fixture
def batchjob(capfd: pytest.CaptureFixture[str]) -> Command:
    """`batchjob("run", data, run, "--k", "3")` in this process; paths may be given as Path."""

    def call(*arguments: object) -> Ended:
        capfd.readouterr()
        try:
            code = main([os.fspath(a) if isinstance(a, Path) else str(a) for a in arguments])
        except SystemExit as end:
            code = int(end.code or 0)
        return Ended(code, *capfd.readouterr())

    return call


@pytest.fixture(scope="session")
def sample_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Labels the sample once with DINOv2's own weights: k = instances + 1, 448 px, maps of two images kept."""
    run = tmp_path_factory.mktemp("runs") / "sample"
    options = ["--k", "instances", "--image-size", "448", "--keep-maps", "2", "--rows-per-partition", "3"]
    assert main(["run", str(SAMPLE), str(run), *options, "--workers", "1"]) == 0
    return run


@pytest.hookimpl(tryfirst=True)  # before xdist, which reads the groups in the same hook
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keeps the tests of a file, and all that share a costly fixture, in one process, which makes fixtures once."""
    for item in items:
        if item.get_closest_marker("xdist_group"):  # a long test that says itself what it has to be with
            continue
        fixtures = getattr(item, "fixturenames", ())
        shared = next((group for fixture, group in SHARED_FIXTURES.items() if fixture in fixtures), item.path.stem)
        item.add_marker(pytest.mark.xdist_group(shared))
    items.sort(key=lambda item: item.get_closest_marker("slurm") is None)  # the longest group first


def pytest_deselected(items: list[pytest.Item]) -> None:
    """Counts by mark the tests that a command left out, for its last lines."""
    for item in items:
        for mark in ("gpu", "slow"):
            if item.get_closest_marker(mark):
                _left_out[mark] += 1


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Makes a suite that ran no test fail, since skipped tests prove nothing (`make test-gpu` without a GPU)."""
    if hasattr(session.config, "workeroutput"):  # in one of several processes, whose figures the first one sums up
        session.config.workeroutput["left_out"] = dict(_left_out)
        return
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if exitstatus == 0 and not session.config.option.collectonly and not reporter.stats.get("passed"):
        session.exitstatus = pytest.ExitCode.NO_TESTS_COLLECTED


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Takes over the counts of a process; every process collects all tests, so one count is enough."""
    left_out = getattr(node, "workeroutput", {}).get("left_out", {})  # a process that crashed sends no counts
    _left_out.update({mark: n for mark, n in left_out.items() if not _left_out[mark]})


def pytest_terminal_summary(terminalreporter: TerminalReporter) -> None:
    """Prints which tests did not run and which command runs them."""
    for mark, count in sorted(_left_out.items()):
        terminalreporter.write_line(f"not run: {count} tests marked {mark} (make test-{mark})")
    if terminalreporter.stats.get("skipped") and not terminalreporter.stats.get("passed"):
        terminalreporter.write_line("nothing ran: every test was skipped, which proves nothing", red=True)
