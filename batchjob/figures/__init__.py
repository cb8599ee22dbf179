"""Pictures of a run. `study_grid` and those in `maps` are pure functions of arrays; `write_figures` reads a run."""

from batchjob.figures.canvas import save
from batchjob.figures.grid import study_grid
from batchjob.figures.write import Look, formats, query, write_figures

__all__ = ["Look", "formats", "query", "save", "study_grid", "write_figures"]
