"""The two ways a command ends that are not a defect of the program."""


class UserError(Exception):
    """The user's input is wrong: one line saying what was asked, what was found and what to do. Exit code 2."""


class WorkLeft(Exception):
    """Work is left (a signal, holes in the store): running the command again goes on. Exit code 75."""


def nearest(name: str, known: list[str]) -> str:
    """The known names as a sentence, the one most like `name` first: for errors about an unknown name."""
    import difflib

    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}known: {', '.join(known)}"
