"""The command `legato`: what is done with finished runs and saved SAEs.  legato compare run_1

A subcommand is a function that adds its arguments to a parser, and one that takes the parsed arguments.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

from rich.console import Console
from rich.table import Table

from legato import synthetic
from legato.common import distributed
from legato.common.command import run_command
from legato.common.errors import UsageError
from legato.common.progress import log
from legato.experiment import evaluate_saved as judge_sae
from legato.experiment.config import DataConfig, EvaluationConfig, ModelConfig
from legato.experiment.evaluate_saved import (
    EvaluateConfig,
    add_place_arguments,
    check_width,
    harvest_rows,
    named,
    opened,
    read_rows,
)
from legato.experiment.inputs import load_model
from legato.interop.saebench_evals import EVALS, start
from legato.report.build import build_outputs
from legato.report.runs.page import write_comparison
from legato.report.text.matched_tables import legend, tables
from legato.results.integrity import blame_unverified_files, check_all, rebuilding
from legato.results.matched.compare import match_methods, write_json
from legato.results.saved_run import SavedRun
from legato.sae.autoencoder import EXPORT_FORMATS, SparseAutoencoder, export
from legato.sae.provenance import origin_of


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
        if distributed.is_rank0():
            print(f"error: {error}", file=sys.stderr)
        return 2
    command = COMMANDS[options.command]

    def run() -> None:
        with blame_unverified_files(getattr(options, "runs", ())):
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
    matched = match_methods(runs)
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
    for path, run in runs.items():
        with _writing(path), rebuilding(path):
            print(build_outputs(run).report)
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


def _saebench_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("sae", metavar="[NAME=]SAE", help="a saved SAE of any format that legato reads")
    said = "(default: what the SAE says)"
    parser.add_argument(
        "--eval", default="core", choices=("core", *EVALS), help="core takes any model and text; the others their own"
    )
    parser.add_argument("--model", help=f"core: hub id, folder or 'demo'; others: TransformerLens' name {said}")
    parser.add_argument("--layer", type=int, help=f"decoder layer, from 0 {said}")
    parser.add_argument("--dataset", help="core: 'demo', a file, a folder or a hub id (default: the SAE's, or demo)")
    parser.add_argument("--text_column", default="text", help="core: column that holds the text")
    parser.add_argument("--context_length", type=int, default=128, help="core: tokens per context")
    parser.add_argument("--rows", type=int, default=64, help="core: contexts, in batches of 16")
    parser.add_argument("--held_out", type=float, help="core: judge on the documents that this share holds out")
    parser.add_argument("--dtype", default="float32", help="core: dtype of the model")
    parser.add_argument("--out", type=Path, default=Path("eval_results"), help="folder for sae-bench's file")


def _saebench(options: argparse.Namespace) -> None:
    if find_spec("sae_bench") is None:
        raise UsageError(
            "sae-bench is not installed here, and pins older versions of other packages: make an environment with "
            "`pip install legato-sae sae-bench` and run this there"
        )
    from legato.interop.saebench_wrapper import LegatoSAE, run_core

    ((name, (source, _)),) = named([options.sae]).items()
    sae = SparseAutoencoder.load(source)
    origin = origin_of(sae)
    model_name, place = options.model or origin.model, origin.place() if options.layer is None else None
    layer, site = (options.layer, origin.site or "resid_post") if place is None else place
    if model_name is None or layer is None:
        what = "model" if model_name is None else "layer"
        raise UsageError(f"{name} does not say which {what} it reads: add --{what}")
    if options.eval != "core":
        if site != "resid_post":
            raise UsageError(f"sae-bench's {options.eval} reads resid_post, {name} reads {site}")
        start(options.eval, LegatoSAE(sae, model_name, layer), name, model_name, options.out)
        log(f"results: {options.out}/")
        return
    dataset = options.dataset or origin.dataset or "demo"
    config = EvaluateConfig(
        {name: source},
        ModelConfig(model_name, layer, site, options.dtype),
        DataConfig(dataset, options.text_column, options.context_length),
        options.held_out,
        EvaluationConfig(options.rows, controls=()),
    )
    model = load_model(config.model, config.data.context_length)
    check_width({name: sae}, model)
    tokens = read_rows(config, model)
    path = run_core(
        sae, model, tokens, layer=layer, site=site, out=options.out, release="legato", name=name, dataset=dataset
    )
    log(f"results: {path}")


def _check_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN", type=Path, help="folders of finished runs")


def _check(options: argparse.Namespace) -> None:
    """Raises LegatoError, naming the first file that is not."""
    for path in options.runs:
        log(f"{path}: {check_all(path)} files are as the run wrote them")


def add_import_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("sae", metavar="SAE", help=_SOURCE)
    parser.add_argument("out", metavar="FOLDER", type=Path, help="where to save it, as a SAELens folder")


def import_sae(options: argparse.Namespace) -> None:
    sae = SparseAutoencoder.load(options.sae)
    log(f"{_described(sae)}\nsaved: {sae.save(options.out)}")


def add_export_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("sae", metavar="SAE", help=_SOURCE)
    parser.add_argument("--to", required=True, choices=EXPORT_FORMATS, help="the tool whose format to write")
    parser.add_argument("--out", required=True, type=Path, help="the folder to write, or the file for safetensors")
    parser.add_argument(
        "--stateless",
        action="store_true",
        help="write a topk or jumprelu approximation of an SAE with state along the sequence, with the same L0, and "
        "say by how much it differs; the options below say on which activations",
    )
    add_place_arguments(parser, rows=64)


def export_sae(options: argparse.Namespace) -> None:
    options.saes, options.ce_rows = [options.sae], 0
    sae = _stateless(options) if options.stateless else SparseAutoencoder.load(options.sae)
    path = export(sae, options.out, options.to)
    log(f"{_described(sae)}\nsaved as {options.to}: {path}")


COMMANDS = {
    "check": Command("Whether a run's files are as it wrote them.", _check_arguments, _check),
    "compare": Command("Set methods side by side at the baseline's L0 and FVU.", _compare_arguments, _compare),
    "evaluate": Command(
        "Judge saved SAEs on a model and a text.",
        judge_sae.add_arguments,
        judge_sae.main,
        go_on="the same command goes on where it stopped",
    ),
    "export": Command("Write an SAE in another tool's format.", add_export_arguments, export_sae),
    "import": Command(
        "Save another tool's SAE, or one of the hub, as Legato's.",
        add_import_arguments,
        import_sae,
    ),
    "report": Command("Build a run's tables, figures, notes and report again.", _report_arguments, _report),
    "saebench": Command("Run sae-bench itself on a saved SAE.", _saebench_arguments, _saebench),
    "synthetic": Command("Train and judge SAEs where the truth is known.", synthetic.add_arguments, synthetic.main),
}

_SOURCE = "a saved SAE of any format that legato reads: a folder or file, or on the hub owner/name[/folder]"


def _stateless(options: argparse.Namespace) -> SparseAutoencoder:
    saes, config = opened(options)
    (sae,) = saes.values()
    model = load_model(config.model, config.data.context_length)
    activations = harvest_rows(config, model, read_rows(config, model)).held_out
    plain = sae.stateless(activations.read_rows(range(activations.n_rows)))
    differs = plain.details["stateless"]
    log(
        f"without its state, on {differs['tokens']:,} tokens: FVU {differs['fvu']:.4f} "
        f"({differs['fvu_with_state']:.4f} with it), L0 {differs['l0']:.1f} for both, "
        f"{differs['same_pairs']:.0%} of the active pairs in common"
    )
    return plain


def _described(sae: SparseAutoencoder) -> str:
    known = {"source": "of", "model": "on", "layer": "layer", "module_path": "at"}
    details = {**sae.details, "source": (sae.details.get("source") or {}).get("format")}
    said = [f"{word} {details[key]}" for key, word in known.items() if details.get(key) is not None]
    return ", ".join([f"{sae.architecture} SAE, width {sae.d_in}, {sae.d_sae:,} latents", *said])


if __name__ == "__main__":
    sys.exit(main())
