"""Runs an iterator one item ahead, in a thread."""

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Generic, Self, TypeVar

T = TypeVar("T")


class _End:
    """What the thread puts in after the last item: how the iterator ended."""

    def __init__(self, error: BaseException | None) -> None:
        self.error = error


class Ahead(Generic[T]):
    """Yields the items of an iterator that a thread runs ahead: one item is ready, and the next may be in the making.

    An error of the iterator is raised by `next`, after the items before it.
    """

    def __init__(self, items: Iterator[T], *, interrupt: Callable[[], None]) -> None:
        """Starts the thread.

        Parameters
        ----------
        items
            The iterator, which nothing else may use.
        interrupt
            Called by `close` to make `items` end soon.
        """
        self._ready: queue.Queue[T | _End] = queue.Queue(maxsize=1)
        self._first: T | _End | None = None
        self._interrupt, self._stopped = interrupt, threading.Event()
        self._thread = threading.Thread(target=self._work, args=(items,), name="ahead", daemon=True)
        self._thread.start()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> T:
        self.wait()
        item, self._first = self._first, None
        if isinstance(item, _End):
            self._first = _End(None)  # asked again, it has ended
            raise item.error or StopIteration
        assert item is not None
        return item

    def wait(self) -> None:
        """Waits until `next` can return at once."""
        if self._first is None:
            self._first = self._ready.get()

    def close(self) -> None:
        """Ends the thread, and waits until it has ended."""
        self._stopped.set()
        self._interrupt()
        while self._thread.is_alive():  # it may be waiting for room
            try:
                self._ready.get(timeout=0.05)
            except queue.Empty:
                continue
        self._thread.join()
        self._first = _End(None)

    def _work(self, items: Iterator[T]) -> None:
        end = _End(None)
        try:
            for item in items:
                self._ready.put(item)
                del item  # only the caller holds it while the next one is made
                if self._stopped.is_set():
                    break
        except BaseException as error:
            end.error = error
        self._ready.put(end)
