"""The whole experiment, one call per stage:  legato run --out_dir=run_1   (python experiment.py is the same)"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from legato.common import distributed
from legato.common.command import Interrupts
from legato.common.command_line import Command, Task, call
from legato.common.errors import LegatoError
from legato.common.hardware import keep_freed_memory
from legato.common.progress import log
from legato.common.record import fields_of
from legato.experiment.arms import planned_arms
from legato.experiment.checkpoint import Checkpoint
from legato.experiment.config import STAGES, ExperimentConfig, RunOptions
from legato.experiment.evaluate import evaluate_arms, post_hoc
from legato.experiment.inputs import harvest_activations, layer_of, load_model, read_text
from legato.experiment.train import train_arms
from legato.report.build import build_outputs
from legato.results.integrity import write_checksums
from legato.results.run_dir import RunDir
from legato.training.bank import check_shards


@distributed.process_group()
def run_experiment(config: ExperimentConfig, options: RunOptions, interrupts: Interrupts) -> None:
    if options.shard_latents:
        distributed.broadcast_from_rank0(lambda: check_shards(config.training.d_sae))
    run = distributed.broadcast_from_rank0(lambda: RunDir.claim(options.out_dir, config, resume=options.resume))
    run.settle_machine(config.model.dtype)
    model = load_model(config.model, config.data.context_length, splice=bool(config.evaluation.ce_rows))
    width = model.site(layer_of(config.model, model), config.model.site).width
    planned = planned_arms(config, width)
    text = distributed.broadcast_from_rank0(lambda: read_text(config, model))
    activations = harvest_activations(config, model, text)
    with distributed.held_by_rank0(run.locked(config)):
        checkpoint = Checkpoint(run.checkpoint, minutes=options.checkpoint_minutes, interrupts=interrupts)
        checkpoint.start(activations.key, lambda: run.begin(config, activations.provenance))
        bank = train_arms(
            planned, config, activations, run, checkpoint, wandb=options.wandb, shard_latents=options.shard_latents
        )
        controls = partial(post_hoc, config, bank, activations)
        evaluate_arms(config.evaluation, bank, activations, model, run, checkpoint, controls)
        if not distributed.is_rank0():
            return
        outputs = build_outputs(run.root)
        write_checksums(run.root)
        checkpoint.discard()
    log(outputs.notes.read_text())
    log(f"results: {run.root}/  report: {outputs.report}")
    if bank.failures:
        raise LegatoError(f"{len(bank.failures)} arms failed ({', '.join(bank.failures)}): see {run.root}/failed")


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
