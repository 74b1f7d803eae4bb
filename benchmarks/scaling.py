"""How Legato's cost grows: with d_sae, k, the window, the contexts of a batch, the SAEs of a bank, the data set's size.

    python benchmarks/scaling.py

Each series takes turns within one process. The last table is about memory: harvest, training and evaluation of one data
set and of one four times longer, each in a process of its own.

Shape legend: B rows (contexts), L positions, D width.
"""

import argparse
import statistics
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from itertools import count, islice
from pathlib import Path
from typing import Any

from common import (
    Claim,
    Contender,
    Measurement,
    Turns,
    claims_table,
    parser,
    peak_mib,
    rate_over,
    rates_table,
    serve,
    span,
    table,
    write_section,
)
from text import token_set, write_tokens

D_IN, D_SAE, K, ROWS, CONTEXT = 640, 4096, 32, 16, 128
STEPS = 40  # of training, in the memory runs


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--seconds", type=float, default=0.5, help="least length of a turn")
    options.add_argument("--memory-rows", type=int, default=512, help="contexts of the smaller data set")
    options.add_argument("--parts", default="steps,memory", help="what to measure, comma-separated")
    options.add_argument("--tokens", help=argparse.SUPPRESS)
    chosen = options.parse_args()
    if chosen.serve:
        serve(lambda: memory_run(chosen))
        return

    body, used = [], []
    if "steps" in chosen.parts:
        body.append(
            f"Training step; where not varied: d_in {D_IN}, d_sae {D_SAE}, k {K}, {ROWS} contexts of {CONTEXT}."
        )
        for title, values, build in SERIES:
            body.append(series_table(title, values, build, chosen))
    if "memory" in chosen.parts:
        turns = memory_turns(chosen)
        used = list(turns.versions.values())
        body.append(memory_tables(turns))
    write_section(chosen.results, "Scaling", "\n\n".join(body), used)


def series_table(
    title: str, values: Sequence[int], build: Callable[[int], Callable[[], object]], chosen: Namespace
) -> str:
    """Milliseconds a step by value."""
    steps = {value: build(value) for value in values}
    taken: dict[int, list[float]] = {value: [] for value in values}
    for step in steps.values():
        step(), step()
    for _ in range(chosen.rounds):
        for value, step in steps.items():
            taken[value].append(rate_over(chosen.seconds, 1, step)["ms"])
    middle = {value: statistics.median(ms) for value, ms in taken.items()}
    rows = [[f"{value:,}", span(taken[value]), f"{middle[value] / middle[values[0]]:.2f}"] for value in values]
    print(title, rows, flush=True)
    return table([title, "ms a step", f"relative to {values[0]:,}"], rows)


def step_of(arms: Sequence[Any], rows: int = ROWS, d_in: int = D_IN) -> Callable[[], object]:
    """One step of a bank on Gaussian noise."""
    import torch

    from legato.common.hardware import fast_matmul_dtype
    from legato.data.activations import ActivationBatch, Normaliser
    from legato.training.config import TrainConfig
    from legato.training.step import TrainBatch, Workspace
    from legato.training.trainer import SAETrainer

    workspace, config = Workspace(), TrainConfig(steps=10**6)
    trainers = [SAETrainer(arm, config, d_in, workspace) for arm in arms]
    generator = torch.Generator().manual_seed(0)
    mask_BL = torch.ones(rows, CONTEXT, dtype=torch.bool)
    doc_BL = torch.arange(rows, dtype=torch.int32)[:, None].expand(rows, CONTEXT).contiguous()
    raw = [
        ActivationBatch(torch.randn(rows, CONTEXT, d_in, generator=generator), mask_BL, doc_BL, doc_BL.long())
        for _ in range(4)
    ]
    normaliser, dtype, numbers = Normaliser(torch.zeros(d_in), 1.0), fast_matmul_dtype(), count()

    def step() -> None:
        batch = TrainBatch.of(raw[next(numbers) % 4], normaliser, dtype)
        for trainer in trainers:
            trainer.step(batch)

    return step


def arm(d_sae: int = D_SAE, k: int = K, window: int | None = None, name: str = "bench") -> Any:
    from legato.sae.architectures import BatchTopK
    from legato.training.config import SAEConfig
    from legato.training.losses import WindowVariance

    terms = () if window is None else (WindowVariance(window=window, coefficient=0.3),)
    return SAEConfig(name, BatchTopK(k), d_sae, terms)


SERIES: list[tuple[str, Sequence[int], Callable[[int], Callable[[], object]]]] = [
    ("d_sae", (2048, 4096, 8192, 16384), lambda d_sae: step_of([arm(d_sae=d_sae)])),
    ("k", (8, 16, 32, 64, 128), lambda k: step_of([arm(k=k)])),
    ("window", (2, 8, 32, 128), lambda window: step_of([arm(window=window)])),
    ("contexts a batch", (8, 16, 32, 64), lambda rows: step_of([arm()], rows=rows)),
    ("SAEs in the bank", (1, 2, 4, 8), lambda size: step_of([arm(name=f"bench{i}") for i in range(size)])),
]


def memory_turns(chosen: Namespace) -> Turns:
    from legato.data.language_model import LanguageModel

    tokenizer = LanguageModel.load("demo").tokenizer
    contenders = []
    with tempfile.TemporaryDirectory() as scratch:
        for rows in (chosen.memory_rows, 4 * chosen.memory_rows):
            tokens = Path(scratch, f"{rows}.npz")
            write_tokens(tokens, tokenizer, rows=rows, context=CONTEXT)
            contenders.append(Contender(f"{rows} contexts", [f"--tokens={tokens}"]))
        return Turns.take(contenders, rounds=1)


def memory_run(chosen: Namespace) -> Callable[[], Measurement]:
    """Harvest every row, train on the store, evaluate on all of it."""
    from legato.common.hardware import fast_matmul_dtype
    from legato.data.activations import Normaliser
    from legato.data.harvest import harvest
    from legato.data.language_model import LanguageModel
    from legato.evaluation.one_pass import evaluate
    from legato.training.bank import train_bank
    from legato.training.config import TrainConfig
    from legato.training.step import TrainBatch

    model, tokens = LanguageModel.load("demo"), token_set(chosen.tokens)

    def timed(work: Callable[[], Any]) -> tuple[Any, float]:
        start = time.perf_counter()
        return work(), time.perf_counter() - start

    def train(store: Any) -> Any:
        normaliser = Normaliser.fit(store)
        batches: Iterator[Any] = store.batches(ROWS, seed=0, epochs=None)
        trainer = train_bank([arm()], batches, normaliser, TrainConfig(steps=STEPS, lr=5e-3), log=lambda record: None)
        first = islice(store.batches(ROWS, seed=None), 8)
        calibration = [TrainBatch.of(batch, normaliser, fast_matmul_dtype()) for batch in first]
        return trainer.finished[0].finish(normaliser, calibration)

    def measure() -> Measurement:
        path = Path(chosen.tokens).with_suffix("")
        store, harvest_seconds = timed(lambda: harvest(model, tokens, layer=model.n_layers // 2, path=path))
        after_harvest = peak_mib()
        sae, train_seconds = timed(lambda: train(store))
        _, seconds = timed(lambda: evaluate(sae, store, language_model=model, layer=model.n_layers // 2, ce_rows=32))
        return {
            "store_mib": sum(file.stat().st_size for file in path.iterdir()) / 2**20,
            "harvest_seconds": harvest_seconds,
            "train_seconds": train_seconds,
            "evaluate_seconds": seconds,
            "peak_after_harvest": after_harvest,
            "peak_mib": peak_mib(),
        }

    return measure


def memory_tables(turns: Turns) -> str:
    keys = {
        "store_mib": "store, MiB",
        "harvest_seconds": "harvest, s",
        "train_seconds": f"{STEPS} training steps, s",
        "evaluate_seconds": "evaluation, s",
        "peak_after_harvest": "peak MiB after the harvest",
        "peak_mib": "peak MiB",
    }
    small, large = turns.measurements
    peak = Claim("peak memory, 4x the data / 1x", turns.ratios(large, small, "peak_mib"), 1.1, False)
    time_ = Claim("harvest time, 4x the data / 1x", turns.ratios(large, small, "harvest_seconds"))
    return f"{rates_table(turns, keys)}\n\n{claims_table([peak, time_])}"


if __name__ == "__main__":
    main()
