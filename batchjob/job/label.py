"""The loop: images → loader → model → attention → clustering → store, a partition at a time."""

import functools
import os
import socket
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from batchjob import clustering
from batchjob import plan as plans
from batchjob.config import Runtime
from batchjob.data.sources import ImageIndex
from batchjob.errors import WorkLeft
from batchjob.job import buffers
from batchjob.job.clusters import choose_engine, forecast, open_clusterer
from batchjob.job.memory import HalvingGuard, choose_batch_size
from batchjob.job.progress import Progress, Stages
from batchjob.job.scores import Scorer
from batchjob.launch.shares import Board, claimed
from batchjob.loader.loader import Loader
from batchjob.machine import choose_device, choose_workers
from batchjob.model import weights
from batchjob.model.attention import Extractor
from batchjob.model.describe import load_model
from batchjob.plan import Plan
from batchjob.store import lifecycle as store


def label(
    run: Path,
    runtime: Runtime,
    partitions: Sequence[int],
    *,
    should_stop: Callable[[], bool] = lambda: False,
    board: Board | None = None,
    say: Callable[[str], None] = lambda line: print(line, file=sys.stderr, flush=True),
) -> None:
    """Labels these partitions of a run and publishes each whole. Raises WorkLeft where it is told to stop."""
    plan = plans.load(run)
    device = choose_device(runtime.device)
    engine_name, reason = choose_engine(plan, runtime.engine, device)
    engine = clustering.open_engine(engine_name, device)
    say(f"labelling {len(partitions)} of {len(plan.partitions)} partitions on {device}, {plan.precision}")
    say(f"engine {engine_name}: {reason}")
    for line in forecast(plan, partitions):
        say(line)
    index = ImageIndex.load(run / "index")
    batch_size, reason = choose_batch_size(runtime.batch_size, plan, device)
    say(f"batch size {batch_size}: {reason}")
    guard, began = HalvingGuard(say), time.monotonic()
    with open_loader(plan, index, runtime, batch_size, device) as loader, store.Writer(run, plan) as writer:
        loader.announce([plan.partitions[partition] for partition in partitions])  # decoded while the model is loaded
        state = weights.state_dict(weights.Weights(**plan.weights))
        model = load_model(plan.model, state, precision=plan.precision, device=device, seed=plan.options.seed)
        extract = Extractor(model, plan.layers, plan.heads)
        find_clusters = open_clusterer(plan, run, engine, device)
        find_scores = Scorer(plan, run, device)
        loader.wait()
        start_s, stages = time.monotonic() - began, Stages()
        say(f"ready after {start_s:.1f} s: the model, and {loader.workers} decoding workers")
        progress = Progress(plan.row_count, board.done if board else 0, board=board)

        def compute(partition: int) -> tuple[buffers.Buffers, list[buffers.Failure]]:
            filled, failures = buffers.blank(plan, partition), list[buffers.Failure]()
            find_scores.partition_sums()  # of an attempt that ran out of memory
            for whole in stages.timed("images", loader.batches(*plan.partitions[partition])):
                if should_stop():
                    writer.release(partition)
                    raise WorkLeft(f"told to stop in partition {partition} of {run}; go on with the same command")
                for batch in guard.parts(whole):
                    buffers.put_images(filled, batch)
                    for layer, maps in enumerate(stages.timed("model", extract(batch.pixels))):
                        with stages("clustering"):
                            found = find_clusters(maps, batch)
                        with stages("scores"):
                            scores = find_scores(layer, maps, batch)
                        with stages("results"):
                            buffers.put_scores(filled, layer, scores, batch)
                            buffers.put_maps(filled, layer, maps, batch)
                            buffers.put_clusters(filled, layer, found, batch)
                    failures += buffers.drop_failed(filled, batch, index)
                stages.images += len(whole.rows)
                progress.advance(len(whole.rows))
            filled.arrays |= find_scores.partition_sums()
            return filled, failures

        with progress:
            for partition in claimed(writer, partitions, should_stop):
                filled, failures = guard.run(functools.partial(compute, partition))
                with stages("store"):
                    writer.write(partition, filled.arrays, failures)
    say(stages.summary())
    say(loader.verdict(stages.total_s, device.type))
    worker = f"{os.environ.get('SLURMD_NODENAME') or socket.gethostname()}-{os.getpid()}"
    stages.save(
        run / "logs" / f"timing-{worker}.json",
        device=str(device),
        batch_size=batch_size,
        engine=engine_name,
        start_s=start_s,
    )


def open_loader(plan: Plan, index: ImageIndex, runtime: Runtime, batch_size: int, device: torch.device) -> Loader:
    """The loader of a plan: padding in the model's mean colour, so that it is near zero after normalisation."""
    red, green, blue = (round(255 * channel) for channel in plan.model.mean)
    return Loader(
        index,
        plan.geometry,
        fill_rgb=(red, green, blue),
        interpolation=plan.model.interpolation,
        batch_size=batch_size,
        workers=choose_workers(runtime.workers),
        pin_for=device if device.type == "cuda" else None,
    )
