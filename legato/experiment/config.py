"""The configuration of an experiment: one small frozen record per stage.

Configs only hold and validate; they never read, write or log. Every random draw of a run comes from `seeds`.

The command line of experiment.py: a flag for every field of the configuration, and how the run is carried out.
"""

import argparse
import dataclasses
import math
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from legato.common.errors import UsageError
from legato.evaluation.controls import CONTROLS
from legato.experiment.presets import PRESETS
from legato.experiment.recipes import RECIPES, names_of


def option(default: Any, text: str) -> Any:
    """A field with its line of --help."""
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class ModelConfig:
    """Which language model, and where it is read."""

    model: str = option("demo", "'demo' (packaged Gemma 3 270M), a hub id, a local folder or a .gguf file")
    layer: int | None = option(None, "decoder layer that is read, from 0 (default: the middle one)")
    site: str = option("resid_post", "what is read there: resid_post, mlp_out or attn_out")
    dtype: str = option(
        "auto",
        "of the model and the SAEs' matmuls: auto (bfloat16 where it is faster), bfloat16 or float32",
    )

    def __post_init__(self) -> None:
        not_empty("model", self.model, "name a model, such as demo or gpt2")
        _choice("site", self.site, ("resid_post", "mlp_out", "attn_out"))
        _choice("dtype", self.dtype, ("auto", "bfloat16", "float32"))
        if self.layer is not None and self.layer < 0:
            raise UsageError(f"--layer {self.layer} does not exist: layers count from 0")


@dataclass(frozen=True)
class DataConfig:
    """Which text, and how it becomes contexts."""

    dataset: str = option(
        "demo", "'demo' (packaged Wikipedia articles), a .txt/.jsonl/.parquet file, a folder, a hub id"
    )
    text_column: str = option("text", "column that holds the text, for .jsonl, .parquet and hub data sets")
    context_length: int = option(128, "tokens per context")
    corpus_tokens: int = option(
        2_000_000, "most tokens of text to harvest; training passes over them as often as needed"
    )
    held_out: float = option(0.06, "share of the documents kept for evaluation")
    store: bool = option(True, "keep the training activations on disk; --no-store computes them as training asks")

    def __post_init__(self) -> None:
        not_empty("dataset", self.dataset, "name a file, a folder or a hub data set")
        not_empty("text_column", self.text_column, "name the column that holds the text")
        _at_least("context_length", self.context_length, 8)
        _at_least("corpus_tokens", self.corpus_tokens, 1)
        if not 0 < self.held_out < 1:
            raise UsageError(f"--held_out {self.held_out} leaves one side without text: use a share between 0 and 1")


@dataclass(frozen=True)
class TrainingConfig:
    """How every SAE is trained."""

    tokens: int = option(1_000_000, "training tokens per SAE")
    batch_rows: int = option(16, "contexts per training step")
    lr: float = option(5e-3, "peak learning rate")
    d_sae: int = option(4096, "latents per SAE")
    k: int = option(32, "active latents per token (L0)")
    seeds: tuple[int, ...] = option((0,), "one SAE of each arm per seed, comma-separated")

    def __post_init__(self) -> None:
        for name in ("batch_rows", "d_sae", "k", "tokens"):
            _at_least(name, getattr(self, name), 1)
        if not 0 < self.lr < math.inf:
            raise UsageError(f"--lr {self.lr} does not train: use a positive learning rate")
        if self.k > self.d_sae:
            raise UsageError(f"--k {self.k} exceeds --d_sae {self.d_sae}: lower k or widen the SAE")
        if not self.seeds or len(set(self.seeds)) != len(self.seeds) or min(self.seeds) < 0 or max(self.seeds) >= 2**63:
            raise UsageError(f"--seeds {self.seeds} must be different whole numbers from 0 on, below 2^63")


@dataclass(frozen=True)
class ArmsConfig:
    """Which SAEs stand beside the baseline."""

    temporal: tuple[str, ...] = option(
        ("legato", "tsae"),
        f"named arms beside the baseline, comma-separated: {', '.join(RECIPES)}; A+B combines two",
    )
    window: int = option(8, "window of the named temporal terms, in tokens")
    coefficient: float | None = option(
        None, "weight of the named temporal terms beside the reconstruction loss, an FVU (default: each term's own)"
    )
    term_warmup: float = option(0.1, "share of the training steps over which the weights of temporal terms grow from 0")
    slow_fraction: float = option(
        1.0, f"leading share of the latents that the named temporal terms look at: {', '.join(names_of('term'))}"
    )
    lags: tuple[int, ...] = option((1,), "contrastive: how far apart the tokens are whose codes are pulled together")
    temperature: float = option(0.1, "contrastive: of its softmax over cosines")
    l1: float = option(5.0, "relu, window_group_lasso: weight of the penalty that makes them sparse")
    release: float = option(0.4, "legato, hysteresis: a latent that is on stays on above this share of its threshold")
    grid: str = option("2,4,8,16,32x0.1,0.3,1", "ablation: windows x coefficients of window_variance")
    ablation: bool = option(True, "train the grid: --no-ablation leaves it out")
    sweep_k: tuple[int, ...] = option((), "further baselines at these k, comma-separated, to compare at matched cost")
    sweep_arms: tuple[str, ...] = option((), "named arms that are trained at the k of --sweep_k too, comma-separated")

    def __post_init__(self) -> None:
        _at_least("window", self.window, 2)
        for name in self.temporal:
            _check_combination(name)
        for name in self.sweep_arms:
            _choice("sweep_arms", name, self.temporal)
        if self.sweep_arms and not self.sweep_k:
            raise UsageError("--sweep_arms needs the k to train them at: add --sweep_k")
        if not 0 <= self.term_warmup <= 1:
            raise UsageError(f"--term_warmup {self.term_warmup} is no share of the training steps: use 0 to 1")
        if not 0 < self.slow_fraction <= 1:
            raise UsageError(f"--slow_fraction {self.slow_fraction} must lie above 0 and at most at 1")
        if not self.lags or min(self.lags) < 1 or len(set(self.lags)) != len(self.lags):
            raise UsageError(f"--lags {as_flag(self.lags)} must be different whole numbers from 1 on")
        if not 0 < self.temperature < math.inf:
            raise UsageError(f"--temperature {self.temperature} must be a positive number")
        if not 0 < self.l1 < math.inf:
            raise UsageError(f"--l1 {self.l1} makes nothing sparse: use more than 0")
        if not 0 < self.release <= 1:
            raise UsageError(f"--release {self.release} must lie above 0 and at most at 1")
        for k in self.sweep_k:
            _at_least("sweep_k", k, 1)
        for window, coefficient in [(self.window, self.coefficient or 0.0), *self._parsed_grid()]:
            _at_least("grid window", window, 2)
            if not 0 <= coefficient < math.inf:
                why = "rewards flicker" if coefficient < 0 else "is no number"
                raise UsageError(f"coefficient {coefficient} {why}: use 0 or more")

    @property
    def grid_points(self) -> list[tuple[int, float]]:
        """(window, coefficient) of every member of the ablation; empty without one."""
        return self._parsed_grid() if self.ablation else []

    def _parsed_grid(self) -> list[tuple[int, float]]:
        try:
            windows, coefficients = self.grid.split("x")
            return [(int(w), float(c)) for w in windows.split(",") for c in coefficients.split(",")]
        except ValueError as error:
            raise UsageError(f"--grid {self.grid!r} is not WINDOWSxCOEFFICIENTS, such as 2,8,32x0.1,1") from error


@dataclass(frozen=True)
class EvaluationConfig:
    """How the SAEs are judged, on held-out text."""

    eval_rows: int = option(512, "held-out contexts for the consistency and core metrics")
    ce_rows: int = option(24, "held-out contexts for the language model's loss with the SAE spliced in")
    controls: tuple[str, ...] = option(
        CONTROLS, f"what is made of the baseline's codes without training, to compare with: {', '.join(CONTROLS)}"
    )

    def __post_init__(self) -> None:
        for name in self.controls:
            _choice("controls", name, CONTROLS)
        _at_least("eval_rows", self.eval_rows, 2)
        _at_least("ce_rows", self.ce_rows, 0)


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
        unknown = merged.keys() - {f.name for stage in stages().values() for f in dataclasses.fields(stage)}
        if unknown:
            raise UsageError(f"unknown option {', '.join(sorted(unknown))}: see --help")
        records = {
            name: stage(**{f.name: merged[f.name] for f in dataclasses.fields(stage) if f.name in merged})
            for name, stage in stages().items()
        }
        return cls(preset=preset, **records)

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dict for config.yaml; tuples become lists."""
        return _plain(dataclasses.asdict(self))


def stages() -> dict[str, type]:
    """The record of each stage, by its name in ExperimentConfig."""
    hints = typing.get_type_hints(ExperimentConfig)
    return {name: hint for name, hint in hints.items() if dataclasses.is_dataclass(hint) and isinstance(hint, type)}


def as_flag(value: Any) -> str:
    """A value as the command line takes it."""
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    return [_plain(entry) for entry in value] if isinstance(value, (tuple, list)) else value


def not_empty(name: str, value: str, what_to_do: str) -> None:
    """UsageError, saying what to do, where the value of a flag is blank."""
    if not value.strip():
        raise UsageError(f"--{name} is empty: {what_to_do}")


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise UsageError(f"--{name} {value} is too small: use {least} or more")


def _check_combination(name: str) -> None:
    parts = name.split("+")
    for part in parts:
        _choice("temporal", part, tuple(RECIPES))
    for kind in ("sparsity", "groups"):
        clash = [part for part in parts if RECIPES[part].kind == kind]
        if len(clash) > 1:
            raise UsageError(f"--temporal {name} asks for {' and '.join(clash)} at once: choose one of them")
    if len(set(parts)) < len(parts):
        raise UsageError(f"--temporal {name} names a part twice")


def _choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise UsageError(f"--{name} {value!r} is unknown: choose one of {', '.join(choices) or 'none, there are none'}")


@dataclass(frozen=True)
class RunOptions:
    """How a run is carried out: nothing its results depend on."""

    out_dir: str
    debug: bool = False
    resume: bool = False
    checkpoint_minutes: float = 5.0
    shard_latents: bool = False
    wandb: str = ""

    def __post_init__(self) -> None:
        not_empty("out_dir", self.out_dir, "name a folder")
        if not 0 <= self.checkpoint_minutes < math.inf:
            raise UsageError(f"--checkpoint_minutes {self.checkpoint_minutes} is no time: use 0 or more")


def parse(arguments: Sequence[str]) -> tuple[ExperimentConfig, RunOptions]:
    """What `experiment.py`'s command line asks for. Raises UsageError with one line for bad flags."""
    options = vars(_parser().parse_args(list(arguments)))
    run = RunOptions(**{f.name: options.pop(f.name) for f in dataclasses.fields(RunOptions)})
    return ExperimentConfig.from_options(options.pop("preset"), options), run


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}: see --help")


def _parser() -> _Parser:
    parser = _Parser(
        prog="experiment.py",
        description="Train a bank of SAEs on a language model's activations and judge them on held-out text.",
        allow_abbrev=False,
    )
    parser.add_argument("--out_dir", required=True, help="new folder for everything the run produces")
    parser.add_argument("--preset", default="demo", help=f"starting point for all options: {', '.join(PRESETS)}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on with the unfinished run in out_dir, as the same command does anyway; fails where there is none",
    )
    parser.add_argument(
        "--checkpoint_minutes",
        type=float,
        default=RunOptions.checkpoint_minutes,
        help="minutes of training between two saved states, 0 for every step (default: %(default)g)",
    )
    parser.add_argument(
        "--shard_latents",
        action="store_true",
        help="under torchrun: each process holds a part of every SAE's latents, as it does anyway where SAEs fit into "
        "memory in no other way; the last bits then depend on how many there are",
    )
    parser.add_argument(
        "--wandb", default="", metavar="PROJECT", help="log to this Weights & Biases project too (WANDB_MODE=offline)"
    )
    for stage in stages().values():
        group = parser.add_argument_group(stage.__name__, (stage.__doc__ or "").strip())
        hints = typing.get_type_hints(stage)
        for f in dataclasses.fields(stage):
            text, kind = f.metadata["help"], {"type": _reader(hints[f.name])}
            if hints[f.name] is bool:
                kind = {"action": argparse.BooleanOptionalAction}
            elif f.default is not None:
                text += f" (default: {as_flag(f.default)})"
            group.add_argument(f"--{f.name}", default=argparse.SUPPRESS, help=text, **kind)
    return parser


def _reader(hint: Any) -> Any:
    """A function from a flag's text to a field's type; argparse calls what it reads by the function's name."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        hint = next(part for part in typing.get_args(hint) if part is not type(None))
    if typing.get_origin(hint) is tuple:
        element = _reader(typing.get_args(hint)[0])

        def read(text: str) -> tuple[Any, ...]:
            return tuple(element(part) for part in text.split(",") if part.strip())

        read.__name__ = f"comma-separated {element.__name__}"
        return read
    return integer if hint is int else hint


def integer(text: str) -> int:
    """A whole number, which may have underscores; argparse names this function where it is none."""
    return int(text.replace("_", ""))
