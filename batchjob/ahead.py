"""An iterator run one item ahead, in a thread."""

import queue
import threading
from collections.abc import Callable, Generator, Iterator
from typing import TypeVar

T = TypeVar("T")


class _End:
    """What the thread leaves last: how the iterator ended."""

    def __init__(self, error: BaseException | None) -> None:
        self.error = error


def ahead(items: Iterator[T], *, interrupt: Callable[[], None]) -> Generator[T, None, None]:
    """The items, of which a thread has the next one ready and may be at work on one more; its errors are raised here.

    Closing it early calls `interrupt`, after which `items` should end soon, and waits for that.
    """
    ready: queue.Queue[T | _End] = queue.Queue(maxsize=1)
    stopped = threading.Event()

    def work() -> None:
        end = _End(None)
        try:
            for item in items:
                ready.put(item)
                if stopped.is_set():
                    break
        except BaseException as error:
            end.error = error
        ready.put(end)

    thread = threading.Thread(target=work, name="ahead", daemon=True)
    thread.start()
    try:
        while not isinstance(item := ready.get(), _End):
            yield item
        if item.error is not None:
            raise item.error
    finally:
        stopped.set()
        interrupt()
        while thread.is_alive():  # it may be waiting for room
            try:
                ready.get(timeout=0.05)
            except queue.Empty:
                continue
        thread.join()
