"""What a bank costs: the default experiment's SAEs in one pass, beside one of them alone, in alternation.

    python benchmarks/bank.py

Both harvest the same rows anew and then train from that store, which is in the page cache: the training times are those
from a warm store, and the sum is what a first run takes. `--share` shortens both stages of the default run alike.
"""

import argparse
import shutil
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable
from itertools import count
from pathlib import Path

from common import (
    Claim,
    Contender,
    Measurement,
    Turns,
    claims_table,
    parser,
    peak_mib,
    rates_table,
    serve,
    write_section,
)
from text import token_set, write_tokens

CORPUS_ROWS = 4700  # contexts of 128 in the demo articles' training side


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--share", type=float, default=0.2, help="of the default run's text and training tokens")
    options.add_argument("--tokens", help=argparse.SUPPRESS)
    chosen = options.parse_args()
    if chosen.serve:
        serve(lambda: contender(chosen))
        return

    from legato.data.language_model import LanguageModel
    from legato.experiment.arms import planned_arms
    from legato.experiment.config import ExperimentConfig

    config = ExperimentConfig()
    model = LanguageModel.load("demo")
    n_arms = len(planned_arms(config, model.d_model))
    with tempfile.TemporaryDirectory() as scratch:
        tokens = Path(scratch, "tokens.npz")
        rows = round(chosen.share * CORPUS_ROWS)
        write_tokens(tokens, model.tokenizer, rows=rows, context=config.data.context_length)
        del model
        arguments = [f"--share={chosen.share}", f"--tokens={tokens}"]
        turns = Turns.take([Contender(name, arguments) for name in ("one SAE", "bank")], chosen.rounds)
    together = turns.ratios("bank", "one SAE", "train_seconds")
    shown = [
        Claim(f"bank of {n_arms} / one SAE, training from a warm store", together, 5, False),
        Claim(
            f"bank of {n_arms} / one SAE, harvest and training", turns.ratios("bank", "one SAE", "seconds"), 5, False
        ),
        Claim("a SAE of the bank / one alone, training", [value / n_arms for value in together]),
    ]
    training = config.training
    setting = (
        f"{chosen.share:g} of the default run: {rows} contexts harvested, "
        f"{round(chosen.share * training.tokens):,} training tokens a SAE, d_sae {training.d_sae}, k {training.k}, "
        f"{training.batch_rows} contexts a step."
    )
    keys = {
        "train_seconds": "training, s",
        "harvest_seconds": "harvest, s",
        "seconds": "sum, s",
        "peak_mib": "peak MiB",
    }
    body = [setting, rates_table(turns, keys), claims_table(shown)]
    write_section(chosen.results, "Bank", "\n\n".join(body), turns.versions.values())


def contender(chosen: Namespace) -> Callable[[], Measurement]:
    from legato.data.activations import Normaliser
    from legato.data.harvest import harvest
    from legato.data.language_model import LanguageModel
    from legato.experiment.arms import planned_arms
    from legato.experiment.config import ExperimentConfig
    from legato.training.bank import train_bank
    from legato.training.config import TrainConfig

    config = ExperimentConfig()
    model, tokens = LanguageModel.load("demo"), token_set(chosen.tokens)
    members = [one.sae for one in planned_arms(config, model.d_model)][: None if chosen.serve == "bank" else 1]
    rows = config.training.batch_rows
    steps = max(2, round(chosen.share * config.training.tokens / (rows * config.data.context_length)))
    numbers, scratch = count(), Path(chosen.tokens).parent

    def run(n_steps: int) -> Measurement:
        path = scratch / f"{chosen.serve}{next(numbers)}"
        start = time.perf_counter()
        store = harvest(model, tokens, layer=model.n_layers // 2, path=path)
        harvested = time.perf_counter()
        batches = store.batches(rows, seed=0, epochs=None, drop_last=True)
        train_config = TrainConfig(steps=n_steps, lr=config.training.lr)
        result = train_bank(members, batches, Normaliser.fit(store), train_config, log=lambda record: None)
        end = time.perf_counter()
        assert not result.failed, result.failed
        shutil.rmtree(path)
        return {
            "train_seconds": end - harvested,
            "harvest_seconds": harvested - start,
            "seconds": end - start,
            "peak_mib": peak_mib(),
        }

    run(2)
    return lambda: run(steps)


if __name__ == "__main__":
    main()
