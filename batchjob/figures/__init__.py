"""Pictures of a run. `study_grid` and its siblings are pure functions of arrays; `write_figures` reads a run."""

from batchjob.figures.canvas import save
from batchjob.figures.grid import study_grid
from batchjob.figures.palette import NOISE, NONE, cluster_colours, match_colours

__all__ = ["NOISE", "NONE", "cluster_colours", "match_colours", "save", "study_grid"]
