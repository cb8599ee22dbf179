"""Draws docs/overview.png and docs/sample.png from the sample's run: python docs/sample_pictures.py RUN, at the root.

RUN is what `make run` makes, with its statistics.
"""

import io
import sys
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))
from batchjob.figures import Look, canvas
from batchjob.figures.look import chosen_layer, chosen_rows
from batchjob.figures.overview import overview
from batchjob.figures.photos import open_run
from batchjob.figures.pictures import grids

PHOTOS = "000000129054,000000311303,000000343706"  # of the README's picture
_FINER = 3  # times as fine a picture is drawn as it is kept, which leaves small letters legible


def main() -> None:
    run, look = open_run(Path(sys.argv[1])), Look(images=PHOTOS)
    summary = overview(run, look)
    if summary is None:
        sys.exit(f"{run.folder} has no answer to draw; run: batchjob stats {run.folder}")
    _, grid = next(grids(run, chosen_rows(run, look, look.count), chosen_layer(run, look), look))
    save(summary, "overview", 160)
    save(grid, "sample", 72)


def save(figure: Figure, name: str, dpi: int) -> None:
    """Writes a figure into docs/ in all its colours.

    Parameters
    ----------
    figure
        The figure.
    name
        Of the file, without its suffix.
    dpi
        Dots per inch: enough to read the letters, in a file that a page loads at once.
    """
    with canvas.style():
        figure.savefig(file := io.BytesIO(), dpi=_FINER * dpi, facecolor="white")
    picture = Image.open(file).convert("RGB").reduce(_FINER)
    picture.save(Path(__file__).parent / f"{name}.png", optimize=True)


if __name__ == "__main__":
    main()
