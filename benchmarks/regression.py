"""A minute's check that nothing became slow: training step and harvest, each against the matmuls it contains.

    python benchmarks/regression.py

Exits with 1 if a share of the limit falls below its floor. Only the shares mean something on another machine.

Shape legend: B rows, L positions, D width, F latents.
"""

import statistics
import sys
import tempfile
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import harvest
import train_step
from common import parser, rate_over, span, table, write_section
from text import model_folder, write_tokens

ROWS, CONTEXT, LAYER = 64, 128, 9
DIMS = {"d_in": 640, "d_sae": 10240, "k": 32, "batch": 4096}
FLOORS = {"BatchTopK step": 0.35, "TopK step": 0.3, "BatchTopK step, window 8": 0.3, "harvest, demo layer 9": 0.6}


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--save", action="store_true", help="also write the section of the results page")
    chosen = options.parse_args()

    import torch

    from legato.data.language_model import LanguageModel

    pool_4ND = torch.randn(4, DIMS["batch"], DIMS["d_in"], generator=torch.Generator().manual_seed(0))
    settings = Namespace(**DIMS)
    with tempfile.TemporaryDirectory() as scratch:
        tokens, folder = Path(scratch, "tokens.npz"), model_folder("demo")
        model = LanguageModel.load(folder)
        write_tokens(tokens, model.tokenizer, rows=ROWS, context=CONTEXT)
        dtype = str(model.dtype).removeprefix("torch.")
        reading = Namespace(model=folder, dtype=dtype, tokens=str(tokens), layer=LAYER, batch_rows=32, context=CONTEXT)
        del model
        measured = {
            "BatchTopK step": train_step.ours(settings, pool_4ND, "batchtopk"),
            "BatchTopK step, window 8": train_step.ours(settings, pool_4ND, "batchtopk", "window8"),
            "TopK step": train_step.ours(settings, pool_4ND, "topk"),
            "encoder matmul": train_step.matmul(settings, pool_4ND),
            f"harvest, demo layer {LAYER}": harvest.ours(reading),
            "its matmuls": harvest.matmuls(reading),
        }
        rates = take_turns(measured, chosen.rounds)
    rows, slow = [], []
    for name, floor in FLOORS.items():
        limit = "its matmuls" if name.startswith("harvest") else "encoder matmul"
        shares = [a / b for a, b in zip(rates[name], rates[limit], strict=True)]
        rows.append([name, span(rates[name]), span(rates[limit]), span(shares), f"{floor:g}"])
        if statistics.median(shares) < floor:
            slow.append(name)
    shown = table(["", "tokens/s", "matmuls alone, tokens/s", "share", "floor"], rows)
    print(shown)
    if chosen.save:
        write_section(chosen.results, "Regression check", shown)
    for name in slow:
        print(f"{name} is below its floor", file=sys.stderr)
    return 1 if slow else 0


def take_turns(measured: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Tokens a second of each, once a round, after two turns that do not count."""
    rates: dict[str, list[float]] = {name: [] for name in measured}
    for number in range(rounds + 2):
        for name, step in measured.items():
            n_tokens = ROWS * CONTEXT if "harvest" in name or "its" in name else DIMS["batch"]
            rate = rate_over(0.5, n_tokens, step)["rate"]
            if number >= 2:
                rates[name].append(rate)
    return rates


if __name__ == "__main__":
    sys.exit(main())
