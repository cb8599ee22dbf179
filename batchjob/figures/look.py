"""What the pictures show and how, as the command line asks for it; and which layer, head and images that means."""

from dataclasses import dataclass

from batchjob.errors import UserError, nearest
from batchjob.figures.photos import choose_rows
from batchjob.store.run import Run

FORMATS = ("png", "svg", "pdf")
_HEADS_ACROSS = 12


@dataclass(frozen=True, slots=True)
class Look:
    """What the pictures show and how; the defaults are those of `batchjob figures RUN`."""

    images: str = "spread"  # spread, random, best, worst, or ids with commas
    count: int = 8
    seed: int = 0
    layer: int | None = None  # of the pictures of one layer; None: the last
    head: int | None = None  # of the pictures of one head; None: the best by the statistics, else the first
    query: tuple[int, int] | None = (
        None  # (row, column) of the patch whose row is shown; None: of the greatest CLS attention
    )
    heads_across: int = _HEADS_ACROSS  # 6 cuts twelve heads into two figures
    formats: tuple[str, ...] = ("png",)
    smooth: bool = False
    objects: bool = True  # outline the annotated objects

    def __post_init__(self) -> None:
        for name, least in (("count", 1), ("heads_across", 1), ("seed", 0)):
            if getattr(self, name) < least:
                option = f"--{name.replace('_', '-')} {getattr(self, name)}"
                raise UserError(f"{option} is too small; give {least} or more")


def formats(text: str) -> tuple[str, ...]:
    """Returns the file formats that `png,svg` names. Raises UserError for an unknown one."""
    found = tuple(part.strip().lower() for part in text.split(",") if part.strip())
    if wrong := [name for name in found if name not in FORMATS]:
        raise UserError(f"--format {wrong[0]!r} is unknown; {nearest(wrong[0], list(FORMATS))}")
    return found or FORMATS[:1]


def query(text: str | None) -> tuple[int, int] | None:
    """Returns (row, column) of `4,7`, and None for nothing. Raises UserError for anything else."""
    if not text:
        return None
    parts = text.split(",")
    if len(parts) != 2 or not all(part.strip().isdigit() for part in parts):
        raise UserError(f"--query {text!r} is not a patch; give its row and column, counted from 0: --query 4,7")
    return int(parts[0]), int(parts[1])


def chosen_layer(run: Run, look: Look) -> int:
    """Chooses the layer of the pictures of one layer. Raises UserError where the run doesn't have it."""
    best = run.best[0] if run.best else run.layers[-1]
    layer = best if look.layer is None else look.layer
    if layer not in run.layers:
        raise UserError(f"--layer {layer} is not in {run.folder}; it has {', '.join(map(str, run.layers))}")
    return layer


def chosen_head(run: Run, look: Look) -> int:
    """Chooses the head of the pictures of one head. Raises UserError where the run doesn't have it."""
    layer = chosen_layer(run, look)
    best = run.best[1] if run.best and run.best[0] == layer else run.heads[0]
    head = best if look.head is None else look.head
    if head not in run.heads:
        raise UserError(f"--head {head} is not in {run.folder}; it has {', '.join(map(str, run.heads))}")
    return head


def chosen_rows(run: Run, look: Look, count: int) -> list[int]:
    """Chooses the images of a picture, as `--images` says; best and worst go by the chosen head's score."""
    score = None
    if look.images in ("best", "worst") and run.image_score is not None:
        layer, head = run.layers.index(chosen_layer(run, look)), run.heads.index(chosen_head(run, look))
        score = run.image_score[1][:, 0, layer, head]
    return choose_rows(run, look.images, count, seed=look.seed, score=score)


def check_query(run: Run, patch: tuple[int, int] | None) -> None:
    """Raises UserError for a patch outside of the run's grid, or where no attention was stored."""
    rows, columns = run.geometry.grid
    if patch is not None and not (patch[0] < rows and patch[1] < columns):
        where = f"--query {patch[0]},{patch[1]} is outside the grid of {rows}×{columns} patches"
        raise UserError(f"{where}; give at most {rows - 1},{columns - 1}")
    if patch is not None and not run.kept_rows:
        raise UserError(f"--query needs stored attention, and {run.folder} has none; run again with --keep-maps N")
