"""Several processes as one run, where `torchrun` started them. One process is the usual case: nothing is sent then.

Rank 0 is the writer: only rank 0 prints, and writes the files of the run. When a rank fails or is killed, its
connections close and the others stop with RankLostError; a rank that hangs is given up after PATIENCE. Objects
travel between the ranks as pickles; files never hold pickles.
"""

import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Generic, TypeVar

import numba
import torch
import torch.distributed as dist

from legato.common.errors import LegatoError, SaidElsewhereError, UsageError

T = TypeVar("T")
PATIENCE = "LEGATO_PATIENCE_SECONDS"  # how long ranks wait for each other
DEFAULT_PATIENCE_SECONDS = 3600.0


class RankLostError(LegatoError):
    """Another rank was killed, failed or hangs."""


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", 0))


def world_size() -> int:
    """Return the number of processes of this run."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_rank0() -> bool:
    return rank() == 0


def _patience() -> float:
    text = os.environ.get(PATIENCE, DEFAULT_PATIENCE_SECONDS)
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 1e7:
        raise UsageError(f"{PATIENCE}={text} is no number of seconds")
    return seconds


@contextmanager
def rank_errors() -> Iterator[None]:
    """Wrap calls of torch.distributed: raise RankLostError where another rank is gone."""
    try:
        yield
    except RuntimeError as error:  # what torch.distributed raises for every way in which a peer can be gone
        slow = "timed out waiting" in str(error).lower()
        what = f"has not answered for {_patience():g} s" if slow else "failed or was killed"
        raise RankLostError(
            f"rank {os.environ.get('RANK', 0)} stops because another one {what}: the same command goes on where it "
            "stopped"
        ) from error


@contextmanager
def process_group() -> Iterator[None]:
    """Make the processes that torchrun started the ranks of one run; without torchrun do nothing.

    Raises RankLostError where they do not find each other.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield
        return
    # The machine's processors are shared, unless OMP_NUM_THREADS is above the 1 that torchrun sets.
    asked = os.environ.get("OMP_NUM_THREADS", "1")
    share = max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    own = int(asked) if asked.isdigit() and int(asked) > 1 else share
    torch.set_num_threads(own)
    numba.set_num_threads(min(own, numba.get_num_threads()))
    with rank_errors():
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
        patience = timedelta(seconds=_patience())
        store, rank, size = next(dist.rendezvous("env://", timeout=patience))
        # torchrun keeps its store when it restarts the ranks: they must not find the addresses of the dead ones.
        store = dist.PrefixStore(f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=patience)
    yield
    dist.destroy_process_group()  # after an error the end of the process does it, which tells the others


def gather(mine: T) -> list[T]:
    """Return the objects of all ranks, in their order, on every rank."""
    if world_size() == 1:
        return [mine]
    blobs = gather_bytes(torch.frombuffer(bytearray(pickle.dumps(mine)), dtype=torch.uint8))
    return [pickle.loads(blob.numpy().tobytes()) for blob in blobs]


def gather_bytes(mine: torch.Tensor) -> list[torch.Tensor]:
    """Return the uint8 tensors (any lengths) of all ranks, in their order, on every rank."""
    with rank_errors():
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(world_size())]
        dist.all_gather(lengths, torch.tensor([len(mine)]))
        longest = max(int(length) for length in lengths)
        padded = torch.zeros(longest, dtype=torch.uint8)
        padded[: len(mine)] = mine
        blobs = [torch.empty_like(padded) for _ in lengths]
        dist.all_gather(blobs, padded)
    return [blob[: int(length)] for blob, length in zip(blobs, lengths, strict=True)]


def broadcast_from_rank0(compute: Callable[[], T]) -> T:
    """Run `compute` on the writer only and return its result on every rank.

    Where it raises, the others raise SaidElsewhereError.
    """
    if world_size() == 1:
        return compute()
    outcome: list[Any] = [None, True]
    failure: BaseException | None = None
    if is_rank0():
        try:
            outcome[0] = compute()
        except BaseException as error:
            failure, outcome = error, [None, False]
    with rank_errors():
        dist.broadcast_object_list(outcome, src=0)
    if failure is not None:
        raise failure
    if not outcome[1]:
        raise SaidElsewhereError("rank 0 failed")
    return outcome[0]


def rank0_first(compute: Callable[[], T]) -> T:
    """Run `compute` on every rank, on the writer first: the others find the files it fetched. Where it raises on the
    writer, they raise SaidElsewhereError."""
    own: list[T] = []
    broadcast_from_rank0(lambda: own.append(compute()))
    return own[0] if own else compute()


def barrier() -> None:
    """Return once every rank is here."""
    gather(None)


@contextmanager
def held_by_rank0(context: AbstractContextManager[Any]) -> Iterator[None]:
    """Enter a context, such as a lock, on the writer only, before any rank goes on."""
    with ExitStack() as stack:
        broadcast_from_rank0(lambda: stack.enter_context(context) and None)
        yield


@contextmanager
def one_first() -> Iterator[None]:
    """Let the first rank of each machine run the block before the others, which find its files in the cache."""
    is_first = int(os.environ.get("LOCAL_RANK", 0)) == 0
    if not is_first:
        barrier()
    yield
    if is_first:
        barrier()


def shard(members: Sequence[T]) -> list[T]:
    """Return this rank's share of a list that all ranks hold: every member belongs to one rank."""
    return list(members[rank() % world_size() :: world_size()])


def gather_dicts(part: dict[str, Any]) -> dict[str, Any]:
    """Merge the ranks' dicts, on every rank; entries that are dicts themselves are merged likewise."""
    parts = gather(part)
    if len(parts) == 1:
        return part
    union: dict[str, Any] = {}
    for each in parts:
        for key, value in each.items():
            union[key] = {**union[key], **value} if key in union and isinstance(value, dict) else value
    return union


def all_reduce(tensor: torch.Tensor) -> None:
    """Sum a tensor over the ranks, in place, in the order of the ranks: the same bits on each of them.

    Every rank sums up one piece and sends it to the others: it receives at most twice the tensor, for any number of
    ranks.
    """
    if world_size() == 1:
        return
    length = -(-tensor.numel() // world_size())
    pieces = torch.zeros(world_size() * length, dtype=tensor.dtype)
    pieces[: tensor.numel()] = tensor.flatten()
    own = torch.empty_like(pieces)
    with rank_errors():
        dist.all_to_all_single(own, pieces)
        total = own[:length]
        for part in own.split(length)[1:]:
            total += part
        dist.all_gather(list(pieces.split(length)), total)
    tensor.copy_(pieces[: tensor.numel()].view_as(tensor))


def rows_on_rank0(own: torch.Tensor) -> torch.Tensor:
    """Concatenate the ranks' rows on the writer; return `own` elsewhere."""
    lengths = gather(len(own))
    with rank_errors():
        if not is_rank0():
            dist.send(own.contiguous(), dst=0)
            return own
        rows = torch.empty(sum(lengths), *own.shape[1:], dtype=own.dtype)
        for other, part in enumerate(rows.split(lengths)):
            if other == 0:
                part.copy_(own)
            else:
                dist.recv(part, src=other)
    return rows


S = TypeVar("S")


@dataclass(frozen=True)
class Result(Generic[T]):
    """The result of a piece of work, or its error."""

    given: T | LegatoError

    def get(self) -> T:
        """Return the result; raises the LegatoError that the work ended with, on any rank."""
        if isinstance(self.given, LegatoError):
            raise self.given
        return self.given


def map_over_ranks(compute: Callable[[S], T], items: Sequence[S], *, together: bool) -> list[Result[T]]:
    """Compute the outcome of each item, in their order. together: all ranks call it with the same items, each computes
    its share and gets all. Else this process computes all."""

    def outcome(item: S) -> Result[T]:
        try:
            return Result(compute(item))
        except LegatoError as error:
            return Result(error)

    if not together:
        return [outcome(item) for item in items]
    ranks = gather([outcome(item) for item in shard(items)])
    return [ranks[place % len(ranks)][place // len(ranks)] for place in range(len(items))]
