"""Outlines the objects of a photo: by their masks where the annotations are at hand, else on the patch grid."""

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import contourpy
import matplotlib.path
import numpy as np
from numpy.typing import NDArray

from batchjob.errors import UserError
from batchjob.figures import canvas
from batchjob.figures.outlines import Kind, Outline, choose_colours
from batchjob.figures.palette import OBJECT_COLOURS
from batchjob.store.run import Run

_SIDE = 640  # pixels; a mask with a longer side is thinned out before its outline is followed
_COUNTED = 5_000  # the most images from which the colours of the categories are chosen
_TOLERANCE = 0.8  # pixels of the thinned mask by which a simplified outline may be off


def objects_of(run: Run, row: int) -> list[Outline]:
    """Outlines the objects of an image.

    The outlines are those of the masks in the annotations that `stats --annotations` scored last, or in the planned
    ones. If the planned ones are gone or have changed, the outlines are those of the patches that each instance
    owns, which the run holds itself; crowds and small objects are then missing. A category has the same colour in all
    images of the run.

    Parameters
    ----------
    run
        The run.
    row
        The row of the image.

    Returns
    -------
    The objects, in the order of the annotations; none where no annotations are known.
    """
    given = run.annotations_scored
    known = _annotations(run.folder, tuple(given.items()))
    owner = run.data["instance"].isel(image=row).values if "instance" in run.data and not given else None
    if known is None:
        return [] if owner is None else _on_grid(run, row, owner)
    height, width = int(run.data["height"][row]), int(run.data["width"][row])
    image = known.image(run.ids[row])
    if image is None or not image.fits(height, width):
        return []
    colours = _colours(run.folder, tuple(given.items()))
    left, top, right, bottom = run.geometry.source_box(height, width)
    kept, found = set(_scored(run, image, height, width) if owner is None else np.unique(owner).tolist()), []
    for number, category, is_crowd, mask in _masks(image, height, width):
        kind: Kind = "crowd" if is_crowd else "instance" if number in kept else "small"
        lines = tuple((line - (left, top)) / (right - left, bottom - top) for line in follow(mask))
        name = known.categories.get(category, str(category))
        found.append(Outline(name, kind, lines, colours.get(name, OBJECT_COLOURS[-1])))
    return found


def _scored(run: Run, image: Any, height: int, width: int) -> list[int]:
    """Returns the numbers of the instances that own enough patches to be scored."""
    from batchjob.data.annotations import instances_on_grid

    return [int(number) for number in instances_on_grid(image, run.geometry, height, width).index]


def _masks(image: Any, height: int, width: int) -> Iterator[tuple[int, int, bool, NDArray[np.uint8]]]:
    """Yields (number in the image, category, whether it is a crowd, mask [height, width]) of each object."""
    from batchjob.data import voc
    from batchjob.data.masks import read_masks

    if image.voc_objects:
        for number, (category, mask) in enumerate(voc.masks(image.voc_objects, image.voc_classes)):
            yield number, category, False, mask
    for number, mask in read_masks(image.instances, height, width, crowds=True):
        yield number, image.instances[number].category, image.instances[number].crowd, mask


@functools.lru_cache(maxsize=4)
def _annotations(folder: Path, given: tuple[tuple[str, str], ...]) -> Any:
    """Opens the annotations `given` as paths and hashes, else the planned ones; returns None if they have changed."""
    from batchjob.data.annotations import open_annotations
    from batchjob.inputs import differences

    run = Run(folder)
    source = ",".join(path for path, _ in given) or run.annotations
    try:
        if not source or differences(folder, dict(given) or run.plan["inputs"], index=False, annotations=True):
            return None
        return open_annotations(source).join(run.ids, str(folder))
    except (UserError, OSError):
        return None


@functools.lru_cache(maxsize=4)
def _colours(folder: Path, given: tuple[tuple[str, str], ...]) -> dict[str, str]:
    """Chooses the colours of all categories of a run by the images that they are in, or by 5,000 of very many."""
    run, known = Run(folder), _annotations(folder, given)
    rows = np.unique(np.linspace(0, len(run.ids) - 1, min(_COUNTED, len(run.ids))).astype(int)).tolist()
    if known is None:
        numbers = run.data["category"].isel(image=rows).values
        names = _names(run)
        photos = [[names.get(str(n), str(n)) for n in np.unique(image[image >= 0])] for image in numbers]
        return choose_colours(photos, names.values())
    images = [image for row in rows if (image := known.image(run.ids[row])) is not None]
    photos = [[known.categories.get(i.category, str(i.category)) for i in image.instances] for image in images]
    return choose_colours(photos, known.categories.values())


def _names(run: Run) -> dict[str, str]:
    """Returns the names of the categories by their numbers, as the run itself holds them."""
    return dict(run.data["category"].attrs.get("categories", {}))


def follow(mask: NDArray[np.uint8]) -> list[NDArray[np.float64]]:
    """Follows the outlines of a mask [height, width] and returns them as closed lines [n, (x, y)] in pixels."""
    step = -(-max(mask.shape) // _SIDE)
    thin = np.pad(mask[::step, ::step] > 0, 1).astype(np.float32)
    lines = []
    for line in contourpy.contour_generator(z=thin).lines(0.5):
        path = matplotlib.path.Path(np.asarray(line))
        path.simplify_threshold = _TOLERANCE
        kept = np.asarray(path.cleaned(simplify=True).vertices, np.float64)[:-1]  # the last vertex only marks the end
        lines.append((kept - 0.5) * step)
    return lines


def _on_grid(run: Run, row: int, owner: NDArray[np.int16]) -> list[Outline]:
    from batchjob.figures.photos import display

    category = run.data["category"].isel(image=row).values
    names, colours = _names(run), _colours(run.folder, ())
    _, span = display(run.geometry, int(run.data["height"][row]), int(run.data["width"][row]), _SIDE)
    scale = np.array([span[1] / owner.shape[1], span[0] / owner.shape[0]])
    found = []
    for number in np.unique(owner[owner >= 0]):
        lines = (canvas.borders(np.pad(owner == number, 1)) - 1) * scale
        number_words = str(category[owner == number][0])
        name = names.get(number_words, number_words)
        found.append(Outline(name, "instance", tuple(lines), colours.get(name, OBJECT_COLOURS[-1])))
    return found
