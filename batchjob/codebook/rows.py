"""What a dataset-wide clustering clusters: how many rows an image gives, how wide they are, which of them the fit sees.

No torch here: `plan`, `store` and the figures ask the same questions.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from batchjob.config import Options
from batchjob.errors import UserError

AUTO_ROWS = 1 << 20  # 4096 rows a centroid at k = 254; more moves the centroids by less than their seed does
CELLS = 15  # a relative map has at most this many cells an axis
EXACT_ROWS = 1 << 31  # above this many rows the sample's size is met within 4 standard deviations, from below
_CHUNK = 1 << 22


@dataclass(frozen=True, slots=True)
class RowKind:
    """The rows that one head of one image gives: `per_image` of them, each a small map of `shape` = [y, x]."""

    queries: str  # "rows": one a patch; "cls": one an image
    features: str  # "absolute": by key position; "relative": by offset from the query, pooled
    grid: tuple[int, int]
    vector_size: int = 0  # D of vectors that are not maps: queries, keys, values or tokens; 0 for attention rows

    @property
    def per_image(self) -> int:
        """Rows of an image and head."""
        return 1 if self.queries == "cls" else self.grid[0] * self.grid[1]

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns) of a row's map, and of a centroid's."""
        if self.features == "absolute":
            return self.grid
        return offset_cells(self.grid[0])[1], offset_cells(self.grid[1])[1]

    @property
    def width(self) -> int:
        """Numbers of a row: the `feature` dimension of the centroids."""
        return self.vector_size or self.shape[0] * self.shape[1]


def offset_cells(patches: int) -> tuple[int, int]:
    """(offsets a cell, cells) along an axis of `patches`: odd both, so that offset 0 is in the middle of the middle.

    Offsets run from −(patches − 1) to patches − 1; a cell is as narrow as `CELLS` allows.
    """
    size = 1
    while 2 * math.ceil((patches - 1 - size // 2) / size) + 1 > CELLS:
        size += 2
    return size, 2 * math.ceil((patches - 1 - size // 2) / size) + 1


def row_kind(options: Options, grid: tuple[int, int], vector_size: int = 0) -> RowKind:
    """The rows of a dataset-scope run, its options checked. Raises UserError where they cannot be meant together."""
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
    """Nothing; raises UserError where a dataset-scope run makes no sense, or its images have fewer rows than k."""
    rows = images * row_kind(options, grid).per_image
    if rows < int(options.k):
        raise UserError(f"--k {options.k} needs as many rows, found {rows} in {images} images; give --k {rows} or less")


def asked_rows(options: Options) -> int:
    """How many rows the fit is to see, before any budget. Raises UserError where it is not a number, or is below k."""
    if options.fit_rows == "auto":
        return AUTO_ROWS
    if not options.fit_rows.isdigit() or int(options.fit_rows) < 1:
        raise UserError(f"--fit-rows {options.fit_rows!r} is not a number of rows; give a number, or auto")
    if int(options.fit_rows) < int(options.k):
        raise UserError(f"--fit-rows {options.fit_rows} is below --k {options.k}; give at least one row a cluster")
    return int(options.fit_rows)


def row_numbers(images: NDArray[np.int64], kind: RowKind) -> NDArray[np.int64]:
    """int64 [B, per_image]: the dataset's numbers of these images' rows; image i has i · per_image and so on."""
    return images[:, None] * kind.per_image + np.arange(kind.per_image, dtype=np.int64)


def mix(numbers: NDArray[np.int64], seed: int) -> NDArray[np.uint64]:
    """uint64 hashes of row numbers under a seed, uniform and independent: splitmix64 (Steele et al. 2014), twice."""
    keys = _splitmix(np.asarray(seed & 0xFFFFFFFFFFFFFFFF, np.uint64).reshape(1))
    return _splitmix(_splitmix(numbers.astype(np.uint64)) ^ keys)


def _splitmix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@dataclass(frozen=True, slots=True)
class Sample:
    """A uniform sample of `rows` of `total` rows: those with the smallest hashes. Decided by seed and number alone."""

    seed: int
    total: int
    rows: int
    threshold: int  # rows whose hash is below it are in

    def chosen(self, numbers: NDArray[np.int64]) -> NDArray[np.bool_]:
        """bool, shaped as `numbers`: which of these rows the fit sees."""
        if self.rows >= self.total:
            return np.ones(numbers.shape, bool)
        return mix(numbers, self.seed) < np.uint64(self.threshold)

    def room(self, start: int, stop: int) -> int:
        """At most so many rows with numbers from `start` to `stop` are in: counted, 0.3 s for 10 million.

        Above `EXACT_ROWS` in all it is the mean and 6 standard deviations: what comes beyond has no room.
        """
        if self.rows >= self.total:
            return stop - start
        if self.total > EXACT_ROWS:
            mean = (stop - start) * self.rows / self.total
            return min(stop - start, int(mean + 6 * math.sqrt(mean)) + 64)
        return sum(int(np.count_nonzero(self.chosen(part))) for part in _parts(start, stop))


def draw(total: int, rows: int, seed: int) -> Sample:
    """The sample of `rows` of `total` rows: exactly that many up to `EXACT_ROWS`, above it at most that many."""
    rows = min(rows, total)
    if rows >= total:
        return Sample(seed, total, total, 1 << 64)
    slack = 6 * math.sqrt(rows) + 64
    if total > EXACT_ROWS:
        kept = max(1.0, rows - slack)
        return Sample(seed, total, int(kept), int(kept / total * 2**64))
    bound = np.uint64(min(2**64 - 1, int((rows + slack) / total * 2**64)))
    hashes = np.concatenate([h[h <= bound] for part in _parts(0, total) for h in [mix(part, seed)]])
    # `slack` is 6 standard deviations: with fewer than `rows` below the bound, all of them would still be fair
    last = min(rows, len(hashes)) - 1
    return Sample(seed, total, last + 1, int(np.partition(hashes, last)[last]) + 1)


def _parts(start: int, stop: int) -> list[NDArray[np.int64]]:
    return [np.arange(i, min(i + _CHUNK, stop), dtype=np.int64) for i in range(start, stop, _CHUNK)]


def affordable_rows(wanted: int, *, row_bytes: int, budget_bytes: int, largest_share: float) -> tuple[int, str]:
    """(rows, why): `wanted`, or as many as the process with the largest share of the data can hold.

    `row_bytes` counts a row of the dataset in all layers and heads.
    """
    held = budget_bytes / row_bytes / largest_share
    fits = int(max(0.0, held - 6 * math.sqrt(max(held, 1.0))))  # shares of the sample differ from process to process
    if wanted <= fits:
        size = wanted * row_bytes * largest_share
        return wanted, f"{wanted:,} rows: {_gib(size)} of a budget of {_gib(budget_bytes)} a process"
    return fits, f"{fits:,} rows instead of {wanted:,}: that is the budget of {_gib(budget_bytes)} a process"


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"
