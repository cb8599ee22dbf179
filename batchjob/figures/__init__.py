"""Draws pictures of a run. `study_grid` and the functions of `maps` take arrays; `write_figures` takes folders."""

from batchjob.figures.canvas import save
from batchjob.figures.grid import study_grid
from batchjob.figures.look import Look, formats, query
from batchjob.figures.write import write_figures

__all__ = ["Look", "formats", "query", "save", "study_grid", "write_figures"]
