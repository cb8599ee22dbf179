"""What the clusters of a dataset-wide run stand for: where, in which categories and in which images they occur.

Letters beside docs/metrics.md's: R rows of an image with a label of their own (its P patches; 1 where CLS rows were
clustered), Z = layers × heads, C categories (the first is "no instance").
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import zarr
from numpy.typing import NDArray

from batchjob.codes import OK
from batchjob.data.annotations import Annotations, instances_on_grid
from batchjob.store.run import Run

TYPICAL = 8  # images kept for each cluster
EXACT_ROWS = 1 << 20  # above it the expected information is its limit for many rows, (K − 1)(C − 1) / 2n
ROWS_AT_ONCE = 512
TOLD_ROWS = 20  # of a category in a cluster before a sentence is made of them
NO_INSTANCE = "no instance"


@dataclass(slots=True)
class Codebook:
    """Counts over a run's labelled images."""

    run: Run
    names: list[str]  # of the categories
    positions: NDArray[np.int64]  # [Z, K, R] images whose row is in the cluster
    images: NDArray[np.int64]  # [Z, K] in which the cluster occurs
    categories: NDArray[np.int64]  # [Z, K, C] rows of annotated images; of CLS rows: images that show the category
    groups: NDArray[np.int64]  # [Z, K, C] each row once: of CLS rows by the category that owns most patches
    classes: NDArray[np.int64]  # [Z, K, classes] rows of images of each class; no class where the data name none
    typical: NDArray[np.int64]  # [Z, K, TYPICAL] images' rows, best first; −1 where there are fewer
    typical_values: NDArray[np.float64]  # share of the image's rows; of CLS rows minus the squared distance


def count(run: Run, annotations: Annotations | None, *, are_planned: bool = False) -> Codebook:
    """Counts where the clusters of a run in dataset scope occur, in one pass over its labels.

    Parameters
    ----------
    run
        In dataset scope.
    annotations
        Of its images, or None.
    are_planned
        The annotations are those of the plan: the categories of patches are then read from labels.zarr.
    """
    known = annotations.categories if annotations is not None else {}
    number = {category: i + 1 for i, category in enumerate(sorted(known))}
    group = zarr.open_group(str(run.folder / "labels.zarr"), mode="r", zarr_format=3)
    labels: Any = group["labels" if run.has_labels else "image_labels"]
    inertia: Any = group["inertia"]
    ids = run.ids if annotations is not None else []
    classes = run.classes or []
    known_classes = {name: i for i, name in enumerate(sorted(set(classes) - {""}))}
    class_of = np.array([known_classes.get(name, -1) for name in classes], np.int64)
    k, heads = int(run.options["k"]), len(run.layers) * len(run.heads)
    rows = run.geometry.grid[0] * run.geometry.grid[1] if run.has_labels else 1
    book = Codebook(
        run,
        [NO_INSTANCE, *(known[c] for c in sorted(known))],
        np.zeros((heads, k, rows), np.int64),
        np.zeros((heads, k), np.int64),
        np.zeros((heads, k, len(number) + 1), np.int64),
        np.zeros((heads, k, len(number) + 1), np.int64),
        np.zeros((heads, k, len(known_classes)), np.int64),
        np.full((heads, k, TYPICAL), -1, np.int64),
        np.full((heads, k, TYPICAL), -np.inf),
    )
    for start in range(0, run.rows, ROWS_AT_ONCE):
        stop = min(start + ROWS_AT_ONCE, run.rows)
        part = run.read(start, stop, only=("objects",) if are_planned else ())
        ok = np.nonzero(part.status == OK)[0]
        block = labels[start:stop].reshape(stop - start, heads, rows)[ok]
        distances = inertia[start:stop].reshape(stop - start, heads)[ok]
        _add_labels(book, block, start + ok, distances)
        if known_classes:
            _add_classes(book, block, class_of[start + ok])
        for i, own in zip(ok, block, strict=True):
            image = annotations.image(ids[start + i]) if annotations is not None else None
            size = int(part.height[i]), int(part.width[i])
            if image is None or not image.fits(*size):
                continue
            if part.category is not None:
                of_patch = part.category[i]
            else:
                found = instances_on_grid(image, run.geometry, *size)
                of_patch = np.append(found.category, -1)[found.owner]  # −1 finds the last
            dense = [number.get(int(c), 0) for c in of_patch]
            _add_categories(book, own, np.array(dense))
    return book


def _add_labels(
    book: Codebook, labels: NDArray[np.uint8], at: NDArray[np.int64], distances: NDArray[np.float32]
) -> None:
    """labels [n, Z, R] of the images `at`, distances [n, Z]."""
    n, heads, rows = labels.shape
    k = book.images.shape[1]
    wide = labels.astype(np.int64)
    has_label = wide < k
    z = np.arange(heads)[None, :, None]
    codes = ((z * k + wide) * rows + np.arange(rows))[has_label]
    book.positions += np.bincount(codes, minlength=book.positions.size).reshape(book.positions.shape)
    codes = ((np.arange(n)[:, None, None] * heads + z) * k + wide)[has_label]
    shares = np.bincount(codes, minlength=n * heads * k).reshape(n, heads, k)  # rows of each image and cluster
    book.images += (shares > 0).sum(0)
    values = np.where(shares > 0, shares / rows, -np.inf)
    if rows == 1:
        values = np.where(shares > 0, -distances[:, :, None].astype(np.float64), -np.inf)
    values = np.concatenate([book.typical_values, values.transpose(1, 2, 0)], axis=2)
    images = np.concatenate([book.typical, np.broadcast_to(at, (heads, k, n))], axis=2)
    order = np.argsort(-values, axis=2, kind="stable")[..., :TYPICAL]
    book.typical_values = np.take_along_axis(values, order, 2)
    book.typical = np.where(np.isfinite(book.typical_values), np.take_along_axis(images, order, 2), -1)


def _add_classes(book: Codebook, labels: NDArray[np.uint8], class_of: NDArray[np.int64]) -> None:
    """labels [n, Z, R] of images, and the number of each image's class [n], −1 for none."""
    labels, class_of = labels[class_of >= 0].astype(np.int64), class_of[class_of >= 0]
    _, k, kinds = book.classes.shape
    codes = (np.arange(labels.shape[1])[None, :, None] * k + labels) * kinds + class_of[:, None, None]
    book.classes += np.bincount(codes[labels < k], minlength=book.classes.size).reshape(book.classes.shape)


def _add_categories(book: Codebook, labels: NDArray[np.uint8], category: NDArray[np.int64]) -> None:
    """labels [Z, R] of one image, category [P] of its patches."""
    heads, rows = labels.shape
    _, k, kinds = book.categories.shape
    if rows == 1:  # the image as a whole
        owned = np.bincount(category, minlength=kinds)
        shown = np.nonzero(owned[1:])[0] + 1
        main = shown[np.argmax(owned[shown])] if len(shown) else 0
        book.groups[np.arange(heads), labels[:, 0], main] += 1
        for c in shown if len(shown) else [0]:
            book.categories[np.arange(heads), labels[:, 0], c] += 1
        return
    wide = labels.astype(np.int64)
    codes = ((np.arange(heads)[:, None] * k + wide) * kinds + category)[wide < k]
    counts = np.bincount(codes, minlength=book.categories.size).reshape(book.categories.shape)
    book.categories += counts
    book.groups += counts


def dataset_ami(table: NDArray[np.int64]) -> float:
    """Adjusted mutual information of one contingency table [K, C] over the whole dataset; NaN without rows.

    Vinh, Epps and Bailey 2010, arithmetic mean of the entropies, as scikit-learn has it; 0 where one side is trivial.
    """
    table = table[table.sum(1) > 0][:, table.sum(0) > 0]
    n = int(table.sum())
    if n == 0:
        return float("nan")
    if min(table.shape) == 1:
        return 1.0 if max(table.shape) == 1 else 0.0
    from sklearn.metrics.cluster import expected_mutual_information  # a second to import, for nothing else in a job

    a, b = _entropy(table.sum(1)), _entropy(table.sum(0))
    information = a + b - _entropy(table.ravel())
    if n <= EXACT_ROWS:
        expected = float(expected_mutual_information(table, n))
    else:
        expected = (table.shape[0] - 1) * (table.shape[1] - 1) / (2 * n)
    return (information - expected) / max((a + b) / 2 - expected, np.finfo(float).eps)


def _entropy(counts: NDArray[np.int64]) -> float:
    share = counts[counts > 0] / counts.sum()
    return float(-(share * np.log(share)).sum())


def tables(book: Codebook) -> dict[str, pd.DataFrame]:
    """The codebook as tidy tables: one line a cluster; a cluster and category; position; image; and the agreement."""
    run, (heads, k) = book.run, book.images.shape
    layer, head = np.repeat(run.layers, len(run.heads)), np.tile(run.heads, len(run.layers))
    ids = run.ids
    rows = book.positions.sum(2)
    total = np.maximum(rows.sum(1, keepdims=True), 1)
    of_cluster = book.categories / np.maximum(book.categories.sum(2, keepdims=True), 1)
    usual = book.categories.sum(1, keepdims=True) / np.maximum(book.categories.sum((1, 2), keepdims=True), 1)
    lift = np.divide(of_cluster, usual, out=np.zeros_like(of_cluster), where=usual > 0)
    # most of the mutual information: a category that is both more common here than usual, and seen often enough
    weight = book.categories * np.log(np.where(lift > 0, lift, 1))
    best = weight[:, :, 1:].argmax(2) + 1 if lift.shape[2] > 1 else np.zeros((heads, k), np.int64)
    best = np.where(np.take_along_axis(weight, best[..., None], 2)[..., 0] > 0, best, 0)
    z, c = np.indices((heads, k))
    fitted: Any = zarr.open_group(str(run.folder / "labels.zarr"), mode="r", zarr_format=3)["centroid_rows"]
    clusters = pd.DataFrame(
        {
            "layer": layer[z.ravel()],
            "head": head[z.ravel()],
            "cluster": c.ravel(),
            "rows": rows.ravel(),
            "share": (rows / total).ravel(),
            "images": book.images.ravel(),
            "fit_rows": np.asarray(fitted[0]).reshape(heads, k).ravel(),
            "category": [book.names[i] for i in best.ravel()],
            "category_share": of_cluster[z, c, best].ravel(),
            "lift": lift[z, c, best].ravel(),
        }
    )
    found = {"codebook": clusters, "codebook_agreement": _agreement(book, layer, head)}
    z, c, g = np.nonzero(book.categories)
    found["codebook_categories"] = pd.DataFrame(
        {
            "layer": layer[z],
            "head": head[z],
            "cluster": c,
            "category": np.array(book.names)[g],
            "rows": book.categories[z, c, g],
            "share_of_cluster": of_cluster[z, c, g],
            "share_of_category": (book.categories / np.maximum(book.categories.sum(1, keepdims=True), 1))[z, c, g],
            "lift": lift[z, c, g],
        }
    )
    if run.has_labels:
        z, c, p = np.nonzero(book.positions)
        images = np.maximum(book.positions.sum(1), 1)  # with a label there
        columns = {"layer": layer[z], "head": head[z], "cluster": c}
        columns |= {"y": p // run.geometry.grid[1], "x": p % run.geometry.grid[1]}
        found["codebook_positions"] = pd.DataFrame(columns | {"share": book.positions[z, c, p] / images[z, p]})
    z, c, rank = np.nonzero(book.typical >= 0)
    at = book.typical[z, c, rank]
    columns = {"layer": layer[z], "head": head[z], "cluster": c, "rank": rank, "row": at}
    value = "share" if run.has_labels else "squared_distance"
    values = np.abs(book.typical_values[z, c, rank])
    found["codebook_images"] = pd.DataFrame(columns | {"image_id": [ids[i] for i in at], value: values})
    return found


def _agreement(book: Codebook, layer: NDArray[Any], head: NDArray[Any]) -> pd.DataFrame:
    lines = []
    for z in range(len(layer)):
        tables = [("categories", book.groups[z, :, 1:]), ("categories and the rest", book.groups[z])]
        tables += [("classes", book.classes[z])] * bool(book.classes.shape[2])
        for against, table in tables:
            lines.append((layer[z], head[z], against, dataset_ami(table), int(table.sum())))
    return pd.DataFrame(lines, columns=["layer", "head", "against", "ami", "rows"])


def describe(found: dict[str, pd.DataFrame], *, is_annotated: bool) -> list[str]:
    """What the tables say, in lines to read.

    Parameters
    ----------
    found
        As `tables` gives them.
    is_annotated
        Whether categories are known.
    """
    clusters, agreement = found["codebook"], found["codebook_agreement"]
    empty = int((clusters["rows"] == 0).sum())
    lines = [f"codebook: {len(clusters):,} clusters, {empty} of them in no image; each is one thing in every image"]
    for against in ("classes", "categories"):
        own = agreement[agreement["against"] == against].dropna()
        if len(own):
            best = own.iloc[int(own["ami"].to_numpy().argmax())]
            lines.append(
                f"agreement with {against} (AMI over {best['rows']:,} rows): median {own['ami'].median():.3f}, best "
                f"{best['ami']:.3f} in layer {best['layer']}, head {best['head']}"
            )
    if not is_annotated:
        return [*lines, "agreement with categories needs annotations; give --annotations FILE"]
    told = found["codebook_categories"]
    told = told[(told["category"] != NO_INSTANCE) & (told["rows"] >= TOLD_ROWS) & (told["lift"] >= 1.5)]
    weight = told["rows"] * np.log(told["lift"])  # what it adds to the mutual information
    for index in weight.nlargest(3).index:
        line = told.loc[index]
        lines.append(
            f"  layer {line['layer']}, head {line['head']}, cluster {line['cluster']}: {line['share_of_cluster']:.0%} "
            f"{line['category']}, {line['lift']:.1f} times as often as usual ({line['rows']:,} rows)"
        )
    return lines


def write(run: Run, annotations: Annotations | None, *, csv: bool, are_planned: bool) -> Sequence[str]:
    """Writes the codebook's tables under RUN/stats and returns the lines to read.

    Parameters
    ----------
    run, annotations, are_planned
        As in `count`.
    csv
        Writes a CSV file beside each Parquet file.
    """
    found = tables(count(run, annotations, are_planned=are_planned))
    for name, table in found.items():
        table.to_parquet(run.folder / "stats" / f"{name}.parquet", index=False)
        if csv:
            table.to_csv(run.folder / "stats" / f"{name}.csv", index=False)
    return describe(found, is_annotated=annotations is not None)
