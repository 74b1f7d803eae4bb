"""`legato import` and `legato export`: one SAE between the formats of tools."""

import argparse
from pathlib import Path

from legato.interop.formats import EXPORT_FORMATS, export
from legato.judge_sae import add_place_arguments, harvest_rows, load_model, opened, read_rows
from legato.sae import SparseAutoencoder
from legato.tracking import say

_SOURCE = "a saved SAE of any format that legato reads: a folder or file, or on the hub owner/name[/folder]"


def add_import_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("sae", metavar="SAE", help=_SOURCE)
    parser.add_argument("out", metavar="FOLDER", type=Path, help="where to save it, as a SAELens folder")


def import_sae(options: argparse.Namespace) -> None:
    sae = SparseAutoencoder.load(options.sae)
    say(f"{_described(sae)}\nsaved: {sae.save(options.out)}")


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
    say(f"{_described(sae)}\nsaved as {options.to}: {path}")


def _stateless(options: argparse.Namespace) -> SparseAutoencoder:
    saes, config = opened(options)
    (sae,) = saes.values()
    model = load_model(config.as_experiment())
    activations = harvest_rows(config, model, read_rows(config, model)).held_out
    plain = sae.stateless(activations.read_rows(range(activations.n_rows)))
    differs = plain.details["stateless"]
    say(
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
