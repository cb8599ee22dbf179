"""`batchjob.stats(RUN, …)`: makes the tables of the verb `stats` and returns them as DataFrames."""

import sys
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd


def stats(
    *runs: str | PathLike[str], annotations: str | PathLike[str] = "", jobs: int = 0
) -> "dict[str, pd.DataFrame]":
    """Scores runs against their null models and returns the tables by name.

    Parameters
    ----------
    *runs
        Folders of runs. Several runs are compared image by image.
    annotations
        COCO or panoptic JSON, several with commas, a COCO root, or a VOC folder; by default the annotations that each
        run was planned with.
    jobs
        How many processes; with 0, as many as are worth starting.

    Returns
    -------
    dict of str to pandas.DataFrame
        The tables `RUN/stats/*.parquet` by name. Among them are `summary` (scores, nulls and intervals of each layer
        and head) and `scores` (a row for each image, layer and head); with several runs also `comparison`.
        docs/metrics.md says what each column means. With several runs, a column `run` names the run of each row.

    Raises
    ------
    UserError
        If a folder is not a run, or the annotations have none of its images.

    Examples
    --------
    >>> tables = batchjob.stats("runs/photos")
    >>> "summary" in tables
    True
    """
    import pandas as pd

    from batchjob.stats.run import run_stats
    from batchjob.store.run import Run, tell_apart

    folders = [Path(run) for run in runs]
    run_stats(folders, annotations=str(annotations), jobs=jobs, say=lambda line: print(line, file=sys.stderr))
    opened = [Run(folder) for folder in folders]
    tell_apart(opened)
    found: dict[str, list[pd.DataFrame]] = {}
    for run in opened:
        for path in sorted((run.folder / "stats").glob("*.parquet")):
            table = pd.read_parquet(path)
            if len(opened) > 1 and "run" not in table.columns:
                table.insert(0, "run", run.name)
            found.setdefault(path.stem, []).append(table)
    return {
        name: tables[0] if len(tables) == 1 else pd.concat(tables, ignore_index=True) for name, tables in found.items()
    }
