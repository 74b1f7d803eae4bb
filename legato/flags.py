"""The command line of experiment.py: a flag for every field of the configuration, and how the run is carried out."""

import argparse
import dataclasses
import math
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from legato.config import ExperimentConfig, as_flag, not_empty, stages
from legato.errors import UsageError
from legato.presets import PRESETS


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
