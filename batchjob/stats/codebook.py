"""Describes the clusters of a dataset-wide run: where, in which categories and in which images they occur.

Letters besides those of docs/metrics.md: R rows of an image that have a label of their own (its P patches, or 1 where
CLS rows were clustered), Z = layers × heads, C categories, of which the first is "no instance".
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import zarr
from numpy.typing import NDArray

from batchjob.codes import OK
from batchjob.data.annotations import Annotations, instances_on_grid
from batchjob.store.run import Run

EXACT_ROWS = 1 << 20  # with more rows, expected information is taken as its limit for many rows, (K − 1)(C − 1) / 2n
_TYPICAL = 8  # images kept for each cluster
_ROWS_AT_ONCE = 512
_TOLD_ROWS = 20  # a category with fewer rows in a cluster is not told in words
_NO_INSTANCE = "no instance"


@dataclass(slots=True)
class Codebook:
    """Counts over a run's labelled images."""

    run: Run
    names: list[str]  # of the categories
    positions: NDArray[np.int64]  # [Z, K, R] images whose row is in the cluster
    images: NDArray[np.int64]  # [Z, K] images in which the cluster occurs
    categories: NDArray[np.int64]  # [Z, K, C] rows of annotated images; for CLS rows, images that show the category
    groups: NDArray[np.int64]  # [Z, K, C] each row once; for CLS rows, by the category that owns most patches
    classes: NDArray[np.int64]  # [Z, K, classes] rows of images of each class; no class where the data name none
    typical: NDArray[np.int64]  # [Z, K, _TYPICAL] rows of images, best first; −1 where there are fewer
    typical_values: NDArray[np.float64]  # share of the image's rows; for CLS rows, minus the squared distance


def count(run: Run, annotations: Annotations | None, *, are_planned: bool) -> Codebook:
    """Counts where the clusters of a run in dataset scope occur, in one pass over its labels.

    Parameters
    ----------
    run
        A run in dataset scope.
    annotations
        Those of its images. With None, no row has a category.
    are_planned
        Whether the annotations are those of the plan. If so, the categories of patches are read from labels.zarr.
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
        [_NO_INSTANCE, *(known[c] for c in sorted(known))],
        np.zeros((heads, k, rows), np.int64),
        np.zeros((heads, k), np.int64),
        np.zeros((heads, k, len(number) + 1), np.int64),
        np.zeros((heads, k, len(number) + 1), np.int64),
        np.zeros((heads, k, len(known_classes)), np.int64),
        np.full((heads, k, _TYPICAL), -1, np.int64),
        np.full((heads, k, _TYPICAL), -np.inf),
    )
    for start in range(0, run.rows, _ROWS_AT_ONCE):
        stop = min(start + _ROWS_AT_ONCE, run.rows)
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
                of_patch = np.append(found.category, -1)[found.owner]  # an owner of −1 finds the last entry
            dense = [number.get(int(c), 0) for c in of_patch]
            _add_categories(book, own, np.array(dense))
    return book


def _add_labels(
    book: Codebook, labels: NDArray[np.uint8], at: NDArray[np.int64], distances: NDArray[np.float32]
) -> None:
    """Counts labels [n, Z, R] of the images in rows `at`; `distances` [n, Z] are squared ones to the own centroid."""
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
    order = np.argsort(-values, axis=2, kind="stable")[..., :_TYPICAL]
    book.typical_values = np.take_along_axis(values, order, 2)
    book.typical = np.where(np.isfinite(book.typical_values), np.take_along_axis(images, order, 2), -1)


def _add_classes(book: Codebook, labels: NDArray[np.uint8], class_of: NDArray[np.int64]) -> None:
    """Counts labels [n, Z, R] of images by the number of each image's class [n], −1 for none."""
    labels, class_of = labels[class_of >= 0].astype(np.int64), class_of[class_of >= 0]
    _, k, kinds = book.classes.shape
    codes = (np.arange(labels.shape[1])[None, :, None] * k + labels) * kinds + class_of[:, None, None]
    book.classes += np.bincount(codes[labels < k], minlength=book.classes.size).reshape(book.classes.shape)


def _add_categories(book: Codebook, labels: NDArray[np.uint8], category: NDArray[np.int64]) -> None:
    """Counts labels [Z, R] of one image by the categories [P] of its patches."""
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
    """Computes the adjusted mutual information of one contingency table [K, C] over the whole dataset.

    It is NaN without rows, 0 if only one row or only one column has counts, and 1 if both.

    References
    ----------
    Vinh, Epps and Bailey 2010, normalised by the arithmetic mean of the entropies, as scikit-learn does.
    """
    table = table[table.sum(1) > 0][:, table.sum(0) > 0]
    n = int(table.sum())
    if n == 0:
        return float("nan")
    if min(table.shape) == 1:
        return 1.0 if max(table.shape) == 1 else 0.0
    from sklearn.metrics.cluster import expected_mutual_information  # importing it takes a second

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
    """Makes tidy tables of the codebook, by name.

    `codebook` has a row a cluster, `codebook_categories` a row a cluster and category, `codebook_positions` a row a
    cluster and patch, `codebook_images` a row a cluster and typical image. `codebook_agreement` has the adjusted mutual
    information of each head's clusters with categories and classes.
    """
    run, (heads, k) = book.run, book.images.shape
    layer, head = np.repeat(run.layers, len(run.heads)), np.tile(run.heads, len(run.layers))
    ids = run.ids
    rows = book.positions.sum(2)
    total = np.maximum(rows.sum(1, keepdims=True), 1)
    of_cluster = book.categories / np.maximum(book.categories.sum(2, keepdims=True), 1)
    usual = book.categories.sum(1, keepdims=True) / np.maximum(book.categories.sum((1, 2), keepdims=True), 1)
    lift = np.divide(of_cluster, usual, out=np.zeros_like(of_cluster), where=usual > 0)
    # The best category adds most to the mutual information: it is more common here than usual, and seen often enough.
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
    """Says what the tables hold.

    Parameters
    ----------
    found
        What `tables` returns.
    is_annotated
        Whether categories are known.

    Returns
    -------
    Lines for a person to read.
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
    told = told[(told["category"] != _NO_INSTANCE) & (told["rows"] >= _TOLD_ROWS) & (told["lift"] >= 1.5)]
    weight = told["rows"] * np.log(told["lift"])  # what the category adds to the mutual information
    for index in weight.nlargest(3).index:
        line = told.loc[index]
        lines.append(
            f"  layer {line['layer']}, head {line['head']}, cluster {line['cluster']}: {line['share_of_cluster']:.0%} "
            f"{line['category']}, {line['lift']:.1f} times as often as usual ({line['rows']:,} rows)"
        )
    return lines
