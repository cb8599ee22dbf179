"""Signals at random moments of every verb: the run gets the bytes of an undisturbed one, and no process is left.

CHAOS_SIGNALS=300 sends 300 signals instead of 30; CHAOS_SEED draws others. The seed decides which signal comes when.
How far a command is by then depends on the machine.
"""

import os
import random
import shutil
import signal
import time
from collections import Counter
from pathlib import Path

import pytest

from batchjob.store import lifecycle as store
from tests.chaos_verbs import Commands, Ended, Moment, session
from tests.conftest import SAMPLE

SIGNALS = int(os.environ.get("CHAOS_SIGNALS", "30"))
SEED = int(os.environ.get("CHAOS_SEED", "17"))
A_LIFE = 15  # signals from a run's plan to its page
OF_A_VERB = {"plan": 2, "fit": 3, "label": 4, "finish": 2, "stats": 2, "figures": 1, "report": 1}
NUMBERS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
NEW_INTERPRETERS = 0.1  # the share of commands in a new interpreter; the others do not import torch again
ORPHANS_S = 120.0  # a process looks for its parent only once it has imported torch
OPTIONS = ["--model", "test_vit.r160_in1k", "--weights", "random", "--image-size", "64", "--k", "3", "--limit", "6"]
OPTIONS += ["--rows-per-partition", "1", "--precision", "fp32"]
RUNTIME = ["--device", "cpu", "--batch-size", "1"]
WITH_CHILDREN = 0.3  # the same for commands that may start processes, which import for seconds
OF_A_SCOPE = {
    "image": ["--scope", "image", "--scores", "attention,pairs", "--keep-maps", "2"],
    "dataset": ["--scope", "dataset", "--fit-rows", "90"],
}
NOT_COMPARED = ("done", "logs")  # these files hold times, hosts and speeds


def verbs(scope: str, *, children: int = 0) -> dict[str, list[str]]:
    """Returns the commands that take a run from its plan to its page, some with that number of processes."""
    runtime = [*RUNTIME, "--workers", str(children)]
    found = {"plan": ["plan", "data", "run", *OPTIONS, *OF_A_SCOPE[scope]]}
    if scope == "dataset":
        found["fit"] = ["fit", "run", *runtime]
    found |= {"label": ["label", "run", *runtime], "finish": ["finish", "run"]}
    found |= {"stats": ["stats", "run", "--jobs", str(children + 1)]}
    return found | {"figures": ["figures", "run", "--count", "2"], "report": ["report", "run"]}


def results(run: Path) -> dict[str, bytes]:
    """Returns path -> bytes of every file of a run that does not hold when or where it was made."""
    paths = (p for p in run.rglob("*") if p.is_file() and p.relative_to(run).parts[0] not in NOT_COMPARED)
    return {str(path.relative_to(run)): path.read_bytes() for path in paths}


def make_fresh(verb: str, run: Path) -> None:
    """Gives a verb that is done its work again, by removing or damaging its output."""
    if verb == "plan":
        shutil.rmtree(run)
    elif verb == "fit":
        (run / "fit" / "centroids.npz").unlink(missing_ok=True)
    elif verb == "label":
        for marker in (run / "done").glob("[0-9]*.json"):
            marker.unlink()


def left_over(pid: int) -> list[int]:
    """Returns the processes of a command that still run two minutes after its end."""
    until = time.monotonic() + ORPHANS_S
    while (left := session(pid)) and time.monotonic() < until:
        time.sleep(0.05)
    return left


def undisturbed_end(commands: Commands, arguments: list[str], run: Path) -> Ended:
    """Runs the command undisturbed; pages are made without speeds, which differ every time."""
    if arguments[0] == "report":
        shutil.rmtree(run / "logs", ignore_errors=True)
    return commands.run(arguments)


class Life:
    """One run from its plan to its page under signals, and the same run without signals."""

    def __init__(self, scope: str, calm: dict[str, Ended], dice: random.Random) -> None:
        self.scope, self._calm, self._dice = scope, calm, dice
        self.tally: Counter[tuple[str, str, str]] = Counter()

    def moment(self, verb: str, *, imports: bool) -> Moment:
        """Draws signals uniformly over the time that the verb takes undisturbed; half of them go to all processes."""
        longest = self._calm[verb].seconds + (4.0 if imports else 0.0)
        number = self._dice.choice(NUMBERS)
        return Moment(number, self._dice.uniform(0, longest), to_all=self._dice.random() < 0.5)

    def disturb(self, commands: Commands, verb: str, count: int, run: Path) -> None:
        """Sends `count` signals to a verb, each while it runs, and lets it end once after that."""
        landed = 0
        while landed < count:
            arguments = verbs(self.scope, children=int(self._dice.random() < WITH_CHILDREN))[verb]
            is_new = self._dice.random() < NEW_INTERPRETERS
            moment = self.moment(verb, imports=is_new or arguments != verbs(self.scope)[verb])
            ended = commands.run(arguments, moment, is_new=is_new)
            told = f"{verb}, {moment}: exit {ended.code}\n{ended.said}"
            expected = {0, -signal.SIGKILL} if moment.number == signal.SIGKILL else {0, 75}
            assert ended.code in (expected if ended.landed else {0}), told
            assert "Traceback" not in ended.said, told
            assert left_over(ended.pid) == [], told
            if ended.landed:
                landed += 1
                self.tally[verb, moment.number.name, "went on to its end" if ended.code == 0 else "ended"] += 1
            if ended.code == 0 and landed < count:
                make_fresh(verb, run)
        ended = undisturbed_end(commands, verbs(self.scope)[verb], run)
        assert ended.code == 0, f"{verb} after {landed} signals: exit {ended.code}\n{ended.said}"


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_signals_at_any_moment_of_any_verb_change_no_byte_and_leave_no_process(tmp_path: Path) -> None:
    dice = random.Random(SEED)
    total: Counter[tuple[str, str, str]] = Counter()
    lives = -(-SIGNALS // A_LIFE)
    folder = tmp_path / "here"  # the same path for all, since pages contain it
    folder.mkdir()
    (folder / "data").symlink_to(SAMPLE)
    run = folder / "run"
    with Commands(folder) as commands:
        for scope in ("image", "dataset")[: max(1, min(lives, 2))]:
            shutil.rmtree(run, ignore_errors=True)
            calm = {verb: undisturbed_end(commands, arguments, run) for verb, arguments in verbs(scope).items()}
            assert all(ended.code == 0 for ended in calm.values()), [ended.said for ended in calm.values()]
            expected = results(run)
            for number in range(lives // 2 if scope == "dataset" else lives - lives // 2):
                shutil.rmtree(run)
                life = Life(scope, calm, dice)
                for verb in verbs(scope):
                    count = OF_A_VERB[verb] + (OF_A_VERB["fit"] if (scope, verb) == ("image", "label") else 0)
                    life.disturb(commands, verb, count, run)
                found = results(run)
                assert sorted(found) == sorted(expected)
                assert [name for name in found if found[name] != expected[name]] == []
                assert store.verify(run) == []
                total += life.tally
                print(f"{scope} {number}: {sum(life.tally.values())} signals, 0 other bytes, 0 processes left")
    for row, count in sorted(total.items()):
        print(*row, count)
    assert sum(total.values()) == lives * A_LIFE
