"""Reads timm's model names from its source files, which takes a tenth of a second; importing timm takes seconds."""

import difflib
import functools
import importlib.metadata
import importlib.util
import re
from collections.abc import Iterable
from pathlib import Path

from batchjob.errors import UserError

_SUGGESTIONS = 4
_FUNCTION = re.compile(r"@register_model\s*\n(?:@[^\n]*\n)*def (\w+)\(")
_TAGGED = re.compile(r"""^\s+['"](\w+\.[\w.]+)['"]\s*:\s*_?\w*[cC]fg\w*\(""", re.MULTILINE)
_SIZES = {"s": "small", "b": "base", "l": "large", "h": "huge", "g": "giant"}


@functools.cache
def _architectures() -> frozenset[str]:
    """Returns the names that `timm.list_models()` gives."""
    return frozenset(name for text in _sources() for name in _FUNCTION.findall(text))


@functools.cache
def _tagged() -> frozenset[str]:
    """Returns names with the tag of their weights, such as `vit_base_patch16_224.mae`: nearly all that timm has."""
    return frozenset(name for text in _sources() for name in _TAGGED.findall(text))


def raise_for_unknown(name: str) -> None:
    """Raises UserError, with the most similar names, where timm has no model of this name; a tag is not checked."""
    if name.partition(".")[0] in _architectures():
        return
    whose = "a Hugging Face name; give timm's" if "/" in name else f"not in timm {importlib.metadata.version('timm')}"
    raise UserError(f"model {name!r} is {whose}; did you mean {', '.join(_similar(name))}?")


def _similar(name: str) -> list[str]:
    """Returns the four names that share most parts with this one, those of fewest other parts first.

    `dinov2` gives DINOv2 models.
    """
    words = _parts(name.rpartition("/")[2])
    known = {n for n in _architectures() if not n.startswith("test_")}
    if any(word in _all_parts(_tagged()) - _all_parts(known) for word in words):  # `mae` is part of a tag alone
        known = set(_tagged())
    vocabulary = _all_parts(known)
    near = [difflib.get_close_matches(word, vocabulary, n=1, cutoff=0.7) for word in words - vocabulary]
    wanted = (words & vocabulary) | {word for found in near for word in found}

    def distance(candidate: str) -> tuple[int, int, float, str]:
        parts = _parts(candidate)
        likeness = difflib.SequenceMatcher(None, name.lower(), candidate).ratio()
        return -len(wanted & parts), len(parts - wanted), -likeness, candidate

    return sorted(known, key=distance)[:_SUGGESTIONS] if wanted else ["vit_small_patch14_dinov2", "resnet18"]


def _parts(name: str) -> frozenset[str]:
    """Returns the words of a name; `vits16`, as other collections say, gives timm's `vit`, `small` and `patch16`."""
    found = set()
    for word in re.split(r"[^a-z0-9]+", name.lower()):
        if match := re.fullmatch(r"vit([sblhg])(\d+)", word):
            found |= {"vit", _SIZES[match[1]], f"patch{match[2]}"}
        elif word:
            found.add(word)
    return frozenset(found)


def _all_parts(names: Iterable[str]) -> frozenset[str]:
    return frozenset().union(*(_parts(name) for name in names))


@functools.cache
def _sources() -> tuple[str, ...]:
    found = importlib.util.find_spec("timm")  # finds the folder without importing it
    assert found is not None
    assert found.submodule_search_locations
    folder = Path(found.submodule_search_locations[0]) / "models"
    return tuple(path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.py")))
