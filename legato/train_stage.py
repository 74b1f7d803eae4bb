"""The training stage of experiment.py: the bank in one or several passes, saved, and gone on with after a cut."""

import dataclasses
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import psutil

from legato.activations import Normaliser
from legato.checkpoint import Checkpoint, SavedBank, checksums, cut
from legato.config import ExperimentConfig
from legato.errors import LegatoError
from legato.experiment import CALIBRATION_BATCHES, Activations, Bank, TrainedArm
from legato.hardware import fast_matmul_dtype
from legato.recipes import arms, recipe
from legato.run_dir import RunDir, environment
from legato.sae import SparseAutoencoder
from legato.tracking import RunLog, progress_bar, say
from legato.train import (
    ArmConfig,
    BankResult,
    BankState,
    NoMemberLeftError,
    SAETrainer,
    TrainBatch,
    TrainConfig,
    bank_bytes,
    train_on,
)
from legato.wandb_log import WandbLog

DEAD_AFTER_TOKENS, DEAD_AFTER_SHARE = 250_000, 0.02  # silence that makes a latent dead: in tokens, or of a short run
MEMORY_SHARE = 0.6  # of what is free, for training; the rest is left to the store's page cache and to evaluation


def train_arms(
    config: ExperimentConfig, activations: Activations, run: RunDir, checkpoint: Checkpoint, *, wandb: str = ""
) -> Bank:
    """Train the bank on shared batches and save every SAE; in several passes where it would not fit in memory.

    What an earlier attempt has trained is opened, what it was training goes on from the checkpoint.
    wandb: the Weights & Biases project that the steps are sent to as well, if any.
    """
    wanted = arms(config, activations.train.d_in)
    trained = _trained_before(run, checkpoint)
    for name, failure in checkpoint.progress.failed.items():  # where the earlier attempt was cut off before it moved it
        run.fail_sae(name, failure["steps"], failure["reason"])
    missing = [arm for arm in wanted if arm.name not in trained and arm.name not in checkpoint.progress.failed]
    if missing:
        stage = _Stage.of(config, activations)
        saved = checkpoint.read_bank(missing, stage.train_config)
        _cut_logs(run, checkpoint, missing, saved)
        for state in _passes(missing, saved, stage, config):
            tracker = WandbLog(wandb, run.root) if wandb else None
            trained |= _train_pass(state, stage, run, checkpoint, tracker)
        checkpoint.drop_steps()
    failures = {name: failure["reason"] for name, failure in checkpoint.progress.failed.items()}
    if not trained:
        checkpoint.discard()  # the next attempt begins anew
        raise LegatoError(f"no SAE was trained: {next(iter(failures.values()))}")
    return Bank({arm.name: trained[arm.name] for arm in wanted if arm.name in trained}, failures)


@dataclass(frozen=True)
class _Stage:
    """What all passes share. calibration: contexts in stored order, the same ones for every arm, whatever the seed."""

    config: ExperimentConfig
    activations: Activations
    train_config: TrainConfig
    normaliser: Normaliser
    calibration: list[TrainBatch]
    tokens_per_step: float

    @classmethod
    def of(cls, config: ExperimentConfig, activations: Activations) -> "_Stage":
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
        return cls(config, activations, train_config, normaliser, calibration, tokens_per_step)


def _trained_before(run: RunDir, checkpoint: Checkpoint) -> dict[str, TrainedArm]:
    """The SAEs that an earlier attempt trained; one whose files have changed since is named and trained again."""
    trained, progress = {}, checkpoint.progress
    for name, record in list(progress.trained.items()):
        folder = run.sae(name)
        if folder.is_dir() and checksums(folder) == record["files"]:
            trained[name] = TrainedArm(SparseAutoencoder.load(folder), record["training"])
        else:
            say(f"{folder} is missing or damaged: it is trained again")
            del progress.trained[name]
            run.forget_log(name)
            progress.log_bytes = run.log.stat().st_size
    return trained


def _cut_logs(run: RunDir, checkpoint: Checkpoint, missing: Sequence[ArmConfig], saved: SavedBank | None) -> None:
    """Take out of the logs what is trained again."""
    going_on = {trainer.arm.name for trainer in saved.bank.trainers} if saved else set()
    cut(run.log, saved.log_bytes if saved else checkpoint.progress.log_bytes)
    for arm in missing:
        if arm.name not in going_on:
            shutil.rmtree(run.tensorboard / arm.name, ignore_errors=True)


def _passes(
    missing: Sequence[ArmConfig], saved: SavedBank | None, stage: _Stage, config: ExperimentConfig
) -> Iterator[BankState]:
    """Banks to train, one after the other: the saved one first."""
    source, training = stage.activations.train, config.training
    started = {*saved.bank.names} if saved else set()
    passes = split_to_fit(
        [arm for arm in missing if arm.name not in started], source.d_in, training.batch_rows * source.context_length
    )
    say(
        f"training: {len(missing)} SAEs of {training.d_sae:,} latents in {len(passes) + bool(saved)} pass(es), "
        f"{stage.train_config.steps} steps of {stage.tokens_per_step:,.0f} tokens"
    )
    if saved:
        say(f"going on with {len(started)} of them after step {saved.bank.step}")
        yield saved.bank
    for members in passes:
        yield BankState.new(members, stage.train_config, source.d_in)


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
        RunLog(run.log, run.tensorboard, steps_done=state.step, also=tracker) as log,
        progress_bar("train", steps) as progress,
    ):

        def after_step(bank: BankState) -> None:
            progress(bank.step)
            checkpoint.after_step(bank, log.sync)

        try:
            result = train_on(state, batches, stage.normaliser, stage.train_config, log=log, after_step=after_step)
        except NoMemberLeftError as error:  # of this pass; the others may be well
            result = BankResult([], error.failed)
        trained = {trainer.arm.name: _save(trainer, stage, run) for trainer in result.finished}
        for trainer, reason in result.failed:
            run.write_failure(trainer.arm.name, dict(trainer.parameters.items()), trainer.steps_done, reason)
            say(f"  dropped {reason}")
        done = checkpoint.progress
        done.log_bytes = log.sync()
        done.failed |= {trainer.arm.name: _failure(trainer.steps_done, reason) for trainer, reason in result.failed}
        done.trained |= {
            name: {"training": arm.training, "files": checksums(run.sae(name))} for name, arm in trained.items()
        }
        checkpoint.write_progress()
    return trained


def _failure(steps: int, reason: str) -> dict[str, Any]:
    return {"steps": steps, "reason": reason}


def _save(trainer: SAETrainer, stage: _Stage, run: RunDir) -> TrainedArm:
    """The finished SAE as it lies on the disk, which is what is judged."""
    training = {**dataclasses.asdict(stage.train_config), "batch_rows": stage.config.training.batch_rows}
    details: Mapping[str, Any] = {
        **stage.activations.provenance,
        "arm": trainer.arm.name,
        "objective": recipe(trainer.arm),
        "training": training,
        "environment": environment(),
    }
    sae = dataclasses.replace(trainer.finish(stage.normaliser, stage.calibration), details=details)
    path = sae.save(run.sae(trainer.arm.name))
    return TrainedArm(SparseAutoencoder.load(path), _training_metrics(trainer, stage.activations.n_valid))


def _training_metrics(trainer: SAETrainer, n_valid: int) -> dict[str, Any]:
    if not math.isfinite(trainer.final_loss):
        raise LegatoError(f"{trainer.arm.name}: the final loss is {trainer.final_loss}: training failed")
    return {
        "training_steps": trainer.steps_done,
        "steps_skipped": trainer.guard.skipped,
        "final_loss": trainer.final_loss,
        "tokens": trainer.tokens_seen,
        "epochs": trainer.tokens_seen / n_valid,
        "wall_seconds": trainer.seconds,
        "dead_at_end": int(trainer.dead_F.sum()),
        "recipe": recipe(trainer.arm),
    }


def split_to_fit(bank: Sequence[ArmConfig], d_in: int, tokens_per_batch: int) -> list[list[ArmConfig]]:
    """The bank in as few passes as fit into 60 % of the free memory; says what it needs."""
    if not bank:
        return []
    free = psutil.virtual_memory().available
    needs = bank_bytes(bank, d_in, tokens_per_batch)
    say(f"memory: the bank needs {sum(needs) / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free")
    passes: list[list[ArmConfig]] = [[]]
    used = 0
    for arm, need in zip(bank, needs, strict=True):
        if need > MEMORY_SHARE * free:
            raise LegatoError(f"{arm.name} needs {need / 2**30:.1f} GiB to train: lower --d_sae or free memory")
        if used + need > MEMORY_SHARE * free:
            passes.append([])
            used = 0
        passes[-1].append(arm)
        used += need
    return passes
