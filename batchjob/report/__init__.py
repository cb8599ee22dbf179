"""Makes one self-contained HTML page of a run, or of several runs side by side."""

from batchjob.report.page import write_report

__all__ = ["write_report"]
