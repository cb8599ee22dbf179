"""Hundreds of SIGKILLs at random moments, and damaged shards: no bad store, and little work done twice."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from batchjob.store import arrays as layout
from batchjob.store import lifecycle as store
from tests.chaos import PLAN, missing_files
from tests.conftest import ROOT
from tests.runs import Ids, contents, label

UNITS = PLAN.partition_count


class Zygote:
    """Runs tests/chaos.py in a process of its own."""

    def __enter__(self) -> "Zygote":
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.chaos"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate("null\n", timeout=60)

    def start(self, kind: str, run: Path, attempt: str, share: tuple[int, int]) -> int:
        return int(self._ask({"kind": kind, "run": str(run), "attempt": attempt, "share": share}))

    def wait(self, children: list[int]) -> list[int]:
        return list(self._ask({"wait": children}))

    def _ask(self, order: dict[str, Any]) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())


@pytest.fixture(scope="module")
def zygote() -> Iterator[Zygote]:
    with Zygote() as started:
        yield started


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("calm") / "run"
    store.create(run, PLAN, Ids(PLAN.row_count))
    label(run, PLAN, list(range(UNITS)))
    for marker in (run / "done").glob("*.json"):  # the made-up failures of `label` are not part of this test
        assert marker.stat().st_size > 0
    store.finish(run)
    return run


@dataclass
class Tally:
    """The events of one run."""

    kills: int = 0
    torn: int = 0
    computed: int = 0
    is_bad: bool = False


def tear(run: Path, dice: random.Random, paths: list[str]) -> None:
    """Cuts or empties one published file, or flips one of its bits."""
    path = run / dice.choice(paths)
    data = bytearray(path.read_bytes())
    how = dice.choice(["cut", "empty", "flip"])
    if how == "flip":
        data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
    path.write_bytes(bytes(data if how == "flip" else data[: len(data) // 2 if how == "cut" else 0]))


def wait_for_work(run: Path, partitions: int, children: list[int]) -> None:
    """Returns once so many more partitions were computed, however slow the machine is, or all processes have ended."""
    listed = run / "computed.txt"
    size = listed.stat().st_size if listed.exists() else 0
    lines = 0
    while lines < partitions and any(is_running(child) for child in children):
        time.sleep(0.002)
        lines = listed.read_bytes()[size:].count(b"\n") if listed.exists() else 0


def is_running(process: int) -> bool:
    return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


def torment(kind: str, run: Path, zygote: Zygote, dice: random.Random, calm: Path) -> Tally:
    """Labels a run to its end under kills, world sizes 1 to 5, a torn file in every third attempt."""
    tally = Tally()
    specs = layout.layout(PLAN)
    store.create(run, PLAN, Ids(PLAN.row_count))
    for attempt in range(1000):
        left = store.missing(run, PLAN) if kind == "store" else missing_files(run)
        if not left:
            break
        done = sorted(set(range(UNITS)) - set(left))
        if attempt % 3 == 2 and done and tally.torn < 8:
            tear(run, dice, layout.shard_paths(specs, PLAN, dice.choice(done)))
            tally.torn += 1
            if kind == "store":
                store.forget(run, store.verify(run))  # batchjob show RUN --verify
        world = dice.randint(1, 5)
        children = [zygote.start(kind, run, f"{attempt}", (rank, world)) for rank in range(world)]
        for child in dice.sample(children, world):
            wait_for_work(run, dice.randint(0, 3), children)
            time.sleep(dice.expovariate(1 / 0.01))
            os.kill(child, signal.SIGKILL)  # a child that has ended is a zombie until it is waited for
        ends = zygote.wait(children)
        assert set(ends) <= {0, -signal.SIGKILL}
        tally.kills += ends.count(-signal.SIGKILL)
    tally.computed = len((run / "computed.txt").read_text().split())
    if kind == "store":
        store.finish(run)
    same = {path: data for path, data in contents(calm).items() if "/c." in path}
    tally.is_bad = {path: data for path, data in contents(run).items() if "/c." in path} != same
    return tally


@pytest.mark.slow
def test_two_hundred_kills_leave_no_bad_store_and_cost_a_partition_each(
    tmp_path: Path, zygote: Zygote, calm: Path
) -> None:
    dice = random.Random(20)
    runs: list[Tally] = []
    while sum(t.kills for t in runs) < 220:
        runs.append(torment("store", tmp_path / f"run{len(runs)}", zygote, dice, calm))
        assert not runs[-1].is_bad
        assert store.verify(tmp_path / f"run{len(runs) - 1}") == []
        again = runs[-1].computed - UNITS
        assert again <= runs[-1].kills + runs[-1].torn  # computed, and lost before it was published
    total = Tally(*(sum(getattr(t, f) for t in runs) for f in ("kills", "torn", "computed")))
    print(
        f"{len(runs)} runs, {total.kills} kills, {total.torn} torn files, 0 bad stores; computed twice: "
        f"{total.computed - UNITS * len(runs)} partitions"
    )


@pytest.mark.slow
def test_the_design_that_trusts_that_a_file_exists_fails_the_same_test(
    tmp_path: Path, zygote: Zygote, calm: Path
) -> None:
    dice = random.Random(20)
    runs = [torment("control", tmp_path / f"run{i}", zygote, dice, calm) for i in range(5)]
    print(f"control: {sum(t.kills for t in runs)} kills, {sum(t.is_bad for t in runs)} of {len(runs)} stores bad")
    assert sum(t.is_bad for t in runs) >= 3
