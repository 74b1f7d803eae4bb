"""`legato saebench`: a saved SAE through sae-bench itself, in an environment that has it."""

import argparse
from importlib.util import find_spec
from pathlib import Path

from legato.config import DataConfig, EvaluationConfig, ModelConfig
from legato.errors import UsageError
from legato.interop.saebench_evals import EVALS, start
from legato.judge_sae import JudgeConfig, check_width, load_model, named, read_rows
from legato.sae import SparseAutoencoder
from legato.sae_origin import origin_of
from legato.tracking import say


def add_arguments(parser: argparse.ArgumentParser) -> None:
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


def main(options: argparse.Namespace) -> None:
    if find_spec("sae_bench") is None:
        raise UsageError(
            "sae-bench is not installed here, and pins older versions of other packages: make an environment with "
            "`pip install legato-sae sae-bench` and run this there"
        )
    from legato.interop.saebench_wrapper import LegatoSAE, run_core

    ((name, source),) = named([options.sae]).items()
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
        say(f"results: {options.out}/")
        return
    dataset = options.dataset or origin.dataset or "demo"
    config = JudgeConfig(
        {name: source},
        ModelConfig(model_name, layer, site, options.dtype),
        DataConfig(dataset, options.text_column, options.context_length),
        options.held_out,
        EvaluationConfig(options.rows, controls=()),
    )
    model = load_model(config.as_experiment())
    check_width({name: sae}, model)
    tokens = read_rows(config, model)
    path = run_core(
        sae, model, tokens, layer=layer, site=site, out=options.out, release="legato", name=name, dataset=dataset
    )
    say(f"results: {path}")
