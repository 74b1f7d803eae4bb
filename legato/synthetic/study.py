"""Train arms on beds of planted sources, several seeds, and measure their recovery.

Shape legend: F planted sources.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from legato.common.errors import LegatoError, UsageError
from legato.common.hardware import fast_matmul_dtype
from legato.common.record import DIFFERENT, record
from legato.data.activations import Normaliser
from legato.evaluation import metrics
from legato.experiment.arms import recipe
from legato.sae.protocol import EvaluableSAE
from legato.synthetic.bed import Bed, BedConfig
from legato.synthetic.ranking import metric_columns, rank_correlations
from legato.synthetic.recovery import (
    Match,
    bootstrap,
    chance_mcc,
    code_correlation,
    decoder_cosine,
    encode,
    found_by_true_directions,
)
from legato.training.bank import train_bank
from legato.training.config import SAEConfig, TrainConfig
from legato.training.step import TrainBatch

Floats = NDArray[np.float64]

BASELINE = "baseline"
PERSISTENT = 0.5  # planted persistence from which a source counts as persistent
BINS = {
    "all": (0.0, 1.0),
    "persistent": (PERSISTENT, 1.0),
    "transient": (0.0, PERSISTENT),
    "0 to .3": (0.0, 0.3),
    ".3 to .6": (0.3, 0.6),
    ".6 to 1": (0.6, 1.0),
}
RECOVERED = 0.5  # least code correlation at which a latent counts as its source
CALIBRATION_BATCHES = 8


@record
class StudyConfig:
    """Options of a study. seeds: one bed and one SAE per arm each, both drawn with it. The rest as in TrainConfig."""

    seeds: Annotated[tuple[Annotated[int, Field(ge=0)], ...], DIFFERENT] = (0, 1, 2)
    steps: int = Field(300, ge=1)
    batch_rows: int = Field(16, ge=1)
    lr: float = Field(1.5e-2, gt=0)


@dataclass(frozen=True)
class Judgement:
    """Recovery of one bed by one SAE. decoder, code: matches by |decoder cosine| and by code correlation.
    columns: metrics of each source's latent (by code), NaN where its correlation is below RECOVERED."""

    decoder: Match
    code: Match
    columns: Mapping[str, Floats]
    core: Mapping[str, float | None]

    @classmethod
    def of(cls, sae: EvaluableSAE, bed: Bed) -> "Judgement":
        """Judge an SAE. Raises LegatoError where it has another width than the bed."""
        if sae.W_dec.shape[1] != bed.config.d_in:
            raise LegatoError(f"the SAE has width {sae.W_dec.shape[1]}, the bed {bed.config.d_in}: train it on the bed")
        rows = bed.held_out
        codes = encode(sae, rows)
        code = Match.best(code_correlation(rows.codes, codes, rows.mask_RL))
        found_F = (code.latent_F >= 0) & (code.score_F >= RECOVERED)
        columns = {
            name: np.where(found_F, values[code.latent_F], np.nan)
            for name, values in metric_columns(codes, rows).items()
        }
        fidelity = metrics.reconstruction(rows.acts_RLD, sae.decode_sparse(codes), rows.mask_RL)
        core = {"fvu": fidelity["fvu"], "l0": len(codes) / int(rows.mask_RL.sum())}
        return cls(Match.best(decoder_cosine(bed.directions_FD, sae.W_dec)), code, columns, core)


def train_on(bed: Bed, arms: Sequence[SAEConfig], config: StudyConfig) -> dict[str, EvaluableSAE]:
    """Train the arms on the bed in one bank; return them by name. Raises LegatoError where one of them fails."""
    normaliser = Normaliser.fit(bed.train)
    dtype = fast_matmul_dtype()
    calibration = [
        TrainBatch.of(batch, normaliser, dtype)
        for batch in islice(bed.train.batches(config.batch_rows, seed=None), CALIBRATION_BATCHES)
    ]
    batches = bed.train.batches(config.batch_rows, seed=bed.config.seed, epochs=None, drop_last=True)
    train = TrainConfig(steps=config.steps, lr=config.lr)
    result = train_bank(arms, batches, normaliser, train, log=lambda record: None)
    if result.failed:
        raise LegatoError(f"{len(result.failed)} arms failed: {'; '.join(reason for _, reason in result.failed)}")
    return {trainer.arm.name: trainer.finish(normaliser, calibration) for trainer in result.finished}


def study(
    bed_config: BedConfig,
    arms: Sequence[SAEConfig],
    config: StudyConfig,
    *,
    release: float = 0.5,
    progress: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Measure every arm's recovery of the planted sources, and how every metric ranks their properties.

    arms: one of them named "baseline"; their seed is replaced by each of config.seeds, as is the bed's.
    progress: called once a seed.

    Returns plain numbers: {"bed", "difficulty", "true_codes", "arms": {name: {"recipe", "core", "mcc", "code_mcc",
    "metrics", ...}}}. Every "mean" is one over seeds and sources, with the 95 % interval of a bootstrap over both.
    "advantage" is the arm's score less the baseline's, paired by source.
    """
    names = [arm.name for arm in arms]
    if BASELINE not in names or len(set(names)) < len(names):
        raise UsageError(f"arms must have different names, one of them {BASELINE!r}, not {', '.join(names)}")
    if bed_config.rows < config.batch_rows:
        raise UsageError(f"{bed_config.rows} rows are fewer than one batch of {config.batch_rows}")
    planted: list[dict[str, Floats]] = []
    true_columns: list[dict[str, Floats]] = []
    difficulty: list[dict[str, float]] = []
    judged: dict[str, list[Judgement]] = {name: [] for name in names}
    for seed in config.seeds:
        bed = Bed.build(replace(bed_config, seed=seed))
        planted.append(bed.sources.planted(bed_config.length))
        true_columns.append(metric_columns(bed.held_out.codes, bed.held_out))
        k = max(1, round(bed.sources.l0))
        difficulty.append({**found_by_true_directions(bed, k, release), "chance_mcc": chance_mcc(bed, arms[0].d_sae)})
        for name, sae in train_on(bed, [replace(arm, seed=seed) for arm in arms], config).items():
            judged[name].append(Judgement.of(sae, bed))
        progress()
    persistence = [each["persistence"] for each in planted]
    return {
        "bed": _described(bed_config, planted[0]),
        "difficulty": {key: float(np.mean([each[key] for each in difficulty])) for key in difficulty[0]},
        "true_codes": rank_correlations(true_columns, planted),
        "arms": {
            arm.name: {
                "recipe": {key: value for key, value in recipe(arm).items() if key != "seed"},
                **_recovery(judged[arm.name], judged[BASELINE], persistence),
                "metrics": rank_correlations([each.columns for each in judged[arm.name]], planted),
            }
            for arm in arms
        },
    }


def _recovery(
    judged: Sequence[Judgement], baseline: Sequence[Judgement], persistence: Sequence[Floats]
) -> dict[str, Any]:
    """Summarise what an arm recovers, over seeds, and how much more than the baseline."""

    def gained(key: str) -> list[Floats]:
        both = zip(judged, baseline, strict=True)
        return [getattr(mine, key).score_F - getattr(theirs, key).score_F for mine, theirs in both]

    return {
        "core": {key: float(np.mean([each.core[key] for each in judged])) for key in ("fvu", "l0")},
        "mcc": _scores([each.decoder.score_F for each in judged], persistence),
        "code_mcc": _scores([each.code.score_F for each in judged], persistence),
        "advantage": {key: _scores(gained(key), persistence) for key in ("decoder", "code")},
        "recovered": float(np.mean([(each.code.score_F >= RECOVERED).mean() for each in judged])),
    }


def _scores(scores: Sequence[Floats], persistence: Sequence[Floats]) -> dict[str, Any]:
    """Return {bin of planted persistence: {"mean", "interval95", "per_seed", "sources"}}, without empty bins."""
    result = {}
    for name, (low, high) in BINS.items():
        chosen = [score_F[(rho >= low) & (rho < high)] for score_F, rho in zip(scores, persistence, strict=True)]
        if not min(map(len, chosen)):
            continue
        mean, interval = bootstrap(chosen)
        per_seed = [float(values.mean()) for values in chosen]
        result[name] = {"mean": mean, "interval95": interval, "per_seed": per_seed, "sources": len(chosen[0])}
    return result


def _described(config: BedConfig, planted: Mapping[str, Floats]) -> dict[str, Any]:
    return {
        **{key: value for key, value in asdict(config).items() if key not in ("families", "seed")},
        "families": [{**asdict(family), "count": count} for family, count in config.families],
        "sources": len(planted["rate"]),
        "l0": float(planted["rate"].sum()),
    }
