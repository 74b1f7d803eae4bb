"""The one training loop: a bank of SAEs that learn from the same activation batches.

Shape legend: B rows, L positions, N = B * L flat tokens, D width, F latents, P / Q active pairs by token / by latent.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from legato.common.errors import LegatoError
from legato.common.hardware import fast_matmul_dtype
from legato.data.activations import ActivationBatch, Normaliser, position_shuffled
from legato.sae.partition import SINGLE, Partition
from legato.training.config import SAEConfig, TrainConfig
from legato.training.step import TrainBatch, Workspace
from legato.training.trainer import SAETrainer


@dataclass
class BankState:
    """A bank between two steps: the members in training, those that failed and why (their state is that of the last
    good step), and the steps it has done.

    Of a bank that is spread over several ranks: this rank's members; elsewhere: how many are in training on others.
    partition: of ranks that train every member together, this one's part; its members are then all there are.
    log_bytes: length of log.jsonl when it was saved, of one that a checkpoint held.
    """

    trainers: list[SAETrainer]
    failed: list[tuple[SAETrainer, str]] = field(default_factory=list)
    step: int = 0
    elsewhere: int = 0
    partition: Partition = SINGLE
    log_bytes: int = 0

    @classmethod
    def new(
        cls,
        arms: Sequence[SAEConfig],
        config: TrainConfig,
        d_in: int,
        *,
        elsewhere: int = 0,
        partition: Partition = SINGLE,
    ) -> "BankState":
        workspace = Workspace()
        trainers = [SAETrainer(arm, config, d_in, workspace, partition) for arm in arms]
        return cls(trainers, elsewhere=elsewhere, partition=partition)

    @property
    def is_kept_here(self) -> bool:
        """Tell if this rank writes and reports its members: of ranks that have the same ones, the first does."""
        return self.partition.rank == 0

    @property
    def names(self) -> list[str]:
        return [trainer.arm.name for trainer in (*self.trainers, *(trainer for trainer, _ in self.failed))]

    @property
    def finished(self) -> list[SAETrainer]:
        """The members in training, once all steps are done."""
        return self.trainers

    def drop(self, trainer: SAETrainer, error: LegatoError) -> None:
        """Take a member out that went wrong."""
        self.trainers.remove(trainer)
        self.failed.append((trainer, str(error)))


class NoMemberLeftError(LegatoError):
    """Every member of a bank failed."""


def train_bank(
    arms: Sequence[SAEConfig],
    batches: Iterable[ActivationBatch],
    normaliser: Normaliser,
    config: TrainConfig,
    *,
    log: Callable[[Mapping[str, Any]], None],
) -> BankState:
    """Train every arm on the same `config.steps` batches.

    A member whose numbers go wrong is dropped and reported; the others go on. Raises NoMemberLeftError when none is
    left, LegatoError when the batches run out.
    """
    bank = BankState.new(arms, config, normaliser.mean_D.numel())
    return train_on(bank, batches, normaliser, config, log=log, after_step=lambda state: None)


def train_on(
    bank: BankState,
    batches: Iterable[ActivationBatch],
    normaliser: Normaliser,
    config: TrainConfig,
    *,
    log: Callable[[Mapping[str, Any]], None],
    after_step: Callable[[BankState], None],
) -> BankState:
    """Train a bank from the step where it stands: the first of the batches belongs to its step `bank.step`.

    after_step: called whenever all members have done a step or failed; all that the next steps depend on is in the
    bank.
    """
    dtype, stream = fast_matmul_dtype(), iter(batches)
    for step in range(bank.step, config.steps):
        raw = next(stream, None)
        if raw is None:
            raise LegatoError(f"the activations ran out after {step} of {config.steps} steps: harvest more tokens")
        batch = TrainBatch.of(raw, normaliser, dtype)
        if any(trainer.arm.shuffle_positions for trainer in bank.trainers):
            shuffled = TrainBatch.of(next(position_shuffled([raw], seed=step)), normaliser, dtype)
        logged = step % config.log_every == 0 or step == config.steps - 1
        for trainer in list(bank.trainers):
            try:
                record = trainer.step(shuffled if trainer.arm.shuffle_positions else batch)
            except LegatoError as error:
                bank.drop(trainer, error)
                continue
            if logged or "skipped_because" in record:
                log(record)
        bank.step = step + 1
        after_step(bank)
        if not bank.trainers and not bank.elsewhere:
            raise NoMemberLeftError(bank.failed[-1][1] if bank.failed else "all failed on other ranks")
    return bank
