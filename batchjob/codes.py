"""What the bytes of a run mean: the codes of `labels` and `status`, and the version of the run's schema."""

VERSION = "0.2.0"  # of this package
SCHEMA = 3  # of plan.json and the arrays; a run of another schema is refused
NO_LABEL = 255  # in `labels`: the image failed, or the patch is padding
NOISE = 254  # in `labels`: hdbscan put the patch into no cluster
STATUS: dict[str, int] = {
    "ok": 0,
    "truncated": 1,  # the file begins as an image, and its data are cut off or damaged
    "not_an_image": 2,
    "unreadable": 3,  # no permission, a dangling link, a folder, a FIFO, a disk error
    "too_large": 4,
    "degenerate": 5,  # no pixels, or too thin to fill two patches
    "missing": 6,
    "killed_worker": 7,
    "timeout": 8,
    "not_finite": 9,
    "changed": 10,  # the file's size or time of change is not what `plan` saw
    "unsupported": 11,  # the format, or a variant of it, is not read or needs an extra package
    "pending": 255,  # the fill value: not labelled yet
}
OK, PENDING = STATUS["ok"], STATUS["pending"]
