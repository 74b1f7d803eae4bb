"""Several processes as one run, where `torchrun` started them. One process is the ordinary case: nothing is sent then.

Rank 0 is the writer: it alone speaks and writes what there is one of. A rank that fails or is killed closes its
connections, at which the others stop with RankLostError; one that only hangs is given up after PATIENCE. Objects
travel between the ranks of a run as pickles, which no file ever does.

Work that the ranks of a run take in turn, with the same outcome on each of them.
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

from legato.common.errors import LegatoError, UsageError

T = TypeVar("T")
PATIENCE = "LEGATO_PATIENCE_SECONDS"  # how long ranks wait for each other
DEFAULT_PATIENCE_SECONDS = 3600.0


class RankLostError(LegatoError):
    """Another rank was killed, failed or hangs."""


class SaidElsewhereError(LegatoError):
    """The writer has failed and said so: the others stop without a word."""


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", 0))


def world_size() -> int:
    """The number of processes that work as one."""
    return dist.get_world_size() if dist.is_initialized() else 1


def local_size() -> int:
    """Those of them on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if world_size() > 1 else 1


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


def _divide_threads(ranks: int) -> None:
    """Share the machine's processors between its ranks, unless OMP_NUM_THREADS asks for a number above the 1 that
    torchrun sets."""
    asked = os.environ.get("OMP_NUM_THREADS", "1")
    own = int(asked) if asked.isdigit() and int(asked) > 1 else max(1, len(os.sched_getaffinity(0)) // ranks)
    torch.set_num_threads(own)
    numba.set_num_threads(min(own, numba.get_num_threads()))


@contextmanager
def rank_errors() -> Iterator[None]:
    """For what torch.distributed does with other ranks. Raises RankLostError where one is gone."""
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
    """Within it the processes that torchrun started are the ranks of one run; without torchrun it does nothing.

    Raises RankLostError where they do not find each other.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield
        return
    _divide_threads(int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    with rank_errors():
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
        patience = timedelta(seconds=_patience())
        store, rank, size = next(dist.rendezvous("env://", timeout=patience))
        # torchrun keeps its store when it starts the ranks again: they must not find the addresses of the dead ones.
        store = dist.PrefixStore(f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=patience)
    yield
    dist.destroy_process_group()  # after an error the end of the process does it: the others learn of it by that


def gather(mine: T) -> list[T]:
    """What each rank gives, in the order of the ranks, on every rank."""
    if world_size() == 1:
        return [mine]
    blobs = gather_bytes(torch.frombuffer(bytearray(pickle.dumps(mine)), dtype=torch.uint8))
    return [pickle.loads(blob.numpy().tobytes()) for blob in blobs]


def gather_bytes(mine: torch.Tensor) -> list[torch.Tensor]:
    """The uint8 tensors (any lengths) of all ranks, in their order, on every rank."""
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
    """What `compute` gives on the writer, on every rank; the others do not run it.

    Where it raises there, the others raise SaidElsewhereError.
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
    """What `compute` gives on each rank, on the writer first: the others find what it fetched, and where it raises
    there they raise SaidElsewhereError."""
    own: list[T] = []
    broadcast_from_rank0(lambda: own.append(compute()))
    return own[0] if own else compute()


def barrier() -> None:
    """Return once every rank is here."""
    gather(None)


@contextmanager
def held_by_rank0(context: AbstractContextManager[Any]) -> Iterator[None]:
    """A context, such as a lock, that the writer enters before any rank is within this one, and leaves with it."""
    with ExitStack() as stack:
        broadcast_from_rank0(lambda: stack.enter_context(context) and None)
        yield


@contextmanager
def one_first() -> Iterator[None]:
    """The first rank of each machine is within it before the others are, who find what it left in the cache."""
    is_first = int(os.environ.get("LOCAL_RANK", 0)) == 0
    if not is_first:
        barrier()
    yield
    if is_first:
        barrier()


def shard(members: Sequence[T]) -> list[T]:
    """This rank's share of a list that all ranks hold: every member is one rank's."""
    return list(members[rank() % world_size() :: world_size()])


def gather_dicts(part: dict[str, Any]) -> dict[str, Any]:
    """The union of the ranks' dicts, on every rank; entries that are dicts themselves are united likewise."""
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

    Every rank sums up one piece and sends it to the others: it receives at most twice the tensor, however many there
    are.
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
    """On the writer the ranks' rows one after the other; elsewhere `own`."""
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
    """What a piece of work gave, or why it gave nothing."""

    given: T | LegatoError

    def get(self) -> T:
        """Raises the LegatoError that the work ended with, whichever rank did it."""
        if isinstance(self.given, LegatoError):
            raise self.given
        return self.given


def map_over_ranks(compute: Callable[[S], T], items: Sequence[S], *, together: bool) -> list[Result[T]]:
    """The outcome of each item, in their order. together: all ranks ask for the same items; every rank computes its
    share and gets all. Else this process computes them all by itself."""

    def outcome(item: S) -> Result[T]:
        try:
            return Result(compute(item))
        except LegatoError as error:
            return Result(error)

    if not together:
        return [outcome(item) for item in items]
    ranks = gather([outcome(item) for item in shard(items)])
    return [ranks[place % len(ranks)][place // len(ranks)] for place in range(len(items))]
