"""One SAE trained by several ranks: the same numbers, to the last bit, as by one.

Every rank holds the whole batch and all weights. The tokens are shared out for what is done per token (the encoder's
matmul, exact values, the decoder), the latents for what is done per latent (gradients, the optimiser). Each pair, token
and latent is so computed by one rank in the order in which one process would; what the ranks exchange are the candidate
pairs, the residuals and the updated weights, never partial sums, whose rounding would depend on how many there are.

Shape legend: N flat tokens, F latents, P pairs in token order.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from legato import distributed

Array = NDArray[Any]
T = TypeVar("T")


@dataclass(frozen=True)
class Share:
    """The part of one training step that rank `rank` of `size` does. With one rank it is everything."""

    rank: int = 0
    size: int = 1

    def part(self, count: int) -> slice:
        """This rank's share of `count` tokens, latents or pairs: consecutive ones, in the order of the ranks."""
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def united(self, own: Array) -> Array:
        """The ranks' arrays one after the other along the first axis, on every rank."""
        if self.size == 1:
            return own
        own = np.ascontiguousarray(own)
        blobs = distributed.gather_bytes(torch.from_numpy(own.reshape(-1).view(np.uint8)))
        return np.concatenate([blob.numpy().view(own.dtype) for blob in blobs]).reshape(-1, *own.shape[1:])

    def split(self, compute: Callable[..., Array], *arrays: Array) -> Array:
        """`compute(*arrays)` for a function of each entry alone: every rank does its share of the entries."""
        if self.size == 1:
            return compute(*arrays)
        part = self.part(len(arrays[0]))
        return self.united(compute(*(array[part] for array in arrays)))

    def total(self, own: float) -> float:
        """The sum over the ranks, in their order."""
        return own if self.size == 1 else sum(distributed.gather(own))

    def unite_rows(self, tensor: Tensor) -> None:
        """Fill in, along the first axis, the rows that are other ranks' share."""
        if self.size > 1:
            rows = self.united(tensor[self.part(len(tensor))].numpy())
            tensor.copy_(torch.from_numpy(rows))


WHOLE = Share()


def divided(members: Sequence[T]) -> tuple[list[T], Share]:
    """How the ranks divide a bank: this rank's members, and its share of each one's steps. Where there are enough, each
    rank has members of its own, which costs nothing; else all ranks train every member together."""
    if len(members) >= distributed.size():
        return distributed.mine(members), WHOLE
    return list(members), Share(distributed.rank(), distributed.size())
