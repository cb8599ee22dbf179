"""`python -m tests.benchmarks.stats_at_scale [--images 5000 20000]`: measures `stats` on runs of growing size.

Each run has 12 heads on 14×14 patches and repeats some made-up photos; `batchjob stats` runs separately,
with as many processes as it chooses. The last line says how long 118,000 images (COCO train2017) would take on 16 cores
if the cost of each image stayed the same.
"""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests import made_up_runs
from tests.benchmarks.bench_stats import HEADS, tiled

SCENES = 24
TARGET_IMAGES, TARGET_CORES = 118_000, 16
_WAIT_S = 0.2  # seconds between two measurements of the memory


def tree_of(pid: int) -> list[int]:
    """Returns a process and all its descendants."""
    found = [pid]
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            found += [grand for child in path.read_text().split() for grand in tree_of(int(child))]
        except OSError:  # the process ended meanwhile
            continue
    return found


def memory_mb(pid: int) -> float:
    """Returns the megabytes of a process and its descendants; shared pages count once."""
    total = 0
    for each in tree_of(pid):
        try:
            lines = Path(f"/proc/{each}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total / 1024


def measure(run: Path, annotations: Path) -> tuple[float, float, float]:
    """Returns (seconds, CPU seconds of all processes, megabytes at the peak) of `batchjob stats`."""
    before, start, most = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic(), 0.0
    command = [sys.executable, "-m", "batchjob", "stats", str(run), "--annotations", str(annotations)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        while process.poll() is None:
            most = max(most, memory_mb(process.pid))
            time.sleep(_WAIT_S)
        if process.returncode:
            raise RuntimeError((process.stderr.read() if process.stderr else b"").decode())
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return time.monotonic() - start, cpu, most


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.stats_at_scale", description=__doc__)
    parser.add_argument("--images", type=int, nargs="+", default=[5000, 20000])
    args = parser.parse_args()
    print(f"{len(os.sched_getaffinity(0))} cores, load {os.getloadavg()[0]:.1f} at the start")
    print("| images | seconds | core seconds | core ms an image | peak memory |\n| --- | --- | --- | --- | --- |")
    found: list[tuple[int, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        scenes = made_up_runs.write_run(Path(folder) / "scenes", SCENES, kinds=HEADS)
        annotations = made_up_runs.write_annotations(Path(folder) / "scenes.json", SCENES)
        for images in args.images:
            run, known = tiled(Path(folder), scenes, annotations, SCENES, images)
            seconds, cpu, most = measure(run, known)
            found.append((images, cpu))
            print(f"| {images:,} | {seconds:.0f} | {cpu:.0f} | {cpu / images * 1e3:.1f} | {most:,.0f} MB |", flush=True)
    each = found[-1][1] / found[-1][0]
    if len(found) > 1:  # the slope leaves out what does not grow with the images
        each = (found[-1][1] - found[0][1]) / (found[-1][0] - found[0][0])
    minutes = each * TARGET_IMAGES / TARGET_CORES / 60
    print(
        f"{TARGET_IMAGES:,} images on {TARGET_CORES} cores, by {each * 1e3:.1f} core ms an image: {minutes:.1f} minutes"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
