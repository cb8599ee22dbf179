"""What a dataset-wide clustering clusters: how many rows an image gives, how wide they are, which of them the fit sees.

This file does without torch, since `plan` and the figures use it too.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from batchjob.config import Options
from batchjob.errors import UserError, counted

AUTO_ROWS = 1 << 20  # 4096 rows a centroid at k = 254; more rows move the centroids less than another seed does
CELLS = 15  # the most cells of a relative map along an axis
EXACT_ROWS = 1 << 31  # of more rows than this, a sample has a little less than the wanted size
_CHUNK = 1 << 22


@dataclass(frozen=True, slots=True)
class RowKind:
    """The kind of rows that a run clusters: each head of each image gives `per_image` of them."""

    queries: str  # "rows": one row a patch; "cls": one row an image
    features: str  # "absolute": a row is a map of the keys; "relative": of the offsets from the query, in cells
    grid: tuple[int, int]  # (rows, columns) of patches
    vector_size: int = 0  # D of queries, keys, values or tokens, which are not maps; 0 for attention rows

    @property
    def per_image(self) -> int:
        """The number of rows that one head of one image gives."""
        return 1 if self.queries == "cls" else self.grid[0] * self.grid[1]

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns) of the map that a row or a centroid is."""
        if self.features == "absolute":
            return self.grid
        return offset_cells(self.grid[0])[1], offset_cells(self.grid[1])[1]

    @property
    def width(self) -> int:
        """How many numbers a row has: the length of the `feature` dimension of the centroids."""
        return self.vector_size or self.shape[0] * self.shape[1]


def offset_cells(patches: int) -> tuple[int, int]:
    """(offsets in a cell, number of cells) along an axis of so many patches.

    Offsets run from −(patches − 1) to patches − 1. Both numbers are odd, so that offset 0 is in the middle of the
    middle cell. A cell is as narrow as `CELLS` allows.
    """
    size = 1
    while 2 * math.ceil((patches - 1 - size // 2) / size) + 1 > CELLS:
        size += 2
    return size, 2 * math.ceil((patches - 1 - size // 2) / size) + 1


def row_kind(options: Options, grid: tuple[int, int], vector_size: int = 0) -> RowKind:
    """Says which rows a dataset-scope run clusters, and checks its options.

    Parameters
    ----------
    options
        The result options of the run.
    grid
        (rows, columns) of patches.
    vector_size
        D of the vectors that are clustered in place of attention rows; 0 for attention rows.

    Returns
    -------
    The kind of rows.

    Raises
    ------
    UserError
        An option does not go with the dataset scope or with another option.
    """
    if options.algorithms != ("kmeans",):
        raise UserError(f"--scope dataset clusters by kmeans, not by {options.algorithm}; give --algorithm kmeans")
    if not options.k.isdigit():
        raise UserError(f"--scope dataset has one k for all images, not --k {options.k}; give a number, e.g. --k 64")
    if options.queries == "cls" and options.features == "relative":
        raise UserError(
            "--features relative is by offset from the query, and CLS has no place; use absolute, or --queries rows"
        )
    asked_rows(options)
    return RowKind(options.queries, options.features, grid, vector_size)


def check_rows(options: Options, grid: tuple[int, int], images: int) -> None:
    """Checks the options of a dataset-scope run, and that its images have at least k rows.

    Parameters
    ----------
    options, grid
        As for `row_kind`.
    images
        How many images the run has.

    Raises
    ------
    UserError
        `row_kind` refuses the options, or there are fewer rows than clusters.
    """
    rows = images * row_kind(options, grid).per_image
    if rows < int(options.k):
        raise UserError(
            f"--k {options.k} needs as many rows, found {rows} in {counted(images, 'image')}; give --k {rows} or less"
        )


def asked_rows(options: Options) -> int:
    """How many rows the fit should see, before any memory budget.

    Raises UserError where `--fit-rows` is not a number, or is below k.
    """
    if options.fit_rows == "auto":
        return AUTO_ROWS
    if not options.fit_rows.isdigit() or int(options.fit_rows) < 1:
        raise UserError(f"--fit-rows {options.fit_rows!r} is not a number of rows; give a number, or auto")
    if int(options.fit_rows) < int(options.k):
        raise UserError(f"--fit-rows {options.fit_rows} is below --k {options.k}; give at least one row a cluster")
    return int(options.fit_rows)


def row_numbers(images: NDArray[np.int64], kind: RowKind) -> NDArray[np.int64]:
    """Numbers the rows of a dataset: image i has those from i · per_image on.

    Parameters
    ----------
    images
        int64 [B] rows of the plan.
    kind
        The rows of the run.

    Returns
    -------
    int64 [B, per_image].
    """
    return images[:, None] * kind.per_image + np.arange(kind.per_image, dtype=np.int64)


def hash_numbers(numbers: NDArray[np.int64], seed: int) -> NDArray[np.uint64]:
    """Hashes row numbers under a seed, by SplitMix64 (Steele et al. 2014) applied twice.

    Parameters
    ----------
    numbers
        Any shape, not negative.
    seed
        Other seeds give independent hashes.

    Returns
    -------
    The shape of `numbers`, uniform over all 64-bit words.
    """
    keys = _splitmix(np.asarray(seed & 0xFFFFFFFFFFFFFFFF, np.uint64).reshape(1))
    return _splitmix(_splitmix(numbers.astype(np.uint64)) ^ keys)


def _splitmix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@dataclass(frozen=True, slots=True)
class Sample:
    """A uniform sample of `rows` of `total` rows: those whose numbers have the smallest hashes under the seed."""

    seed: int
    total: int
    rows: int
    threshold: int  # a row is in the sample where its hash is below this

    def chosen(self, numbers: NDArray[np.int64]) -> NDArray[np.bool_]:
        """bool, in the shape of `numbers`: whether the row with this number is in the sample."""
        if self.rows >= self.total:
            return np.ones(numbers.shape, bool)
        return hash_numbers(numbers, self.seed) < np.uint64(self.threshold)

    def most_rows(self, start: int, stop: int) -> int:
        """How many rows of a range memory is needed for.

        Parameters
        ----------
        start, stop
            The numbers of the rows: from `start` to `stop` − 1.

        Returns
        -------
        The number of rows in the sample, counted (0.3 s for 10 million). With more than `EXACT_ROWS` in all it is not
        counted, but an upper bound: the expected number and more than 6 standard deviations.
        """
        if self.rows >= self.total:
            return stop - start
        if self.total > EXACT_ROWS:
            mean = (stop - start) * self.rows / self.total
            return min(stop - start, int(mean + 6 * math.sqrt(mean)) + 64)
        return sum(int(np.count_nonzero(self.chosen(part))) for part in _parts(start, stop))


def draw_sample(total: int, rows: int, seed: int) -> Sample:
    """Draws a uniform sample of the rows of a dataset.

    Parameters
    ----------
    total
        How many rows there are.
    rows
        How many are wanted, at least 1; at most all are drawn.
    seed
        Equal seeds give equal samples.

    Returns
    -------
    A sample of exactly so many rows; of more than `EXACT_ROWS` rows, the sample has at most so many.
    """
    rows = min(rows, total)
    if rows >= total:
        return Sample(seed, total, total, 1 << 64)
    slack = 6 * math.sqrt(rows) + 64
    if total > EXACT_ROWS:
        kept = max(1.0, rows - slack)
        return Sample(seed, total, int(kept), int(kept / total * 2**64))
    bound = np.uint64(min(2**64 - 1, int((rows + slack) / total * 2**64)))
    hashes = np.concatenate([h[h <= bound] for part in _parts(0, total) for h in [hash_numbers(part, seed)]])
    # `slack` is 6 standard deviations; should fewer rows be below the bound, all of them are a uniform sample too
    last = min(rows, len(hashes)) - 1
    return Sample(seed, total, last + 1, int(np.partition(hashes, last)[last]) + 1)


def _parts(start: int, stop: int) -> list[NDArray[np.int64]]:
    return [np.arange(i, min(i + _CHUNK, stop), dtype=np.int64) for i in range(start, stop, _CHUNK)]


def affordable_rows(wanted: int, *, row_bytes: int, budget_bytes: int, largest_share: float) -> tuple[int, str]:
    """Limits the rows of a fit to those that the process with the largest share of the data can hold.

    Parameters
    ----------
    wanted
        Rows that the fit should see, in all processes.
    row_bytes
        Bytes that one row of the dataset takes in all layers and heads.
    budget_bytes
        Bytes that each process has.
    largest_share
        The largest share of the data of one process, above 0 and at most 1.

    Returns
    -------
    (rows, reason): at most `wanted`, maybe 0.
    """
    held = budget_bytes / row_bytes / largest_share
    fits = int(max(0.0, held - 6 * math.sqrt(max(held, 1.0))))  # a process may get more of the sample than its share
    if wanted <= fits:
        size = wanted * row_bytes * largest_share
        return wanted, f"{counted(wanted, 'row')}: {_gib(size)} of a budget of {_gib(budget_bytes)} a process"
    return fits, f"{counted(fits, 'row')} instead of {wanted:,}: that is the budget of {_gib(budget_bytes)} a process"


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"
