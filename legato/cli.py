"""The command `legato`: what is done with finished runs and saved SAEs.  legato compare run_1

A subcommand is a function that adds its arguments to a parser, and one that takes the parsed arguments.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from rich.console import Console
from rich.table import Table

from legato import bench_sae, check_run, distributed, exchange_sae, judge_sae, synthetic
from legato.checksums import made_sense_of, rebuilding
from legato.command import run_command
from legato.comparison import compare_runs, write_json, write_matched
from legato.comparison_table import legend, tables
from legato.errors import UsageError
from legato.final_info import write_final_info
from legato.notes import write_notes
from legato.report.ablation_table import write_ablation
from legato.report.comparison import write_comparison
from legato.report.figures import write_figures
from legato.report.html import write_report
from legato.results import SavedRun


@dataclass(frozen=True)
class Command:
    text: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], None]
    go_on: str = ""  # what to do after a failure that was not the command's fault


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand; 0 where it went well, 1 where it failed, 2 where it was called wrongly."""
    try:
        options = _parser().parse_args(arguments)
    except UsageError as error:
        if distributed.is_writer():
            print(f"error: {error}", file=sys.stderr)
        return 2
    command = COMMANDS[options.command]

    def run() -> None:
        with made_sense_of(getattr(options, "runs", ())):
            command.run(options)

    return run_command(lambda _: run(), debug=options.debug, go_on=command.go_on)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}: see {self.prog} --help")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="legato", description="Judge, compare and report SAEs and runs of experiment.py.")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        command.add_arguments(commands.add_parser(name, help=command.text, description=command.text))
    return parser


def _compare_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN", type=Path, help="run folders made with the same settings")
    parser.add_argument(
        "--out", type=Path, help="file for the numbers (default: matched.json in the run, none for several runs)"
    )


def _compare(options: argparse.Namespace) -> None:
    runs = [SavedRun.open(path) for path in options.runs]
    matched = compare_runs(runs)
    if not matched["methods"]:
        raise UsageError(f"{', '.join(matched['runs'])}: there is nothing to compare but the baseline")
    console = Console()
    for found in tables(matched):
        table = Table(title=found.title, title_justify="left", title_style="bold", box=None, pad_edge=False)
        for number, heading in enumerate(found.headings):
            table.add_column(heading, justify="right" if number else "left", no_wrap=number > 0)
        for row in found.rows:
            table.add_row(*row)
        console.print(table)
        console.print()
    for sentence in legend(matched):
        console.print(f"- {sentence}", highlight=False, markup=False)
    out = options.out or (runs[0].path / "matched.json" if len(runs) == 1 else None)
    if out is not None:
        with _writing(out), rebuilding(out.parent, [out.name]):
            write_json(out, matched)
        console.print(f"\nnumbers: {out}", highlight=False, markup=False)


def _report_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN", type=Path, help="run folders with a metrics.json")
    parser.add_argument(
        "--out", type=Path, default=Path("figures"), help="folder for comparison.html and its figures (several runs)"
    )


def _report(options: argparse.Namespace) -> None:
    runs = {path: SavedRun.open(path) for path in options.runs}
    for path in runs:
        with _writing(path), rebuilding(path):
            for build in (write_ablation, write_matched, write_figures, write_notes, write_final_info, write_report):
                build(path)
        print(path / "report.html")
    if len(runs) > 1:
        names = [path.name for path in runs]
        labels = {path.name if names.count(path.name) == 1 else str(path): run for path, run in runs.items()}
        with _writing(options.out):
            for figure in write_comparison(labels, options.out).values():
                print(figure)


@contextmanager
def _writing(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UsageError(f"{target} cannot be written ({error.strerror}): choose another place") from error


COMMANDS = {
    "check": Command("Whether a run's files are as it wrote them.", check_run.add_arguments, check_run.main),
    "compare": Command("Set methods side by side at the baseline's L0 and FVU.", _compare_arguments, _compare),
    "evaluate": Command(
        "Judge saved SAEs on a model and a text.",
        judge_sae.add_arguments,
        judge_sae.main,
        go_on="the same command goes on where it stopped",
    ),
    "export": Command(
        "Write an SAE in another tool's format.", exchange_sae.add_export_arguments, exchange_sae.export_sae
    ),
    "import": Command(
        "Save another tool's SAE, or one of the hub, as Legato's.",
        exchange_sae.add_import_arguments,
        exchange_sae.import_sae,
    ),
    "report": Command("Build a run's tables, figures, notes and report again.", _report_arguments, _report),
    "saebench": Command("Run sae-bench itself on a saved SAE.", bench_sae.add_arguments, bench_sae.main),
    "synthetic": Command("Train and judge SAEs where the truth is known.", synthetic.add_arguments, synthetic.main),
}


if __name__ == "__main__":
    sys.exit(main())
