"""The command `legato run`, and experiment.py: the flags become the configuration before anything slow is imported."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from legato.common.command import Interrupts
from legato.common.command_line import Command, Task, call
from legato.common.hardware import keep_freed_memory
from legato.common.progress import log
from legato.common.record import fields_of
from legato.data.model_files import check_name
from legato.experiment.config import STAGES, ExperimentConfig, RunOptions


@dataclass(frozen=True)
class Experiment(Task):
    config: ExperimentConfig
    options: RunOptions
    go_on: ClassVar[str] = "the same command goes on where it stopped"

    @classmethod
    def of(cls, **given: Any) -> "Experiment":
        """Make the task from the flags of `legato run` that were given."""
        options = RunOptions(**{key: given.pop(key) for key in fields_of(RunOptions) if key in given})
        return cls(ExperimentConfig.from_options(options.preset, given), options)

    def run(self, interrupts: Interrupts) -> None:
        check_name(self.config.model.model)
        log("loading libraries")
        from legato.experiment.run import run_experiment

        keep_freed_memory()
        run_experiment(self.config, self.options, interrupts)


COMMAND = Command(
    "run",
    "Train SAEs on a model's activations, and judge them.",
    Experiment.of,
    {"The run": RunOptions, **{(stage.__doc__ or "").rstrip("."): stage for stage in STAGES.values()}},
)


def main(arguments: Sequence[str] | None = None, program: str = "experiment.py") -> int:
    return call(COMMAND, arguments, program)
