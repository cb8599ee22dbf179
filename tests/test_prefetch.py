import threading
import time

import pytest

from batchjob.loader.prefetch import Ahead


def numbers(made, stop=10, error=None):
    for i in range(stop):
        made.append(i)
        yield i
    if error is not None:
        raise error


def idle() -> None:
    pass


def test_items_come_in_order_and_the_thread_ends():
    before = set(threading.enumerate())
    for count in (10, 0):
        stream = Ahead(numbers([], stop=count), interrupt=idle)
        assert list(stream) == list(range(count))
        stream.close()
    assert set(threading.enumerate()) <= before  # a thread of another test may end meanwhile


def test_prefetching_starts_at_once_and_makes_one_item_more_than_fits_the_queue():
    made = []
    stream = Ahead(numbers(made), interrupt=idle)
    until = time.monotonic() + 10
    while len(made) < 2 and time.monotonic() < until:
        time.sleep(0.01)
    time.sleep(0.1)
    assert made == [0, 1]
    stream.wait()
    stream.wait()
    assert [next(stream), next(stream)] == [0, 1]
    stream.close()
    with pytest.raises(StopIteration):
        next(stream)


def test_an_error_comes_after_the_items_before_it():
    stream = Ahead(numbers([], stop=2, error=KeyError("k")), interrupt=idle)
    assert [next(stream), next(stream)] == [0, 1]
    stream.wait()
    with pytest.raises(KeyError, match="k"):
        next(stream)
    with pytest.raises(StopIteration):
        next(stream)


def test_closing_interrupts_the_work_in_progress_and_waits_for_it():
    interrupted, left = threading.Event(), []

    def slow():
        try:
            yield 0
            interrupted.wait(10)
        finally:
            left.append(True)

    stream = Ahead(slow(), interrupt=interrupted.set)
    assert next(stream) == 0
    stream.close()
    assert left == [True]
    assert interrupted.is_set()


def test_closing_a_thread_that_waits_for_room_ends_it():
    before = set(threading.enumerate())
    made = []
    stream = Ahead(numbers(made, stop=1000), interrupt=idle)
    next(stream)
    time.sleep(0.05)
    stream.close()
    assert set(threading.enumerate()) <= before
    assert len(made) < 10
