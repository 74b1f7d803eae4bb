"""The time that the stages of an experiment will take on this machine, from rates measured in the first seconds."""

import time
from collections.abc import Callable

import torch

from legato.common import distributed
from legato.common.hardware import fast_matmul_dtype
from legato.common.progress import duration
from legato.data.language_model import LanguageModel
from legato.experiment.config import ExperimentConfig
from legato.experiment.inputs import Text, layer_of

ROWS = 8  # two take 1.7 times as long a row
# A training step and the judging of a held-out token, in units of the encoder's matmul over the same tokens: guesses,
# not yet measured.
STEP_PER_MATMUL = 2.4
JUDGING_PER_MATMUL = 9.0


def expected_time(config: ExperimentConfig, model: LanguageModel, text: Text, *, n_saes: int, width: int) -> str:
    """Measure this machine for a few seconds and say the time of each stage, in one line.

    Harvest: the rate of a forward pass of a few rows; nothing where the cache holds the activations. Training and
    evaluation: the rate of the encoder's matmul. Ranks share the work.
    """
    tokens_BL = text.train.tokens_BL[:ROWS].long()
    layer, site = layer_of(config.model, model), config.model.site
    row_seconds = _seconds(lambda: model.activations(tokens_BL, layer, site), 1) / len(tokens_BL)
    held_out = len(text.held_out)
    harvest = row_seconds * (held_out + (len(text.train) if config.data.store else 0))
    n_tokens = config.training.batch_rows * config.data.context_length
    x_ND = torch.ones(n_tokens, width, dtype=fast_matmul_dtype())
    W_DF = torch.ones(width, config.training.d_sae, dtype=fast_matmul_dtype())
    matmul = _seconds(lambda: x_ND @ W_DF, 3) / n_tokens
    training = STEP_PER_MATMUL * matmul * config.training.tokens * n_saes
    if not config.data.store:
        training += row_seconds * config.training.tokens / config.data.context_length
    n_judged = n_saes + len(config.evaluation.controls)
    evaluation = JUDGING_PER_MATMUL * matmul * held_out * config.data.context_length * n_judged
    ranks = distributed.world_size()
    stages = {
        "activations (none where they are cached)": harvest,
        f"training {n_saes} SAEs": training,
        "evaluation": evaluation,
    }
    said = ", ".join(f"{name} {duration(seconds / ranks)}" for name, seconds in stages.items())
    return f"expected on this machine, about {duration(sum(stages.values()) / ranks)}: {said}"


def _seconds(do: Callable[[], object], n_times: int) -> float:
    """Return the shortest of n_times, after one for warming up."""
    times = []
    for _ in range(1 + n_times):
        start = time.monotonic()
        do()
        times.append(time.monotonic() - start)
    return min(times[1:])
