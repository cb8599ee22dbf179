"""What the bytes of a run mean: codes of `labels` and `status`, and the version of its schema."""

VERSION = "0.2.0"  # of this package
SCHEMA = 2  # of plan.json and the arrays; a run of another version is refused
NO_LABEL = 255  # of `labels`: the image failed, or the patch is padding
NOISE = 254  # of `labels`: hdbscan put the patch into no cluster
STATUS: dict[str, int] = {
    "ok": 0,
    "truncated": 1,  # began as an image; its data are cut off or damaged
    "not_an_image": 2,
    "unreadable": 3,  # no permission, a dangling link, a folder, a FIFO, a disk error
    "too_large": 4,
    "degenerate": 5,  # no pixels, or too thin to fill two patches
    "missing": 6,
    "killed_worker": 7,
    "timeout": 8,
    "not_finite": 9,
    "changed": 10,  # its size or time of change is not what `plan` saw
    "unsupported": 11,  # a format, or a kind of one, that is not read, or needs an extra package
    "pending": 255,  # the fill value: not labelled yet
}
OK, PENDING = STATUS["ok"], STATUS["pending"]
