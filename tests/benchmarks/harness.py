"""Measures ours against a named peer, interleaved in one run, as a ratio with its spread."""

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass


@dataclass(frozen=True, slots=True)
class Result:
    """One row of the table: `ratio` is peer seconds over our seconds, so more is better."""

    name: str
    peer: str
    unit: str
    ours_per_s: float
    peer_per_s: float
    ratio: float
    low: float
    high: float
    rounds: int
    aim: float | None
    note: str = ""

    def to_json(self) -> dict[str, object]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Contest:
    """Two ways of doing the same `items` units of work; `ours` and `theirs` do it once a call."""

    name: str
    peer: str
    unit: str
    items: int
    ours: Callable[[], object]
    theirs: Callable[[], object]
    theirs_items: int = 0  # how many items the peer does if it is too slow for all; 0 = all
    aim: float | None = None
    note: str = ""


def measure(contest: Contest, *, rounds: int = 7, smoke: bool = False) -> Result:
    """Returns the contest's median ratio and its range over `rounds` interleaved rounds, after a warm-up of each."""
    rounds = 1 if smoke else rounds
    if not smoke:
        contest.ours()
        contest.theirs()
    theirs_items = contest.theirs_items or contest.items
    ours, theirs = [], []
    for i in range(rounds):  # the one that goes first alternates, so that a drift of the machine favours neither
        for side in (0, 1) if i % 2 == 0 else (1, 0):
            if side == 0:
                ours.append(_seconds(contest.ours) / contest.items)
            else:
                theirs.append(_seconds(contest.theirs) / theirs_items)
    ratios = [b / a for a, b in zip(ours, theirs, strict=True)]
    return Result(
        name=contest.name,
        peer=contest.peer,
        unit=contest.unit,
        ours_per_s=1 / statistics.median(ours),
        peer_per_s=1 / statistics.median(theirs),
        ratio=statistics.median(ratios),
        low=min(ratios),
        high=max(ratios),
        rounds=rounds,
        aim=contest.aim,
        note=contest.note,
    )


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
