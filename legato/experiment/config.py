"""The configuration of an experiment: one small frozen record per stage.

Configs only hold and validate; they never read, write or log. Every random draw of a run comes from `seeds`.
Every field is a flag of the command line, and its text is the flag's help.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import AfterValidator, Field, StringConstraints
from pydantic_core import to_jsonable_python

from legato.common.errors import UsageError
from legato.common.record import COMMAS, DIFFERENT, as_flag, fields_of, one_of, option, record
from legato.evaluation.controls import CONTROLS
from legato.experiment.presets import PRESETS
from legato.experiment.recipes import names_of, recipes


def _combination(name: str) -> str:
    """The name of an arm, or of several that can be combined: A+B."""
    parts, known = name.split("+"), recipes()
    for part in parts:
        if part not in known:
            raise ValueError(f"is unknown: choose one of {', '.join(known)}")
    for kind in ("architecture", "groups"):
        clash = [part for part in parts if known[part].kind == kind]
        if len(clash) > 1:
            raise ValueError(f"asks for {' and '.join(clash)} at once: choose one of them")
    if len(set(parts)) < len(parts):
        raise ValueError("names a part twice")
    return name


def _points(grid: str) -> list[tuple[int, float]]:
    """(window, coefficient) of every member of the ablation."""
    try:
        windows, coefficients = grid.split("x")
        points = [(int(w), float(c)) for w in windows.split(",") for c in coefficients.split(",")]
    except ValueError as error:
        raise ValueError("is not WINDOWSxCOEFFICIENTS, such as 2,8,32x0.1,1") from error
    if not all(window >= 2 and 0 <= coefficient < math.inf for window, coefficient in points):
        raise ValueError("is out of range: use windows of 2 or more and coefficients of 0 or more")
    return points


Name = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]
SITE = "what is read there: resid_post, mlp_out, attn_out, resid_pre, resid_mid, attn_z, or the path of a module"
DType = Annotated[str, one_of("auto", "bfloat16", "float32")]
Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
ArmName = Annotated[str, AfterValidator(_combination)]


@record
class ModelConfig:
    """The language model, and the place that is read."""

    model: Name = option("demo", "'demo' (packaged Gemma 3 270M), a hub id, a local folder or a .gguf file")
    layer: int | None = option(None, "decoder layer that is read, from 0 (default: the middle one)", ge=0)
    site: Name = option("resid_post", SITE)
    dtype: DType = option(
        "auto", "of the model and the SAEs' matmuls: auto (bfloat16 where it is faster), bfloat16 or float32"
    )


@record
class DataConfig:
    """The text, and its contexts."""

    dataset: Name = option(
        "demo", "'demo' (packaged Wikipedia articles), a .txt/.jsonl/.parquet file, a folder, a hub id"
    )
    text_column: Name = option("text", "column that holds the text, for .jsonl, .parquet and hub data sets")
    context_length: int = option(128, "tokens per context", ge=8)
    corpus_tokens: Count = option(
        2_000_000, "most tokens of text to harvest; training passes over them as often as needed"
    )
    held_out: float = option(0.06, "share of the documents kept for evaluation", gt=0, lt=1)
    store: bool = option(True, "keep the training activations on disk; --no-store computes them as training asks")


@record
class TrainingConfig:
    """Training of every SAE."""

    tokens: Count = option(1_000_000, "training tokens per SAE")
    batch_rows: Count = option(16, "contexts per training step")
    lr: float = option(5e-3, "peak learning rate", gt=0)
    d_sae: Count = option(4096, "latents per SAE")
    k: Count = option(32, "active latents per token (L0)")
    seeds: Annotated[tuple[Seed, ...], COMMAS, DIFFERENT] = option(
        (0,), "one SAE of each arm per seed, comma-separated"
    )

    def __post_init__(self) -> None:
        if self.k > self.d_sae:
            raise UsageError(f"--k {self.k} exceeds --d_sae {self.d_sae}: lower k or widen the SAE")


@record
class ArmsConfig:
    """SAEs beside the baseline."""

    temporal: Annotated[tuple[ArmName, ...], COMMAS] = option(
        ("legato", "tsae"),
        f"named arms beside the baseline, comma-separated: {', '.join(recipes())}; A+B combines two",
    )
    window: int = option(8, "window of the named temporal terms, in tokens", ge=2)
    coefficient: float | None = option(
        None,
        "weight of the named temporal terms beside the reconstruction loss, an FVU (default: each term's own)",
        ge=0,
    )
    term_warmup: float = option(
        0.1, "share of the training steps over which the weights of temporal terms grow from 0", ge=0, le=1
    )
    slow_fraction: float = option(
        1.0,
        f"leading share of the latents that the named temporal terms look at: {', '.join(names_of('term'))}",
        gt=0,
        le=1,
    )
    lags: Annotated[tuple[Count, ...], COMMAS, DIFFERENT] = option(
        (1,), "contrastive: how far apart the tokens are whose codes are pulled together"
    )
    temperature: float = option(0.1, "contrastive: of its softmax over cosines", gt=0)
    l1: float = option(5.0, "relu, window_group_lasso: weight of the penalty that makes them sparse", gt=0)
    release: float = option(
        0.4, "legato, hysteresis: a latent that is on stays on above this share of its threshold", gt=0, le=1
    )
    grid: Annotated[str, AfterValidator(lambda grid: _points(grid) and grid)] = option(
        "2,4,8,16,32x0.1,0.3,1", "ablation: windows x coefficients of window_variance"
    )
    ablation: bool = option(True, "train the grid: --no-ablation leaves it out")
    sweep_k: Annotated[tuple[Count, ...], COMMAS] = option(
        (), "further baselines at these k, comma-separated, to compare at matched cost"
    )
    sweep_arms: Annotated[tuple[str, ...], COMMAS] = option(
        (), "named arms that are trained at the k of --sweep_k too, comma-separated"
    )

    def __post_init__(self) -> None:
        if self.sweep_arms and not self.sweep_k:
            raise UsageError("--sweep_arms needs the k to train them at: add --sweep_k")
        for name in self.sweep_arms:
            if name not in self.temporal:
                raise UsageError(f"--sweep_arms {name} is not trained: choose of --temporal {as_flag(self.temporal)}")

    @property
    def grid_points(self) -> list[tuple[int, float]]:
        """(window, coefficient) of every member of the ablation; empty without one."""
        return _points(self.grid) if self.ablation else []


@record
class EvaluationConfig:
    """Evaluation on held-out text."""

    eval_rows: int = option(512, "held-out contexts for the consistency and core metrics", ge=2)
    ce_rows: int = option(24, "held-out contexts for the language model's loss with the SAE spliced in", ge=0)
    controls: Annotated[tuple[Annotated[str, one_of(*CONTROLS)], ...], COMMAS] = option(
        CONTROLS, f"what is made of the baseline's codes without training, to compare with: {', '.join(CONTROLS)}"
    )


@dataclass(frozen=True)
class ExperimentConfig:
    """Everything a run depends on."""

    preset: str = "demo"
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    arms: ArmsConfig = field(default_factory=ArmsConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def __post_init__(self) -> None:
        for k in self.arms.sweep_k:
            if k > self.training.d_sae:
                raise UsageError(f"--sweep_k {k} exceeds --d_sae {self.training.d_sae}: lower it or widen the SAE")

    @classmethod
    def from_options(cls, preset: str, options: Mapping[str, Any]) -> "ExperimentConfig":
        """A preset with some options replaced. Raises UsageError for a preset or option that does not exist."""
        if preset not in PRESETS:
            raise UsageError(f"preset {preset!r} is unknown: choose one of {', '.join(PRESETS)}")
        merged = {**PRESETS[preset], **options}
        unknown = merged.keys() - {name for stage in STAGES.values() for name in fields_of(stage)}
        if unknown:
            raise UsageError(f"unknown option {', '.join(sorted(unknown))}: see --help")
        records = {
            name: stage(**{key: merged[key] for key in fields_of(stage) if key in merged})
            for name, stage in STAGES.items()
        }
        return cls(preset=preset, **records)

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dict for config.yaml; tuples become lists."""
        return to_jsonable_python(dataclasses.asdict(self))


STAGES = {
    "model": ModelConfig,
    "data": DataConfig,
    "training": TrainingConfig,
    "arms": ArmsConfig,
    "evaluation": EvaluationConfig,
}


@record
class RunOptions:
    """Options of a run that its results do not depend on."""

    out_dir: Name = option(..., "new folder for everything the run produces")
    preset: str = option("demo", f"starting point for all options: {', '.join(PRESETS)}")
    resume: bool = option(
        False, "go on with the unfinished run in out_dir, as the same command does anyway; fails where there is none"
    )
    checkpoint_minutes: float = option(5.0, "minutes of training between two saved states, 0 for every step", ge=0)
    shard_latents: bool = option(
        False,
        "under torchrun: each process holds a part of every SAE's latents, as it does anyway where SAEs fit into "
        "memory in no other way; the last bits then depend on how many there are",
    )
    wandb: str = option("", "log to this Weights & Biases project too (WANDB_MODE=offline)")
