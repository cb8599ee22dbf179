"""Forks labelling processes on request from a parent that has imported everything, so that each starts at once.

Each child does what the job's loop does around the model: it reads its share of the attempt's list, claims, computes,
hands over and publishes. The computed arrays are made up. `control` is a design that trusts that a file exists.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from batchjob.config import Options
from batchjob.launch import shares
from batchjob.store import arrays as layout
from batchjob.store import lifecycle as store
from batchjob.store.writer import Writer
from tests.runs import arrays_of, made_up_plan

PLAN = made_up_plan(row_count=78, rows_per_partition=2, kept_rows=(3, 30, 31), options=Options(scores="attention"))
COMPUTE_S = 0.004


def note(run: Path, partition: int) -> None:
    """Appends one line to the list of computed partitions, atomically."""
    with open(run / "computed.txt", "ab", buffering=0) as file:
        file.write(f"{partition}\n".encode())


def label(run: Path, attempt: str, share: shares.Share) -> None:
    partitions = shares.agreed_partitions(run, attempt, lambda: store.missing(run, PLAN))
    before: int | None = None
    with Writer(run, PLAN) as writer:
        for partition in shares.claimed(writer, share.of(partitions), lambda: False):
            arrays = arrays_of(PLAN, partition)
            time.sleep(COMPUTE_S)
            while before is not None and not writer.is_done(before):
                time.sleep(COMPUTE_S)  # as with any model, a partition takes longer to compute than to publish
            note(run, partition)
            writer.write(partition, arrays)
            before = partition


def missing_files(run: Path) -> list[int]:
    """Returns the partitions that the control takes for missing: those with a file that does not exist."""
    specs = layout.layout(PLAN)
    partitions = range(PLAN.partition_count)
    return [u for u in partitions if not all((run / p).exists() for p in layout.shard_paths(specs, PLAN, u))]


def label_control(run: Path, attempt: str, share: shares.Share) -> None:
    from batchjob.store.encode import Encoder

    encoder = Encoder(PLAN)
    for partition in share.of(missing_files(run)):
        time.sleep(COMPUTE_S)
        files = encoder.encode(partition, arrays_of(PLAN, partition))
        note(run, partition)
        for path, data in files.items():
            (run / path).write_bytes(data)


def main() -> None:
    """Reads a JSON line for each process to start and answers with the process's id; a JSON null ends the loop."""
    kinds: dict[str, Callable[[Path, str, shares.Share], None]] = {"store": label, "control": label_control}
    for line in sys.stdin:
        order = json.loads(line)
        if order is None:
            return
        if "wait" in order:
            print(json.dumps(reap(order["wait"])), flush=True)
            continue
        child = os.fork()
        if child == 0:
            code = 1
            try:
                kinds[order["kind"]](Path(order["run"]), order["attempt"], shares.Share(*order["share"]))
                code = 0
            finally:
                os._exit(code)
        print(child, flush=True)


def reap(children: Sequence[int]) -> list[int]:
    """Waits for processes and returns how each ended: its exit code, or minus the number of its signal."""
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


if __name__ == "__main__":
    main()
