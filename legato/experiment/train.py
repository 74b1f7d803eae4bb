"""Training stage of experiment.py: train the bank in one or several passes, save it, continue after a stop."""

import dataclasses
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from typing import Any

from legato.common import distributed
from legato.common.errors import LegatoError
from legato.common.files import Manifest
from legato.common.hardware import fast_matmul_dtype
from legato.common.progress import log, progress_bar
from legato.data.activations import Normaliser
from legato.experiment.arms import PlannedArm
from legato.experiment.checkpoint import Checkpoint, Progress, cut
from legato.experiment.config import ExperimentConfig
from legato.experiment.evaluate import CALIBRATION_BATCHES, Bank, TrainedArm
from legato.experiment.inputs import Activations
from legato.experiment.run_log import RunLog, WandbLog
from legato.results.run_dir import RunDir, environment
from legato.sae.autoencoder import SparseAutoencoder
from legato.training.bank import BankState, NoMemberLeftError, divided, planned, train_on
from legato.training.config import SAEConfig, TrainConfig
from legato.training.step import TrainBatch
from legato.training.trainer import SAETrainer

DEAD_AFTER_TOKENS, DEAD_AFTER_SHARE = 250_000, 0.02  # silence that makes a latent dead: in tokens, or of a short run


def train_arms(
    planned: Sequence[PlannedArm],
    config: ExperimentConfig,
    activations: Activations,
    run: RunDir,
    checkpoint: Checkpoint,
    *,
    wandb: str = "",
    shard_latents: bool = False,
) -> Bank:
    """Train the bank on shared batches and save every SAE; in several passes where it does not fit in memory. Several
    ranks train a share of the members each, or a share of the latents of those that would not fit otherwise.

    SAEs that an earlier attempt has trained are opened; unfinished ones continue from the checkpoint.
    wandb: the Weights & Biases project to send the steps to as well, if any. shard_latents: divide the latents of
    every member.
    """
    wanted = {one.arm.name: one for one in planned}
    checkpoint.progress = distributed.broadcast_from_rank0(lambda: _progress_found(run, checkpoint))
    trained = {name: _opened(run, wanted[name], record) for name, record in checkpoint.progress.trained.items()}
    missing = [
        one.sae for name, one in wanted.items() if name not in trained and name not in checkpoint.progress.failed
    ]
    if missing:
        stage = _Stage.of(wanted, config, activations)
        saved = checkpoint.read_bank(missing, stage.train_config, shard_latents=shard_latents)
        going_on = distributed.gather_dicts({one.arm.name: None for one in saved.trainers}) if saved else {}
        if distributed.is_rank0():
            cut(run.log, saved.log_bytes if saved else checkpoint.progress.log_bytes)
            anew = [arm.name for arm in missing if arm.name not in going_on]
            run.forget_log(anew)  # removes something only where a trained SAE was damaged
            for name in anew:
                shutil.rmtree(run.tensorboard / name, ignore_errors=True)
        for state in _passes(missing, saved, stage, shard_latents):
            tracker = WandbLog(wandb, run.root) if wandb and distributed.is_rank0() else None
            trained |= _train_pass(state, stage, run, checkpoint, tracker)
    failures = {name: failure["reason"] for name, failure in checkpoint.progress.failed.items()}
    if not trained:
        checkpoint.discard()  # the next attempt begins anew
        raise LegatoError(f"no SAE was trained: {next(iter(failures.values()))}")
    return Bank({name: trained[name] for name in wanted if name in trained}, failures)


@dataclass(frozen=True)
class _Stage:
    """Inputs that all passes share. calibration: contexts in stored order, the same for every arm and seed."""

    planned: Mapping[str, PlannedArm]
    config: ExperimentConfig
    activations: Activations
    train_config: TrainConfig
    normaliser: Normaliser
    calibration: list[TrainBatch]
    tokens_per_step: float

    @classmethod
    def of(cls, planned: Mapping[str, PlannedArm], config: ExperimentConfig, activations: Activations) -> "_Stage":
        training, source = config.training, activations.train
        tokens_per_step = training.batch_rows * activations.n_valid / source.n_rows
        train_config = TrainConfig(
            steps=math.ceil(training.tokens / tokens_per_step),
            lr=training.lr,
            dead_after_tokens=min(DEAD_AFTER_TOKENS, int(DEAD_AFTER_SHARE * training.tokens)),
            aux_k=source.d_in // 2,
        )
        normaliser = Normaliser.fit(source)
        calibration = [
            TrainBatch.of(batch, normaliser, fast_matmul_dtype())
            for batch in islice(source.batches(training.batch_rows, seed=None), CALIBRATION_BATCHES)
        ]
        return cls(planned, config, activations, train_config, normaliser, calibration, tokens_per_step)


def _progress_found(run: RunDir, checkpoint: Checkpoint) -> Progress:
    """Return the progress of an earlier attempt; name SAEs whose files have changed, to be trained again."""
    progress = checkpoint.progress
    for name, record in list(progress.trained.items()):
        folder = run.sae(name)
        if Manifest.of(folder).sha256 != record["files"]:
            log(f"{folder} is missing or damaged: it is trained again")
            del progress.trained[name]
    for name, failure in progress.failed.items():  # if the earlier attempt stopped before it moved it
        run.fail_sae(name, failure["steps"], failure["reason"])
    return progress


def _opened(run: RunDir, planned: PlannedArm, record: Mapping[str, Any]) -> TrainedArm:
    return TrainedArm(planned.arm, SparseAutoencoder.load(run.sae(planned.arm.name)), record["training"])


def _passes(
    missing: Sequence[SAEConfig], saved: BankState | None, stage: _Stage, shard_latents: bool
) -> Iterator[BankState]:
    """Yield the banks to train, this rank's part of each: the saved one first."""
    source, training = stage.activations.train, stage.config.training
    started = distributed.gather_dicts(dict.fromkeys(saved.names, None)) if saved else {}
    new = [arm for arm in missing if arm.name not in started]
    passes = distributed.broadcast_from_rank0(
        lambda: planned(new, source.d_in, training.batch_rows * source.context_length, shard_latents)
    )
    log(
        f"training: {len(missing)} SAEs of {training.d_sae:,} latents in {len(passes) + bool(saved)} pass(es), "
        f"{stage.train_config.steps} steps of {stage.tokens_per_step:,.0f} tokens"
    )
    if saved:
        log(f"going on with {len(started)} of them after step {saved.step}")
        yield saved
    for members, sharded in passes:
        own, partition = divided(members, sharded=sharded)
        yield BankState.new(
            own, stage.train_config, source.d_in, elsewhere=len(members) - len(own), partition=partition
        )


def _train_pass(
    state: BankState, stage: _Stage, run: RunDir, checkpoint: Checkpoint, tracker: WandbLog | None
) -> dict[str, TrainedArm]:
    """Train one bank to the end and save its SAEs."""
    training, steps = stage.config.training, stage.train_config.steps
    batches = stage.activations.train.batches(
        training.batch_rows, seed=min(training.seeds), epochs=None, drop_last=True, start_batch=state.step
    )
    interrupts = checkpoint.interrupts
    with (
        interrupts.held_back(),
        RunLog(run.log, run.tensorboard, list(stage.planned), state.step, tracker) as run_log,
        progress_bar("train", steps) as progress,
    ):

        def after_step(bank: BankState) -> None:
            progress(bank.step)
            if (bank.step - 1) % stage.train_config.log_every == 0:
                run_log.flush()
            checkpoint.after_step(bank, run_log.sync)

        with suppress(NoMemberLeftError):  # of this pass; the others may succeed
            train_on(
                state,
                batches,
                stage.normaliser,
                stage.train_config,
                log=run_log if state.is_kept_here else lambda record: None,
                after_step=after_step,
            )
        saved = {trainer.arm.name: _save(trainer, stage, run) for trainer in state.finished}
        own = {name: arm for name, arm in saved.items() if arm is not None}
        for trainer, reason in state.failed:
            parameters = trainer.whole_parameters()
            if state.is_kept_here:
                run.write_failure(trainer.arm.name, dict(parameters.items()), trainer.steps_done, reason)
        ranks = distributed.gather_dicts(
            {
                "trained": {
                    name: {"training": arm.training, "files": Manifest.of(run.sae(name)).sha256}
                    for name, arm in own.items()
                },
                "failed": {
                    trainer.arm.name: {"steps": trainer.steps_done, "reason": reason}
                    for trainer, reason in state.failed
                },
            }
        )
        for failure in ranks["failed"].values():
            log(f"  dropped {failure['reason']}")
        done = checkpoint.progress
        done.log_bytes = run_log.sync()
        done.failed |= ranks["failed"]
        done.trained |= ranks["trained"]
        checkpoint.write_progress()
        checkpoint.drop_steps()
    others = {name: record for name, record in ranks["trained"].items() if name not in own}
    return own | {name: _opened(run, stage.planned[name], record) for name, record in others.items()}


def _save(trainer: SAETrainer, stage: _Stage, run: RunDir) -> TrainedArm | None:
    """Save the finished SAE and open it again, since the saved one is judged. Of ranks that trained it together only
    the first does; the others return None."""
    finished = trainer.finish_on_first(stage.normaliser, stage.calibration)
    if finished is None:
        return None
    if not math.isfinite(trainer.final_loss):
        raise LegatoError(f"{trainer.arm.name}: the final loss is {trainer.final_loss}: training failed")
    arm = stage.planned[trainer.arm.name].arm
    training = {**dataclasses.asdict(stage.train_config), "batch_rows": stage.config.training.batch_rows}
    details: Mapping[str, Any] = {
        **stage.activations.provenance,
        "arm": arm.name,
        "objective": arm.saved(),
        "training": training,
        "environment": environment(),
    }
    path = dataclasses.replace(finished, details=details).save(run.sae(arm.name))
    metrics = {
        "training_steps": trainer.steps_done,
        "steps_skipped": trainer.guard.skipped,
        "final_loss": trainer.final_loss,
        "tokens": trainer.tokens_seen,
        "epochs": trainer.tokens_seen / stage.activations.n_valid,
        "wall_seconds": trainer.seconds,
        "dead_at_end": int(trainer.dead_F.sum()),
    }
    return TrainedArm(arm, SparseAutoencoder.load(path), metrics)
