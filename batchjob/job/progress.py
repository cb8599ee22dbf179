"""Shows a person how far a job is, with a bar or a line a minute in a log, and measures where the time goes."""

import json
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import NoReturn, Self, TypeVar

from tqdm import tqdm

from batchjob.errors import counted
from batchjob.launch.progress import SharedProgress

_LOG_EVERY_S = 60.0
Item = TypeVar("Item")


class Progress:
    """Shows on stderr how many images are done, images/s and the time left: a bar on a terminal, lines elsewhere."""

    def __init__(
        self,
        total: int,
        done: int = 0,
        *,
        what: str = "labels",
        every_s: float = _LOG_EVERY_S,
        shared: SharedProgress | None = None,
    ) -> None:
        """Begins to count.

        Parameters
        ----------
        total
            Images of the run, or of this process's share of it.
        done
            How many of them are done already.
        what
            What is made, as the lines call it.
        every_s
            Seconds between two lines.
        shared
            The progress of all processes, of which one shows it; None for a process that is alone.
        """
        self._total, self._first, self._done, self._what = total, done, done, what
        self._every_s, self._shared = every_s, shared
        self._start = self._last = time.monotonic()
        self._bar: tqdm[NoReturn] | None = None

    def advance(self, images: int) -> None:
        """Counts images that are done, and shows the progress where it is time to."""
        self._done = self._done + images if self._shared is None else self._shared.post(images)
        if self._shared is not None and not self._shared.may_report():
            return
        if self._bar is None and sys.stderr.isatty():
            first = self._done - images
            self._bar = tqdm(total=self._total, initial=first, desc=self._what, unit="image", smoothing=0.05)
        if self._bar is not None:
            self._bar.update(self._done - self._bar.n)
        elif time.monotonic() - self._last >= self._every_s:
            self._last = time.monotonic()
            print(self.line(), file=sys.stderr, flush=True)

    def line(self) -> str:
        """A line such as `labels: 1,200 of 5,000 images (24%), 31.2 images/s, 2 min left`."""
        seconds = max(time.monotonic() - self._start, 1e-9)
        rate = (self._done - self._first) / seconds
        left = f"{minutes((self._total - self._done) / rate)} left" if rate > 0 else "time left unknown"
        share = self._done / self._total if self._total else 1.0
        done = f"{self._done:,} of {counted(self._total, 'image')}"
        return f"{self._what}: {done} ({share:.0%}), {rate:.1f} images/s, {left}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.close()
        elif self._done > self._first and (self._shared is None or self._shared.may_report()):
            print(self.line(), file=sys.stderr, flush=True)


class Stages:
    """Wall-clock seconds of one process by stage, written below RUN for `show` and the report.

    On a GPU, work is queued and the host runs ahead. The time of a stage is then the host's part of it; the device's
    part counts for the stage that waits for its results.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.images = 0
        self._start = time.monotonic()

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.monotonic()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.monotonic() - start

    def timed(self, stage: str, items: Iterable[Item]) -> Iterator[Item]:
        """Hands on items, and counts the time that it waits for each.

        Parameters
        ----------
        stage
            The stage that the time counts for.
        items
            Items other than None.

        Yields
        ------
        The items in order.
        """
        iterator = iter(items)
        while True:
            with self(stage):
                item = next(iterator, None)
            if item is None:
                return
            yield item

    @property
    def total_s(self) -> float:
        """Seconds since the stages were made."""
        return time.monotonic() - self._start

    def summary(self) -> str:
        """A line with images, images/s and each stage's share of the time."""
        total = self.total_s
        shares = ", ".join(f"{name} {seconds / total:.0%}" for name, seconds in self.seconds.items())
        return f"{counted(self.images, 'image')} in {minutes(total)}, {self.images / total:.1f} images/s: {shares}"

    def save(self, path: Path, **facts: str | int | float) -> None:
        """Writes the seconds and the number of images as JSON.

        Parameters
        ----------
        path
            The file, whose folder is made where it is not there.
        facts
            What else to write about the process.
        """
        total = self.total_s
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(
            json.dumps({"images": self.images, "seconds": total, "stages": self.seconds, **facts}, indent=1)
        )


def minutes(seconds: float) -> str:
    """Spells a duration such as `42 s`, `3 min`, `2 h 10 min` or `4 d 3 h`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 100 * 60:
        return f"{seconds / 60:.0f} min"
    if seconds < 100 * 3600:
        return f"{seconds // 3600:.0f} h {seconds % 3600 // 60:.0f} min"
    return f"{seconds // 86400:.0f} d {seconds % 86400 // 3600:.0f} h"
