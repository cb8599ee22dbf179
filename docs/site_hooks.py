"""Fills the tables of options into the pages of `make docs`, from the dataclasses that hold the options."""

import dataclasses
from typing import Any

from batchjob.config import Options, Runtime


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replaces `<!-- options: Options -->` and `<!-- options: Runtime -->` in a page by tables.

    Parameters
    ----------
    markdown
        The page.
    **_
        What else MkDocs passes.
    """
    for kind in (Options, Runtime):
        markdown = markdown.replace(f"<!-- options: {kind.__name__} -->", table(kind))
    return markdown


def table(kind: type[Any]) -> str:
    """Writes a Markdown table of a dataclass of options: a line for each option, with its default and its values."""
    lines = ["| option | Python | default | meaning |", "| --- | --- | --- | --- |"]
    for field in dataclasses.fields(kind):
        values = "|".join(field.metadata["choices"]) or field.metadata["metavar"]
        cells = [f"--{field.name.replace('_', '-')} {values}".strip(), field.name, str(field.default)]
        cells = [f"`{cell}`" if cell else "" for cell in cells]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in [*cells, field.metadata["help"]]) + " |")
    return "\n".join(lines)
