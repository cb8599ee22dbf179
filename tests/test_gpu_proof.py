"""`make gpu-proof` without a GPU says so; its table has every part as shown, failed, or left out with the reason."""

import subprocess
import sys

from tests.benchmarks.gpu_proof import Part, run_parts, table
from tests.conftest import ROOT


def test_without_a_gpu_it_says_so_and_ends_2():
    done = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks.gpu_proof"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == "gpu-proof: torch sees no GPU here; run it on a machine that has one"


def test_every_part_is_in_the_table_shown_failed_or_left_out_with_the_reason():
    def shows():
        yield "a ratio", "2.00 (1.90–2.10)"
        yield "a check", "FAILED: it disagrees"

    def breaks():
        yield "first", "1"
        raise RuntimeError("out of\nmemory")

    told = []
    parts = [
        Part("one", shows),
        Part("two", breaks),
        Part("three", shows, needs=("no_such_module",)),
        Part("four", shows, seconds=1000),
    ]
    rows = run_parts(parts, 100, told.append)
    assert [(r.part, r.state) for r in rows] == [
        ("one", "shown"),
        ("one", "failed"),
        ("two", "shown"),
        ("two", "failed"),
        ("three", "left out"),
        ("four", "left out"),
    ]
    assert rows[3].result == "RuntimeError: out of memory"
    assert rows[4].result == "needs no_such_module"
    assert rows[5].result == "100 s were left"
    text = table(rows, {"gpu": "none"})
    assert text.count("\n| ") == len(rows) + 2
    assert len(told) == len(rows)
