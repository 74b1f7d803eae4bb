"""Passes and ranks of a bank of SAEs, so that it fits into memory."""

import os
from collections.abc import Sequence

import psutil
import torch

from legato.common import distributed
from legato.common.errors import LegatoError, UsageError
from legato.common.hardware import fast_matmul_dtype
from legato.common.progress import log
from legato.sae.partition import SINGLE, Partition, Sharded, T, block_of
from legato.training.config import SAEConfig


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
    log(f"memory: the bank needs {sum(needs) / 2**30:.1f} GiB{divided_over}, {free / 2**30:.1f} GiB are free")
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
