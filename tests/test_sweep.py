"""Each file of two finished runs is deleted, cut or gets a flipped bit: this is found, mended or harmless."""

import contextlib
import io
import random
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import xarray

import batchjob as package
from batchjob.__main__ import main
from batchjob.errors import UserError
from batchjob.files import unseal_file
from batchjob.store import lifecycle as store
from batchjob.store import partitions
from batchjob.store.outputs import check_stats
from tests.conftest import Command
from tests.pages import make_data

MODEL = ["--model", "test_vit.r160_in1k", "--weights", "random", "--image-size", "64", "--k", "3"]
SCOPES = {
    "image": ["--layers", "0,1", "--keep-maps", "2", "--repeats", "2", "--scores", "attention,pairs"],
    "dataset": ["--scope", "dataset"],
}
RUNTIME = ["--workers", "0", "--device", "cpu", "--max-failures", "1"]
DAMAGES = ("delete", "cut", "flip")
WITHOUT_RESULTS = (
    "done",
    "logs",
    "work",
    "claims",
    "figures",
    "report.html",
)  # markers, facts of this machine, pictures


@dataclass(frozen=True, slots=True)
class Finished:
    """A finished run with its statistics, a copy of it that stays whole, and what the readers say of it."""

    run: Path
    whole: Path
    arguments: list[str]  # of the `run` that made it
    said: dict[str, str]  # stdout by verb
    results: Mapping[str, bytes]

    def restore(self) -> None:
        """Makes the run whole again; copies only what has changed."""
        wanted = {str(p.relative_to(self.whole)): p for p in self.whole.rglob("*") if p.is_file()}
        for path in [p for p in self.run.rglob("*") if p.is_file()]:
            source = wanted.pop(str(path.relative_to(self.run)), None)
            if source is None:
                path.unlink()
            elif (path.stat().st_size, path.stat().st_mtime_ns) != (source.stat().st_size, source.stat().st_mtime_ns):
                shutil.copy2(source, path)
        for name, source in wanted.items():
            (self.run / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, self.run / name)
        shutil.rmtree(self.run / "work", ignore_errors=True)

    def files(self) -> list[str]:
        return sorted(str(p.relative_to(self.whole)) for p in self.whole.rglob("*") if p.is_file())

    def shards(self) -> set[str]:
        """The files of published partitions."""
        markers = [partitions.read_marker(self.whole, i) for i in partitions.published(self.whole)]
        return {path for marker in markers if marker for path in marker["files"]}

    def labelled(self) -> set[str]:
        """The files that `plan`, `label` and `finish` publish, not `stats`."""
        static = unseal_file(self.whole / "done" / "store.json")
        assert static is not None
        return {*static["files"], *self.shards()}


@pytest.fixture(scope="module")
def finished_by_scope(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Finished]:
    """Runs of ten annotated photos in two partitions, one of them cut off; each scope is made once, when asked for."""
    made: dict[str, Finished] = {}

    def make(scope: str) -> Finished:
        if scope not in made:
            home = tmp_path_factory.mktemp(scope)
            data, run = make_data(home / "data"), home / "run"
            arguments = ["run", str(data), str(run), *MODEL, *SCOPES[scope], "--rows-per-partition", "5", *RUNTIME]
            for words in (arguments, ["stats", str(run)], ["stats", str(run)]):
                said = _quietly(words)
            shutil.copytree(run, home / "whole")
            said = {"stats": said, "show": _quietly(["show", str(run)])}
            made[scope] = Finished(run, home / "whole", arguments, said, results(run))
        return made[scope]

    return make


def _quietly(words: list[str]) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        code = main(words)
    assert code == 0, err.getvalue()
    return out.getvalue()


def results(run: Path) -> Mapping[str, bytes]:
    """Path -> bytes of everything that is a result."""
    files = ((str(p.relative_to(run)), p) for p in run.rglob("*") if p.is_file())
    return {name: p.read_bytes() for name, p in files if not set(WITHOUT_RESULTS) & set(name.split("/"))}


def damage(path: Path, how: str, dice: random.Random) -> None:
    data = bytearray(path.read_bytes())
    path.unlink()
    if how == "cut":
        path.write_bytes(data[: len(data) // 2])
    elif how == "flip":
        if data:
            data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
        path.write_bytes(data)


def hurt(finished: Finished, name: str, how: str) -> bytes | None:
    """Makes the run whole but for one damage; what the file then holds."""
    finished.restore()
    path = finished.run / name
    damage(path, how, random.Random(f"{name} {how}"))
    return path.read_bytes() if path.exists() else None


def direct_verb(name: str, how: str, *, is_of_stats: bool) -> str:
    """A verb that reads the file, or depends on what is in it."""
    kind, dice = name.split("/")[0], random.Random(f"{name} {how}")
    if is_of_stats or name == "done/stats.json":
        return dice.choice(["figures", "report"])
    if kind in ("fit", "failures.csv"):
        return "finish"
    if name.endswith("/zarr.json"):
        return dice.choice(["finish", "stats"])
    return "report" if kind in ("logs", "plan.json") else "show" if kind in ("figures", "report.html") else "stats"


def show_directly(finished: Finished, about: str, batchjob: Command) -> None:
    """`show` says what it finds, and else what it says of the whole run."""
    shown = batchjob("show", finished.run)
    about = f"show after {about}: {shown.code} {shown.out} {shown.err}"
    assert shown.code in (0, 2), about
    new = set(shown.out.splitlines()) - set(finished.said["show"].splitlines())
    assert {line.split()[0] for line in new} <= {"damaged", "changed", "progress", "speed", "fit"}, about
    gone = set(finished.said["show"].splitlines()) - set(shown.out.splitlines())
    assert new or shown.code == 2 or not [line for line in gone if not line.startswith("speed")], about


def open_directly(finished: Finished, *, verify: bool, whole: xarray.Dataset) -> None:
    """`batchjob.open` refuses the run, or gives the same arrays."""
    try:
        found = package.open(finished.run, verify=verify).load()
    except UserError:
        return
    xarray.testing.assert_identical(found, whole)


def read_directly(finished: Finished, name: str, verb: str, batchjob: Command) -> str:
    """How a verb ends on a damaged run, without `show --verify` before it. Asserts what must never be."""
    path = finished.run / name
    left = path.read_bytes() if path.exists() else None
    ended = batchjob(verb, finished.run, *(["--max-failures", 1] if verb == "finish" else []))
    about = f"{verb} ended with {ended.code}: {ended.err}"
    after = dict(results(finished.run))
    found = path.read_bytes() if path.exists() else None
    after.pop(name, None)
    assert after == {path: data for path, data in finished.results.items() if path != name}, about
    assert found in (left, finished.results.get(name)) or name.startswith("done/"), about
    if ended.code:
        assert ended.code == 2 or (ended.code == 75 and verb == "finish"), about
        assert sum(line.startswith("batchjob: ") for line in ended.err.splitlines()) == 1, about
        return f"{verb} refuses"
    if verb == "stats":
        assert ended.out == finished.said["stats"], about
    return f"{verb} gives the same"


def mend(finished: Finished, batchjob: Command) -> str:
    """How the damage ends after `show --verify` and `run`, and `stats` where it is asked for. Asserts equal results."""
    run = finished.run
    shown = batchjob("show", run, "--verify")
    assert shown.code in (0, 1, 2), shown.err
    again = batchjob(*finished.arguments)
    assert again.code in (0, 2), again.err
    assert "Traceback" not in shown.err + again.err
    if again.code == 2:
        return "refused by run"
    damages = store.verify(run)
    if damages and all(d in check_stats(run, contents=True) for d in damages):
        refused = batchjob("figures", run)
        assert refused.code == 2, refused.err
        assert batchjob("stats", run).code == 0
        damages = store.verify(run)
    elif not (run / "done" / "stats.json").exists():
        assert batchjob("stats", run).code == 0
    assert damages == []
    assert results(run) == finished.results
    return "mended" if shown.code else "harmless"


def ends(finished: Finished, name: str, how: str, batchjob: Command, whole: xarray.Dataset) -> list[str]:
    """What became of one damage: by a verb that reads the file, and by `show --verify` and `run`."""
    in_store = name.split("/")[0] in ("labels.zarr", "scores.zarr", "stats")
    is_of_stats = in_store and name not in finished.labelled()
    hurt(finished, name, how)
    show_directly(finished, name, batchjob)
    open_directly(finished, verify=True, whole=whole)
    if how != "flip" or name not in finished.shards():  # `open` by itself looks at the sizes of shards
        open_directly(finished, verify=False, whole=whole)
    found = [read_directly(finished, name, direct_verb(name, how, is_of_stats=is_of_stats), batchjob)]
    hurt(finished, name, how)
    if not in_store or how == random.Random(name).choice(DAMAGES):
        return [*found, mend(finished, batchjob)]
    verified = batchjob("show", finished.run, "--verify")  # each file of a store is mended after one damage of three
    assert verified.code == 1
    assert name in verified.out
    if not is_of_stats:
        return [*found, "found"]
    assert batchjob("figures", finished.run).code == 2
    return [*found, "found"]


def sweep(finished: Finished, names: list[str], batchjob: Command) -> Counter[tuple[str, str, str]]:
    """Damages each file in each way; how many of each kind of file ended how."""
    found: Counter[tuple[str, str, str]] = Counter()
    finished.restore()
    whole = package.open(finished.run).load()
    for name in names:
        for how in DAMAGES:
            try:
                found.update((name.split("/")[0], how, end) for end in ends(finished, name, how, batchjob, whole))
            except Exception as error:
                error.add_note(f"after {how} of {name}")
                raise
    for row, count in sorted(found.items()):
        print(*row, count)
    finished.restore()
    return found


def test_damage_of_one_file_of_each_kind_is_found_mended_or_harmless(
    finished_by_scope: Callable[[str], Finished], batchjob: Command
) -> None:
    chosen = {
        "image": ["labels.zarr/attention_rows/c.1.0.0.0.0", "scores.zarr/zarr.json", "stats/summary.parquet"],
        "dataset": ["fit/centroids.npz", "labels.zarr/centroids/zarr.json", "scores.zarr/zarr.json"],
    }
    for scope, names in chosen.items():
        found = sweep(finished_by_scope(scope), names, batchjob)
        assert sum(found.values()) == 2 * len(DAMAGES) * len(names)


@pytest.mark.slow
@pytest.mark.timeout(7200)  # some 700 damages, three or four commands after each
@pytest.mark.parametrize(
    "scope", [pytest.param(scope, marks=pytest.mark.xdist_group(f"sweep-{scope}")) for scope in SCOPES]
)
def test_damage_of_every_file_is_found_mended_or_harmless(
    finished_by_scope: Callable[[str], Finished], batchjob: Command, scope: str
) -> None:
    finished = finished_by_scope(scope)
    names = finished.files()
    found = sweep(finished, names, batchjob)
    assert sum(found.values()) == 2 * len(DAMAGES) * len(names)
    kinds = {row[0] for row in found}
    assert {"labels.zarr", "scores.zarr", "done", "index", "logs", "stats", "plan.json", "failures.csv"} <= kinds
    assert ("fit" in kinds) == (scope == "dataset")


@pytest.mark.parametrize(
    "verbs", [["finish", "label", "run", "stats"], pytest.param(["figures", "report"], marks=pytest.mark.slow)]
)
def test_without_work_every_command_goes_on(
    finished_by_scope: Callable[[str], Finished], batchjob: Command, verbs: list[str]
) -> None:
    finished = finished_by_scope("image")
    finished.restore()
    run = finished.run
    more = {"finish": ["--max-failures", 1], "label": RUNTIME, "figures": ["--count", 2]}
    assert not (run / "work").exists()
    for verb in verbs:
        ended = batchjob(*(finished.arguments if verb == "run" else [verb, run, *more.get(verb, [])]))
        assert ended.code == 0, (verb, ended.err)
        shutil.rmtree(run / "work", ignore_errors=True)
    assert batchjob("show", run, "--verify").code == 0
    assert results(run) == finished.results
