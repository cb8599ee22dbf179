"""`python -m tests.benchmarks [--smoke] [NAME …]`: runs the bench_*.py in this folder and prints a table."""

import argparse
import datetime
import importlib
import json
import os
import platform
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command line does; peers also run in this process

import torch

from tests.benchmarks.harness import Result, measure

HERE = Path(__file__).parent


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", help="which bench_NAME.py; all if none is named")
    parser.add_argument("--smoke", action="store_true", help="each once, on little data: that they run")
    parser.add_argument("--out", type=Path, default=Path("build/benchmarks.json"))
    args = parser.parse_args()
    known = sorted(p.stem.removeprefix("bench_") for p in HERE.glob("bench_*.py"))
    unknown = sorted(set(args.names) - set(known))
    if unknown:
        parser.error(f"unknown benchmark {', '.join(unknown)}; known: {', '.join(known)}")
    results: list[Result] = []
    for name in args.names or known:
        module = importlib.import_module(f"tests.benchmarks.bench_{name}")
        for line in module.lines(smoke=args.smoke) if hasattr(module, "lines") else ():
            print(line, flush=True)
        for contest in module.contests(smoke=args.smoke) if hasattr(module, "contests") else ():
            result = measure(contest, smoke=args.smoke)
            print(row(result), flush=True)
            results.append(result)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(
        json.dumps({"machine": machine(), "smoke": args.smoke, "results": [r.to_json() for r in results]}, indent=1)
    )
    print(f"written to {args.out}", file=sys.stderr)
    return 0


def row(r: Result) -> str:
    """Returns one line of a Markdown table, in the form of docs/benchmarks.md."""
    aim = f"{r.aim:g}" if r.aim is not None else "–"
    verdict = "" if r.aim is None else " ✓" if r.ratio >= r.aim else " ✗"
    return (
        f"| {r.name} | {r.peer} | {r.ours_per_s:.4g} | {r.peer_per_s:.4g} {r.unit}/s "
        f"| {r.ratio:.2f} ({r.low:.2f}–{r.high:.2f}) | {aim}{verdict} | {r.note} |"
    )


def machine() -> dict[str, object]:
    """Describes the machine."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {
        "date": datetime.date.today().isoformat(),
        "cores": os.cpu_count(),
        "processor": platform.processor() or platform.machine(),
        "gpu": gpu,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


if __name__ == "__main__":
    sys.exit(main())
