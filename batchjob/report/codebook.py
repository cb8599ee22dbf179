"""The codebook's part of the page: the most common clusters of a dataset-wide run, head by head."""

from collections.abc import Iterator

from matplotlib.figure import Figure

from batchjob.figures import write
from batchjob.figures.view import RunView

_MOST = 24  # clusters of a head; `batchjob figures` draws up to 96 of one
_HEADS = 12  # more would make the page heavy


def codebooks(view: RunView, layer: int) -> Iterator[tuple[Figure, str, str, str]]:
    """(figure, title, caption, alt) of each head of a layer; nothing for a run that clusters image by image."""
    if "centroids" not in view.data:
        return
    k, rows = int(view.plan["options"]["k"]), int(view.data["centroids"].attrs["rows"])
    for head in view.heads[:_HEADS]:
        shown = f"the {_MOST} most common of {k} clusters" if k > _MOST else f"all {k} clusters"
        caption = (
            f"Layer {layer}, head {head}: {shown}, fitted to {rows:,} attention rows of the whole dataset. A number "
            "means the same in every image. The centroid first, then photos that show it most."
        )
        alt = f"Centroids of layer {layer}, head {head} as small maps, each with its share and three photos."
        yield write.codebook_of(view, layer, head, most=_MOST), f"Codebook, head {head}", caption, alt
