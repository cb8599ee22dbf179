"""The two errors with which a command ends without a defect of the program, and how text and counts are shown."""

import sys
from collections.abc import Sequence


class UserError(Exception):
    """The user's input is wrong; the text says what was asked, what was found and what to do. Exit code 2."""


class WorkLeft(Exception):
    """Work is left after a signal, or partitions are missing; the same command goes on with it. Exit code 75."""


def printable(text: object, *, keep: str = "") -> str:
    r"""Writes control characters as escapes such as \x1b, since the name of a file must not control a terminal.

    Parameters
    ----------
    text
        Anything; its `str` is taken.
    keep
        Characters that stay as they are.

    Returns
    -------
    The text, in which every other character is printable.
    """
    return "".join(
        c if c.isprintable() or c in keep else c.encode("unicode_escape", "replace").decode() for c in str(text)
    )


def tell(line: str) -> None:
    """Shows a line of progress on stderr, with control characters escaped."""
    print(printable(line), file=sys.stderr, flush=True)


def counted(count: int, noun: str) -> str:
    """Writes how many there are of something.

    Parameters
    ----------
    count
        Their number.
    noun
        The word for one. Its plural ends with s, or with es as that of `patch`, `box` and `process`.

    Returns
    -------
    `1 photo`, `1,204 photos`, `0 patches`.
    """
    plural = "es" if noun.endswith(("s", "x", "ch")) else "s"
    return f"{count:,} {noun}{'' if count == 1 else plural}"


def nearest(name: str, known: list[str]) -> str:
    """Lists the known names for an error about an unknown name, after a guess at the one that was meant.

    Parameters
    ----------
    name
        The unknown name.
    known
        The valid names.

    Returns
    -------
    The end of a sentence, such as `did you mean 'kmeans'? known: kmeans, spectral`. The guess is left out where no
    name is much like it.
    """
    hint = guess(name, known)
    return f"{hint}{' ' if hint else ''}known: {', '.join(known)}"


def guess(name: str, known: Sequence[str]) -> str:
    """Asks whether the most similar known name was meant.

    Parameters
    ----------
    name
        What was given. Dashes in front count for nothing, so that options are as alike as their words.
    known
        The names that there are.

    Returns
    -------
    For example `did you mean 'kmeans'?`; empty where no known name is much like it.
    """
    import difflib

    of_words = {one.lstrip("-"): one for one in known}
    close = difflib.get_close_matches(name.lstrip("-"), of_words, n=1, cutoff=0.5)
    return f"did you mean {of_words[close[0]]!r}?" if close else ""
