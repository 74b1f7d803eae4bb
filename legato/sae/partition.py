"""One SAE trained by several ranks: what each of them computes and holds.

Every rank sees the whole batch and makes the same choice of active pairs. Of the rest there are two divisions:

`Partition`: every rank holds all weights. The tokens are divided for what is done per token (the encoder's matmul,
exact values, the decoder), the latents for what is done per latent (gradients, the optimiser). Each pair, token and
latent is so computed by one rank in the order in which one process would, and nothing that is exchanged is a partial
sum: the bits are those of one process.

`Sharded`: every rank holds the weights, moments and gradients of a block of latents, for SAEs that do not fit whole.
It finds the candidates among its latents, and decodes what is active of them; these parts of the reconstructions
are summed over the ranks, so the last bits depend on how many there are.

Shape legend: N flat tokens, D width, F latents, H those whose weights a rank holds, P pairs in token order, G groups.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from legato.common import distributed
from legato.common.errors import UsageError
from legato.common.hardware import rows_a_block
from legato.sae.kernels import gradients
from legato.sae.kernels.pairs import Array, Groups, Pairs

T = TypeVar("T")


@dataclass(frozen=True)
class Partition:
    """The part of an SAE that rank `rank` of `size` computes, where every rank holds all weights: to the last bit as by
    one. One rank alone has everything."""

    rank: int = 0
    size: int = 1

    def _part(self, count: int) -> slice:
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def _gather(self, own: Array) -> Array:
        """The ranks' arrays one after the other along the first axis, on every rank."""
        if self.size == 1:
            return own
        own = np.ascontiguousarray(own)
        blobs = distributed.gather_bytes(torch.from_numpy(own.reshape(-1).view(np.uint8)))
        return np.concatenate([blob.numpy().view(own.dtype) for blob in blobs]).reshape(-1, *own.shape[1:])

    def tokens(self, n_tokens: int) -> slice:
        """The tokens whose pre-activations are computed here."""
        block = rows_a_block(n_tokens)  # see fixed_matmul: only between its blocks may a product be cut
        blocks = self._part(-(-n_tokens // block))
        return slice(min(n_tokens, blocks.start * block), min(n_tokens, blocks.stop * block))

    def local(self, n_latents: int) -> slice:
        """The latents whose weights are here."""
        return slice(0, n_latents)

    def latents(self, n_latents: int) -> slice:
        """Return the latents whose gradients and updates are computed here."""
        return self._part(n_latents)

    def rows(self, n_latents: int) -> slice:
        """`latents`, counted from the first one held."""
        own, first = self.latents(n_latents), self.local(n_latents).start
        return slice(own.start - first, own.stop - first)

    def pairs(self, *columns: Array) -> Any:
        """Columns (the first: token_P) of the pairs of all ranks in token order, latents ascending inside a token, from
        those of this one."""
        return tuple(self._gather(column) for column in columns)

    def owner(self, token_P: Array, latent_P: Array, shape: tuple[int, int]) -> Array:
        """The rank that has the data of each pair. shape: (N, F)."""
        block = rows_a_block(shape[0])
        return ((token_P.astype(np.int64) // block + 1) * self.size - 1) // -(-shape[0] // block)

    def of_pairs(
        self, compute: Callable[[Array, Array], Array], token_P: Array, latent_P: Array, shape: tuple[int, int]
    ) -> Array:
        """`compute(token_P, latent_P)` for a function of each pair alone, done where the pair's data are; it gets
        latents counted from the first one held. shape: (N, F)."""
        if self.size == 1:
            return compute(token_P, latent_P)
        owner_P = self.owner(token_P, latent_P, shape).astype(np.int16)
        own = owner_P == self.rank
        first = latent_P.dtype.type(self.local(shape[1]).start)
        by_rank = self._gather(compute(token_P[own], latent_P[own] - first))
        result = np.empty_like(by_rank)
        result[np.argsort(owner_P, kind="stable")] = by_rank
        return result

    def of_tokens(self, own: Array) -> Array:
        """Gather values of all tokens along the first axis from each rank's values of its `tokens`."""
        return self._gather(own)

    def of_latents(self, own: Array) -> Array:
        """Gather values of all latents along the first axis from each rank's values of those it holds."""
        return own

    def row_floors(self, floors: Callable[[int], Array], k: int) -> Array:
        """Return a value for each token whose pre-activations are here, at most its k-th largest. floors: the same
        among the latents held."""
        return floors(k)

    def decode(
        self, pairs: Pairs, groups: Groups, W_dec_HD: Array, b_dec_D: Array, x_ND: Array, valid_N: Array
    ) -> tuple[Array, Array]:
        """(pull_GND, squared_GN): see gradients.decode."""
        part = self.tokens(len(x_ND))
        ptr_N = pairs.ptr_N[part.start : part.stop + 1]
        own = slice(ptr_N[0], ptr_N[-1])
        pairs = Pairs(ptr_N - ptr_N[0], pairs.token_P[own], pairs.latent_P[own], pairs.value_P[own])
        pull_GND, squared_GN = gradients.decode(pairs, groups, W_dec_HD, b_dec_D, x_ND[part], valid_N[part])
        pull_NGD, squared_NG = self._gather(pull_GND.swapaxes(0, 1)), self._gather(squared_GN.T)
        return np.ascontiguousarray(pull_NGD.swapaxes(0, 1)), np.ascontiguousarray(squared_NG.T)

    def total(self, own_R: Array) -> float:
        """The sum over all latents, from what each rank has about those it updates: added up in one order, so that the
        bits do not depend on how they are divided."""
        return float(self._gather(own_R).sum())

    def unite_rows(self, tensor_H: Tensor) -> None:
        """Fill in the rows of held latents that other ranks have updated."""
        if self.size > 1:
            tensor_H.copy_(torch.from_numpy(self._gather(tensor_H[self._part(len(tensor_H))].numpy())))

    def whole(self, tensor_H: Tensor) -> Tensor:
        """On the first rank: with the rows of all latents."""
        return tensor_H


SINGLE = Partition()


class Sharded(Partition):
    """A block of latents on every rank, ceil(F / size) on each but the last, as torch.distributed.tensor's Shard(0)
    divides them."""

    def local(self, n_latents: int) -> slice:
        block = block_of(n_latents, self.size)
        if block * (self.size - 1) >= n_latents:
            raise UsageError(f"{n_latents} latents cannot be divided over {self.size} ranks: start fewer of them")
        return slice(block * self.rank, min(block * (self.rank + 1), n_latents))

    def latents(self, n_latents: int) -> slice:
        return self.local(n_latents)

    def tokens(self, n_tokens: int) -> slice:
        return slice(0, n_tokens)

    def pairs(self, *columns: Array) -> Any:
        by_rank = [self._gather(column) for column in columns]
        order = np.argsort(by_rank[0], kind="stable")
        return tuple(column[order] for column in by_rank)

    def owner(self, token_P: Array, latent_P: Array, shape: tuple[int, int]) -> Array:
        return latent_P // block_of(shape[1], self.size)

    def of_tokens(self, own: Array) -> Array:
        return own

    def of_latents(self, own: Array) -> Array:
        return self._gather(own)

    def row_floors(self, floors: Callable[[int], Array], k: int) -> Array:
        """If one rank alone has k values above its floor, there are k above it; and if every rank has k / size
        above the lowest of their floors. The second is the tighter one but where the ranks' latents differ much."""
        both_RN = self._gather(np.stack([floors(k), floors(-(-k // self.size))])).reshape(self.size, 2, -1)
        return np.maximum(both_RN[:, 0].max(0), both_RN[:, 1].min(0))

    def decode(
        self, pairs: Pairs, groups: Groups, W_dec_HD: Array, b_dec_D: Array, x_ND: Array, valid_N: Array
    ) -> tuple[Array, Array]:
        ends_G = groups.ends_G
        held = self.local(int(ends_G[-1]))
        W_dec, tokens = torch.from_numpy(W_dec_HD), np.arange(len(x_ND))
        of_group_GND = torch.empty(len(ends_G), *x_ND.shape, dtype=W_dec.dtype)
        for g, (first, end) in enumerate(zip([0, *ends_G], ends_G, strict=False)):
            own = (pairs.latent_P >= max(first, held.start)) & (pairs.latent_P < min(end, held.stop))
            of_group_GND[g] = torch.nn.functional.embedding_bag(
                torch.from_numpy(pairs.latent_P[own].astype(np.int64) - held.start),
                W_dec,
                torch.from_numpy(np.searchsorted(pairs.token_P[own], tokens)),
                mode="sum",
                per_sample_weights=torch.from_numpy(pairs.value_P[own]),
            )
        distributed.all_reduce(of_group_GND)
        residual_GND = np.cumsum(of_group_GND.numpy(), axis=0)
        residual_GND += b_dec_D - x_ND
        residual_GND[:, ~valid_N] = 0
        weighted_GND = groups.weights_G.astype(x_ND.dtype)[:, None, None] * residual_GND
        pull_GND = np.ascontiguousarray(np.cumsum(weighted_GND[::-1], axis=0)[::-1])
        return pull_GND, np.square(residual_GND).sum(-1)

    def unite_rows(self, tensor_H: Tensor) -> None:
        """Every row is here already."""

    def whole(self, tensor_H: Tensor) -> Tensor:
        return distributed.rows_on_rank0(tensor_H)


def block_of(n_latents: int, size: int) -> int:
    """The latents that a rank holds of an SAE divided over `size` ranks, but for the last one, which may hold fewer."""
    return -(-n_latents // size)
