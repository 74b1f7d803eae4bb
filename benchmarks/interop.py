"""What `foreign_saes.py` made, opened by Legato: the table of docs/interop.md, but for what `legato evaluate` says.

python interop.py activations FILE        tokens of the demo model's layer 9: to train on, to test on, and random
python interop.py check FILE OUT          codes and reconstructions beside the original's; exports to OUT/exported
python interop.py back OUT                what the tools computed of those exports (foreign_saes.py --back)
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from legato.data.documents import load_documents
from legato.data.harvest import harvest
from legato.data.language_model import LanguageModel
from legato.data.tokens import tokenise
from legato.sae.autoencoder import SparseAutoencoder, export

LAYER, ROWS, TEST_ROWS, RANDOM = 9, 256, 8, 512
PLACES = {"saelens": "", "dictionary_learning": "trainer_0", "temporal_saes": "trainer_0", "sparsify": "layers.9"}
PLACES |= {"gemma_scope": "layer_9/width_1k/average_l0_32"}


def activations(path: str) -> None:
    model = LanguageModel.load("demo")
    documents = load_documents("demo")
    tokens = tokenise(documents, model.tokenizer, context_length=128, max_tokens=ROWS * 128)
    batch = harvest(model, tokens, layer=LAYER).read_rows(range(ROWS))
    acts_BLD, mask_BL = batch.acts_BLD.float(), batch.mask_BL
    train_ND = acts_BLD[:-TEST_ROWS][mask_BL[:-TEST_ROWS]]
    noise_ND = torch.randn(RANDOM, train_ND.shape[1], generator=torch.Generator().manual_seed(0))
    random_ND = train_ND.mean(0) + train_ND.std(0) * noise_ND
    save_file({"train": train_ND, "real": acts_BLD[-TEST_ROWS:][mask_BL[-TEST_ROWS:]], "random": random_ND}, path)


def place(folder: Path) -> list[tuple[str, Path]]:
    """(name, where the SAE lies) of a maker's folder."""
    tool = next(tool for tool in PLACES if folder.name.startswith(tool))
    if tool == "saelens":
        return [(f"{folder.name}/{which}", folder / which) for which in ("training", "inference")]
    return [(folder.name, folder / PLACES[tool])]


def difference(one: dict, other: dict) -> str:
    """Largest differences, as shares of the largest value, and the share of active pairs that only one of them has."""
    parts = []
    for name in ("random", "real"):
        codes, recon = (one[f"{name}_{what}"] - other[f"{name}_{what}"] for what in ("codes", "recon"))
        on, off = one[f"{name}_codes"] > 0, other[f"{name}_codes"] > 0
        parts += [
            f"{float(codes.abs().max() / other[f'{name}_codes'].abs().max()):.0e}",
            f"{float(recon.abs().max() / other[f'{name}_recon'].abs().max()):.0e}",
            f"{float((on ^ off).sum() / (on | off).sum()):.0e}",
        ]
    return " | ".join(parts)


def computed(sae: SparseAutoencoder, acts: dict) -> dict:
    codes = {name: sae.encode(acts[name]) for name in ("random", "real")}
    recon = {f"{name}_recon": sae.decode(codes_NF) for name, codes_NF in codes.items()}
    return {f"{name}_codes": codes_NF for name, codes_NF in codes.items()} | recon


def check(acts: str, out: Path) -> None:
    given = load_file(acts)
    for file in sorted(out.glob("*.safetensors")):
        for name, path in place(out / file.stem):
            sae = SparseAutoencoder.load(path)
            print(
                f"| {name} | {sae.architecture.name} | {difference(computed(sae, given), load_file(file))} |",
                flush=True,
            )
        for to in ("saelens", "dictionary_learning", *(("sparsify",) if sae.architecture.name == "topk" else ())):
            folder = out / "exported" / f"{file.stem}.{to}" / ("" if to == "saelens" else PLACES[to])
            export(sae, folder, to)


def back(out: Path) -> None:
    for file in sorted((out / "back").glob("*.safetensors")):
        maker, to = file.stem.rsplit(".", 1)
        print(f"| {maker} | {to} | {difference(load_file(file), load_file(out / f'{maker}.safetensors'))} |")


if __name__ == "__main__":
    command, *arguments = sys.argv[1:]
    if command == "activations":
        activations(arguments[0])
    elif command == "check":
        check(arguments[0], Path(arguments[1]))
    else:
        back(Path(arguments[0]))
