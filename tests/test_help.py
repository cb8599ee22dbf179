"""`--help` shows the verbs in groups, examples that parse, and the common options first; the parser refuses others."""

import dataclasses
import re
import shlex
import subprocess
import sys

import pytest

from batchjob import help as words
from batchjob.__main__ import VERBS, make_parser
from batchjob.config import Options, Runtime
from tests.conftest import ROOT, Command

OPTIONS = {f"--{f.name.replace('_', '-')}" for kind in (Options, Runtime) for f in dataclasses.fields(kind)}


def options_in(text: str) -> set[str]:
    return set(re.findall(r"^  (--[a-z-]+)", text, re.M)) & OPTIONS


def test_every_verb_is_in_one_group_with_its_description(batchjob: Command) -> None:
    shown = batchjob("--help")
    assert shown.code == 0
    assert sorted(verb for verbs in words.GROUPS.values() for verb in verbs) == sorted(VERBS)
    for verb, meaning in VERBS.items():
        assert shown.out.count(f"  {verb:<9}{meaning}\n") == 1


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_three_examples_that_the_parser_takes(verb: str, batchjob: Command) -> None:
    shown = batchjob(verb, "--help")
    assert len(words.EXAMPLES[verb]) == 3
    for line in words.EXAMPLES[verb]:
        assert f"  {line}\n" in shown.out
        for command in line.removeprefix("watch ").split(" && "):
            program, *arguments = shlex.split(command)
            assert program == "batchjob"
            make_parser().parse_args(arguments)


def test_the_help_of_run_shows_ten_options_and_all_of_them_on_request(batchjob: Command) -> None:
    few, every = batchjob("run", "--help"), batchjob("run", "--help-all")
    assert (few.code, every.code) == (0, 0)
    assert options_in(few.out) == {f"--{name.replace('_', '-')}" for name in words.COMMON}
    assert len(options_in(few.out)) == 10
    assert "--help-all" in few.out
    assert options_in(every.out) == OPTIONS


def test_an_option_that_the_short_help_hides_is_read() -> None:
    args = make_parser().parse_args(["run", "photos", "--seed", "3", "--batch-size", "7"])
    assert (args.seed, args.batch_size) == (3, "7")


def test_one_cluster_is_refused_in_a_line_before_anything_heavy_is_imported() -> None:
    code = "import sys\nfrom batchjob.__main__ import main\ncode = main(['run', 'photos', '--k', '1'])\n"
    code += "print(code, {'torch', 'timm', 'pandas', 'scipy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "2 set()"
    assert done.stderr == "batchjob: --k 1 is out of range; one cluster tells nothing apart: give 2 to 254\n"


@pytest.mark.parametrize(("k", "said"), [("0", "give 2 to 254"), ("300", "give 2 to 254 clusters, which is what")])
def test_a_k_that_is_out_of_range_is_refused_with_its_own_reason(batchjob: Command, k: str, said: str) -> None:
    ended = batchjob("run", "photos", "--k", k)
    assert (ended.code, ended.err.count("\n")) == (2, 1)
    assert f"--k {k} is out of range; {said}" in ended.err


@pytest.mark.parametrize("verb", VERBS)
def test_every_option_of_every_verb_has_words(verb: str) -> None:
    actions = make_parser(shows_all=True).verbs[verb]._actions
    assert len(actions) > 1
    assert [action.dest for action in actions if not action.help] == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["run", "photos", "--layres", "5"], "--layres 5; did you mean '--layers'? see batchjob run --help-all"),
        (["plan", "photos", "--heds=3"], "--heds=3; did you mean '--heads'? see batchjob plan --help-all"),
        (["run", "photos", "-k", "3"], "-k 3; did you mean '--k'? see batchjob run --help-all"),
        (["stats", "runs/x", "--verbos"], "--verbos; did you mean '--verbose'? see batchjob stats --help"),
        (["label", "runs/x", "--partiton=3"], "--partiton=3; did you mean '--partition'? see batchjob label --help"),
        (["plan", "photos", "--device", "cpu"], "--device cpu; --device is an option of run, fit and label; see"),
        (["finish", "runs/x", "--workers=3"], "--workers=3; --workers is an option of run, fit and label; see"),
        (["label", "runs/x", "--k", "3"], "--k 3; --k is an option of run and plan, frozen in RUN since; other values"),
        (["figures", "runs/x", "--annotations", "f"], "--annotations is an option of run, plan and stats; see"),
        (["report", "runs/x", "--verbose"], "--verbose is an option of stats; see batchjob report --help"),
        (["run", "photos", "runs/x", "--zzz"], "unrecognized arguments: --zzz; see batchjob run --help-all"),
        (["run", "photos", "--seed", "x"], "argument --seed: invalid int value: 'x'; see batchjob run --help-all"),
        (["stat", "runs/x"], "batchjob: verb 'stat' is unknown; did you mean 'stats'? known: run, plan, fit"),
        (["run", "\x1b[31m", "b", "c"], "batchjob run: unrecognized arguments: c; see batchjob run --help-all"),
        (["run", "a", "b", "\x1b[31m"], r"unrecognized arguments: \x1b[31m; see"),
    ],
)
def test_an_unknown_option_or_verb_names_the_nearest_and_the_help_that_lists_all(
    batchjob: Command, words: list[str], said: str
) -> None:
    ended = batchjob(*words)
    assert ended.code == 2
    assert said in ended.err
    assert ended.err.count("\n") == 1
