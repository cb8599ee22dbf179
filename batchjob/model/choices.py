"""What the options choose of a described model: its layers and heads, and the size of its input. Does without torch."""

from batchjob.config import numbers_of, size_of
from batchjob.errors import UserError
from batchjob.plan import ModelSpec

DEFAULT_PX = 224


def choose_input_px(text: str, own_px: tuple[int, int], *, patch_px: tuple[int, int]) -> tuple[int, int]:
    """Chooses the size of the model's input.

    Parameters
    ----------
    text
        What `--image-size` says, `S` or `HxW`. If it is empty, 224 is taken, or the model's own size where 224 is not a
        multiple of its patches.
    own_px
        (height, width) of the model's own input in pixels.
    patch_px
        (height, width) of a patch in pixels.

    Returns
    -------
    (height, width) in pixels.

    Raises
    ------
    UserError
        The text is not a size, or the size is not a multiple of the patches.
    """
    if not text:
        divides = all(DEFAULT_PX % patch == 0 for patch in patch_px)
        return (DEFAULT_PX, DEFAULT_PX) if divides else own_px
    asked = size_of(text)
    fitting = tuple(max(1, round(px / patch)) * patch for px, patch in zip(asked, patch_px, strict=True))
    if fitting != asked:
        size = "{}x{}".format(*patch_px)
        raise UserError(
            f"--image-size {text} is not a multiple of the model's {size} patches; try {fitting[0]}x{fitting[1]}"
        )
    return asked


def resolve_layers(text: str, spec: ModelSpec) -> tuple[int, ...]:
    """Returns the layers that `--layers` names, counted from 0, ascending.

    Parameters
    ----------
    text
        Numbers joined by commas, negative ones counted from the end (`-1`, `0,5,11`), or `all`.
    spec
        Describes the model.

    Raises
    ------
    UserError
        The text is not such a list, or a number is out of range.
    """
    return _resolve("layers", text, spec.num_layers, spec.name)


def resolve_heads(text: str, spec: ModelSpec) -> tuple[int, ...]:
    """Returns the heads that `--heads` names, counted from 0, ascending.

    Parameters
    ----------
    text, spec
        As `resolve_layers`.

    Raises
    ------
    UserError
        As `resolve_layers`.
    """
    return _resolve("heads", text, spec.num_heads, spec.name)


def _resolve(option: str, text: str, count: int, model: str) -> tuple[int, ...]:
    numbers = numbers_of(option, text)
    if numbers is None:
        return tuple(range(count))
    if outside := [str(number) for number in numbers if not -count <= number < count]:
        have, give = (f"{count} {option}", f"0 to {count - 1}, or -1") if count > 1 else (f"1 {option[:-1]}", "0")
        raise UserError(f"--{option} {', '.join(outside)} out of range: {model} has {have}; give {give}")
    return tuple(sorted({number % count for number in numbers}))
