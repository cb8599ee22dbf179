"""Pictures of a run. `study_grid` and its siblings are pure functions of arrays; `write_figures` reads a run."""

from batchjob.figures.canvas import save
from batchjob.figures.grid import study_grid
from batchjob.figures.maps import Panel, layer_grid, mask_grid, one_head, side_by_side
from batchjob.figures.palette import cluster_colours, match_colours
from batchjob.figures.write import Look, formats, query, write_figures

__all__ = [
    "Look",
    "Panel",
    "cluster_colours",
    "formats",
    "layer_grid",
    "mask_grid",
    "match_colours",
    "one_head",
    "query",
    "save",
    "side_by_side",
    "study_grid",
    "write_figures",
]
