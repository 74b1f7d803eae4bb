"""The one training loop: a bank of SAEs that learn from the same activation batches, in passes and ranks that fit into
memory.

Shape legend: B rows, L positions, N = B * L flat tokens, D width, F latents, P / Q active pairs by token / by latent.
"""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import psutil
import torch

from legato.common import distributed
from legato.common.errors import LegatoError, UsageError
from legato.common.hardware import fast_matmul_dtype
from legato.common.progress import log as say
from legato.data.activations import ActivationBatch, Normaliser, position_shuffled
from legato.sae.partition import SINGLE, Partition, Sharded, T, block_of
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


def check_shards(n_latents: int) -> None:
    """Raises UsageError where an SAE's latents cannot be divided over the ranks there are."""
    if distributed.world_size() == 1:
        raise UsageError("--shard_latents divides SAEs over processes: start them with torchrun --nproc_per_node=2")
    Sharded(distributed.rank(), distributed.world_size()).local(n_latents)


def divided(members: Sequence[T], *, sharded: bool = False) -> tuple[list[T], Partition]:
    """Divide a bank over the ranks: this rank's members, and its share of each one's steps. Where there are enough,
    each rank has members of its own, which costs nothing; else all ranks train every member together. sharded: each
    holds a part of every member, where there are several ranks.
    """
    rank, size = distributed.rank(), distributed.world_size()
    if sharded and size > 1:
        return list(members), Sharded(rank, size)
    if len(members) >= size:
        return distributed.shard(members), SINGLE
    return list(members), Partition(rank, size)


def bank_bytes(arms: Sequence[SAEConfig], d_in: int, tokens_per_batch: int, shards: int = 1) -> list[int]:
    """Memory that training each arm takes: weights and Adam's moments in float32, the encoder once more in the matmul's
    dtype, and its part of the shared buffers if it is the widest (pre-activations, gradients). shards: ranks that its
    latents are divided over; it is then what one of them needs."""
    low = torch.finfo(fast_matmul_dtype()).bits // 8
    held = [block_of(arm.d_sae, shards) for arm in arms]
    batch = (3 if shards == 1 else 6) * tokens_per_batch * d_in * 4  # with the parts of the sum over the ranks
    shared = tokens_per_batch * max(held) * low + 2 * max(held) * d_in * 4 + batch
    return [shared // len(arms) + n_latents * d_in * (6 * 4 + low) for n_latents in held]


MEMORY_SHARE = 0.6  # of what is free, for training; the rest is left to the store's page cache and to evaluation


def planned(
    bank: Sequence[SAEConfig], d_in: int, tokens_per_batch: int, shard_latents: bool
) -> list[tuple[list[SAEConfig], bool]]:
    """Passes, and whether the latents of their members are divided over the ranks: those of SAEs that do not fit
    otherwise, or of all. Raises LegatoError where one does not fit either way."""
    ranks = distributed.world_size()
    here = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if ranks > 1 else 1  # processes of this run on this machine
    limit = MEMORY_SHARE * psutil.virtual_memory().available

    def copies(members: Sequence[SAEConfig]) -> int:
        return 1 if len(members) >= ranks else here

    def too_wide(members: Sequence[SAEConfig]) -> list[SAEConfig]:
        whole = {arm: bank_bytes([arm], d_in, tokens_per_batch)[0] for arm in members}
        return [arm for arm, need in whole.items() if ranks > 1 and copies(members) * need > limit]

    together = [] if shard_latents else list(bank)
    while wide := too_wide(together):
        together = [arm for arm in together if arm not in wide]
    sharded = [arm for arm in bank if arm not in together]
    return [
        *((members, False) for members in split_to_fit(together, d_in, tokens_per_batch, copies=copies(together))),
        *((members, True) for members in split_to_fit(sharded, d_in, tokens_per_batch, copies=here, shards=ranks)),
    ]


def split_to_fit(
    bank: Sequence[SAEConfig], d_in: int, tokens_per_batch: int, *, copies: int = 1, shards: int = 1
) -> list[list[SAEConfig]]:
    """The bank in as few passes as fit into 60 % of the free memory; says what it needs. copies: ranks on this machine
    that hold all of it, or its part where the latents are divided over `shards` ranks."""
    if not bank:
        return []
    free = psutil.virtual_memory().available
    needs = [copies * need for need in bank_bytes(bank, d_in, tokens_per_batch, shards)]
    divided_over = f", its latents divided over {shards} ranks" if shards > 1 else ""
    say(f"memory: the bank needs {sum(needs) / 2**30:.1f} GiB{divided_over}, {free / 2**30:.1f} GiB are free")
    passes: list[list[SAEConfig]] = [[]]
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
