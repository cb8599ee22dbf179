"""An iterator run one item ahead, in a thread."""

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Generic, Self, TypeVar

T = TypeVar("T")


class _End:
    """What the thread leaves last: how the iterator ended."""

    def __init__(self, error: BaseException | None) -> None:
        self.error = error


class Ahead(Generic[T]):
    """The items, of which a thread has the next one ready and may be making one more; its errors are raised here."""

    def __init__(self, items: Iterator[T], *, interrupt: Callable[[], None]) -> None:
        """Begins at once. `interrupt` is called by `close`; after it, `items` should end soon."""
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
        """Returns when `next` would not have to wait."""
        if self._first is None:
            self._first = self._ready.get()

    def close(self) -> None:
        """Ends the thread, and waits for that."""
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
                del item  # the caller's alone, while the next is made
                if self._stopped.is_set():
                    break
        except BaseException as error:
            end.error = error
        self._ready.put(end)
