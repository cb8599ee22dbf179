"""The two ways a command ends that are not a defect of the program, and text that is safe to show."""

import sys


class UserError(Exception):
    """The user's input is wrong: one line saying what was asked, what was found and what to do. Exit code 2."""


class WorkLeft(Exception):
    """Work is left (a signal, holes in the store): running the command again goes on. Exit code 75."""


def printable(text: object, *, keep: str = "") -> str:
    r"""The text with control characters as \x1b, except those in `keep`: a file's name must not steer a terminal."""
    return "".join(
        c if c.isprintable() or c in keep else c.encode("unicode_escape", "replace").decode() for c in str(text)
    )


def tell(line: str) -> None:
    """Shows a line of progress on stderr, control characters escaped."""
    print(printable(line), file=sys.stderr, flush=True)


def nearest(name: str, known: list[str]) -> str:
    """The known names as a sentence, the one most like `name` first: for errors about an unknown name."""
    import difflib

    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}known: {', '.join(known)}"
