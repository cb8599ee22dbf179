"""`batchjob.stats(RUN, …)`: what the verb `stats` writes, as tables in memory."""

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
    *runs : path
        Folders of runs. Several are compared, image by image.
    annotations : path, optional
        COCO JSON or a VOC folder; by default those that each run was planned with.
    jobs : int
        Processes; 0 is as many as pay.

    Returns
    -------
    dict of str to pandas.DataFrame
        The files of `RUN/stats/*.parquet` by name, among them `summary` (scores, nulls, intervals for each layer and
        head) and `scores` (a line for each image, layer and head); `comparison` with several runs. docs/metrics.md
        says what each column means. With several runs the column `run` says which run a line is of.

    Raises
    ------
    UserError
        Where a folder is not a run, or the annotations know none of its images.

    Examples
    --------
    >>> tables = batchjob.stats("runs/photos")
    >>> "summary" in tables
    True
    """
    import pandas as pd

    from batchjob.stats.run import run_stats

    folders = [Path(run) for run in runs]
    run_stats(folders, annotations=str(annotations), jobs=jobs, say=lambda line: print(line, file=sys.stderr))
    found: dict[str, list[pd.DataFrame]] = {}
    for folder in folders:
        for path in sorted((folder / "stats").glob("*.parquet")):
            table = pd.read_parquet(path)
            if len(folders) > 1 and "run" not in table.columns:
                table.insert(0, "run", folder.absolute().name)
            found.setdefault(path.stem, []).append(table)
    return {
        name: tables[0] if len(tables) == 1 else pd.concat(tables, ignore_index=True) for name, tables in found.items()
    }
