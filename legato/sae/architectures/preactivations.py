"""Pre-activations: the encoder's dense output, and exact values where they are asked for.

The dense matmul's output (possibly bfloat16) only finds candidates; their values are recomputed in the weights' own
precision, and the choice is made on those.

Shape legend: N flat tokens, S sampled tokens, D width, F latents, H those whose weights are here, P pairs by token.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from legato.common.hardware import fast_matmul_dtype, fixed_matmul
from legato.sae.kernels import held_top
from legato.sae.kernels import pairs as kernels
from legato.sae.kernels.pairs import Array, Pairs
from legato.sae.partition import SINGLE, Partition
from legato.sae.segments import Segments

Columns = tuple[Tensor, Tensor, Tensor]  # token_P, latent_P (int64) and code_P of active pairs, in token order

# Candidates are taken above this share of the last batch's threshold: wide enough that neither its drift between two
# batches nor bfloat16's rounding (0.4 %) can hide a pair, narrow enough to leave only some 15 % surplus to recompute.
FLOOR_SHARE = 0.95
# The same for fixed thresholds, with a least margin in normalised units, where large terms may cancel.
_MARGIN, _LEAST_MARGIN = 0.05, 0.01
# bfloat16 pre-activations lie within 0.4 % of the exact ones, and a little more where large terms cancel: shares of a
# threshold down to which they are candidates in training, and at inference, where activations have any scale.
APPROXIMATE_SHARE = 0.98
CANDIDATE_SHARE = 0.9


class Preactivations(NamedTuple):
    """pre_NH: the encoder's dense output, the inputs beside it for exact values; layout: tokens that take part,
    runs; own: what the architecture learns per latent (F), by name; partition: of several ranks, which have pre_NH for
    their share of the tokens or of the latents only, this one's. The methods give all ranks the same, about all
    pairs."""

    pre_NH: Tensor
    x_ND: Array
    W_enc_HD: Array
    b_enc_F: Array
    layout: Segments
    own: Mapping[str, Array] = MappingProxyType({})
    partition: Partition = SINGLE

    @property
    def shape(self) -> tuple[int, int]:
        """(N, F), of all ranks together."""
        return len(self.x_ND), len(self.b_enc_F)

    @property
    def n_valid(self) -> int:
        return int(self.layout.valid_N.sum())

    def scan(self, floor_N: Array, expected: int) -> tuple[Array, Array, Array]:
        """(token_P, latent_P, exact value_P) of the pairs whose pre_NH lies above the floor (in `ordered` units)."""
        return self._with_exact(*self._own_pairs(self.ordered, floor_N[self._tokens], expected))

    def candidates(self, floor_N: Array, expected: int) -> tuple[Array, Array]:
        """(token_P, latent_P) of the pairs whose pre_NH lies above the floor (in `ordered` units)."""
        token_P, latent_P = self._own_pairs(self.ordered, floor_N[self._tokens], expected)
        return self.partition.pairs(token_P, latent_P + latent_P.dtype.type(self._held.start))

    def above(self, threshold_F: Array, expected: int) -> tuple[Array, Array, Array]:
        """(token_P, latent_P, exact value_P) of the pairs with a value above the latent's threshold (F)."""
        floor_F = threshold_F
        if self.pre_NH.dtype == torch.bfloat16:
            floor_F = threshold_F - np.maximum(_MARGIN * np.abs(threshold_F), _LEAST_MARGIN)
            floor_F = np.where(threshold_F >= 0, np.maximum(floor_F, 0), floor_F)
        token_P, latent_P, value_P = self.scan_latents(floor_F, expected)
        keep_P = value_P > threshold_F[latent_P]
        return token_P[keep_P], latent_P[keep_P], value_P[keep_P]

    def scan_latents(self, floor_F: Array, expected: int) -> tuple[Array, Array, Array]:
        """(token_P, latent_P, exact value_P) of the pairs whose pre_NH lies above the latent's floor (F)."""
        pre_NH = self.pre_NH
        if pre_NH.dtype == torch.bfloat16 and bool((floor_F < 0).any()):
            pre_NH = pre_NH.float()  # the bits of bfloat16 have the order of positive numbers only
        floor_H = torch.from_numpy(floor_F[self._held]).to(pre_NH.dtype)
        return self._with_exact(*self._own_pairs(_ordered(pre_NH), _ordered(floor_H), expected, by_latent=True))

    def near(self, threshold_F: Array, release: float = 1.0) -> tuple[Array, Array, Array]:
        """(token_P, latent_P, exact value_P) of the candidates for release times the latent's threshold (F) > 0."""
        return self.scan_latents(np.float32(CANDIDATE_SHARE * release) * threshold_F, 64 * len(self.x_ND))

    def products(self) -> Tensor:
        """product_NF = x @ W_enc of all latents, exactly."""
        product_NH = fixed_matmul(torch.from_numpy(self.x_ND), torch.from_numpy(self.W_enc_HD).T)
        return torch.from_numpy(self.partition.of_latents(product_NH.T.contiguous().numpy())).T.contiguous()

    def exact(self, token_P: Array, latent_P: Array) -> Array:
        return self.partition.of_pairs(self._exact, token_P, latent_P, self.shape)

    def _exact(self, token_P: Array, latent_P: Array) -> Array:
        """Latents here and in `_own_pairs` count from the first one held."""
        return kernels.exact_values(self.x_ND, self.W_enc_HD, self.b_enc_F[self._held], token_P, latent_P)

    @property
    def _tokens(self) -> slice:
        return self.partition.tokens(len(self.x_ND))

    @property
    def _held(self) -> slice:
        return self.partition.local(len(self.b_enc_F))

    def _own_pairs(
        self, ordered_NH: Array, floor: Array, expected: int, by_latent: bool = False
    ) -> tuple[Array, Array]:
        part, expected = self._tokens, expected // self.partition.size
        valid_N = self.layout.valid_N[part]
        token_P, latent_P = kernels.scan(ordered_NH[part], valid_N, floor, expected, by_latent=by_latent)
        return token_P + token_P.dtype.type(part.start), latent_P

    def _with_exact(self, token_P: Array, latent_P: Array) -> tuple[Array, Array, Array]:
        """The pairs of all ranks, with their values, from this one's."""
        value_P = self._exact(token_P, latent_P)
        return self.partition.pairs(token_P, latent_P + latent_P.dtype.type(self._held.start), value_P)

    def row_floors(self, k: int) -> Array:
        """See kernels.row_floors; zero for tokens whose pre-activations another rank has."""
        part, floor_N = self._tokens, np.zeros(len(self.x_ND), self.ordered.dtype)
        floors = partial(kernels.row_floors, self.ordered[part], self.layout.valid_N[part])
        floor_N[part] = self.partition.row_floors(floors, k)
        return floor_N

    def dense(self, rows: Array) -> Tensor:
        """Pre-activations of the latents held, of these tokens (ascending), whichever rank has them."""
        own = rows[(rows >= self._tokens.start) & (rows < self._tokens.stop)]
        return torch.from_numpy(self.partition.of_tokens(self.ordered[own])).view(self.pre_NH.dtype)

    @property
    def ordered(self) -> Array:
        """pre_NH as an array that numpy can compare (see `_ordered`)."""
        return _ordered(self.pre_NH)

    def approximate(self, token_P: Array, latent_P: Array) -> Array:
        """The matmul's own values of the given pairs, float32 or finer."""
        ordered_NH = self.ordered
        values_P = self.partition.of_pairs(
            lambda token, latent: ordered_NH[token, latent], token_P, latent_P, self.shape
        )
        if self.pre_NH.dtype == torch.bfloat16:
            return (values_P.astype(np.int32) << 16).view(np.float32)  # bfloat16 is the upper half of a float32
        return values_P

    def critical(self, token_P: Array, latent_P: Array, value_P: Array, release: float) -> Array:
        F = len(self.b_enc_F)
        return held_top.critical_thresholds(self.layout.start_N, token_P, latent_P, value_P, F, release)

    def scaled_floor(self, floor_N: Array, share: float) -> Array:
        """Floors in `ordered` units, times a share."""
        if self.pre_NH.dtype != torch.bfloat16:
            return floor_N * floor_N.dtype.type(share)
        return (share * torch.from_numpy(floor_N).view(torch.bfloat16)).view(torch.int16).numpy()

    def constant_floor(self, floor: float) -> Array:
        return _ordered(torch.full((len(self.x_ND),), floor, dtype=self.pre_NH.dtype))


def _ordered(values: Tensor) -> Array:
    """An array that numpy can compare: bfloat16 as its bits, whose order is that of positive numbers."""
    return (values.view(torch.int16) if values.dtype == torch.bfloat16 else values).numpy()


@dataclass(frozen=True)
class Encoder:
    """The encoder of a finished SAE: W_enc (D, F), b_enc (F) and the b_dec (D) of its decoder."""

    W_enc: Tensor
    b_enc: Tensor
    b_dec: Tensor

    @cached_property
    def W_enc_FD(self) -> Tensor:
        return self.W_enc.T.contiguous()

    @cached_property
    def low_W_enc_FD(self) -> Tensor:
        return self.W_enc_FD.to(fast_matmul_dtype())

    @cached_property
    def centre_F(self) -> Tensor:
        return fixed_matmul(self.b_dec[None], self.W_enc)[0]

    def centred(
        self, acts_BLD: Tensor, mask_BL: Tensor, doc_BL: Tensor, bias_F: Tensor | None = None
    ) -> Preactivations:
        """(acts - b_dec) @ W_enc + bias_F, on the CPU: activations less b_dec have smaller numbers, which round less.

        bias_F: by default the one that makes up for b_dec, so that the values are those of acts @ W_enc + b_enc.
        """
        x_ND = acts_BLD.flatten(0, 1) - self.b_dec
        low_W_enc_FD = self.low_W_enc_FD
        dtype = low_W_enc_FD.dtype
        bias_F = self.centre_F + self.b_enc if bias_F is None else bias_F
        return Preactivations(
            fixed_matmul(x_ND.to(dtype), low_W_enc_FD.T, bias_F.to(dtype)),
            x_ND.numpy(),
            self.W_enc_FD.numpy(),
            bias_F.numpy(),
            Segments.of(mask_BL, doc_BL),
        )


def positive(codes_NF: Tensor) -> Columns:
    """The pairs of positive codes, on the CPU."""
    N = len(codes_NF)
    token_P, latent_P = kernels.scan(codes_NF.numpy(), np.ones(N, np.bool_), np.zeros(N, np.float32), 64 * N)
    token, latent = torch.from_numpy(token_P).long(), torch.from_numpy(latent_P).long()
    return token, latent, codes_NF[token, latent]


def columns(token_P: Array, latent_P: Array, value_P: Array) -> Columns:
    return torch.from_numpy(token_P).long(), torch.from_numpy(latent_P).long(), torch.from_numpy(value_P)


def held_top_pairs(pre: Preactivations, k: int, release: float, share: float = APPROXIMATE_SHARE) -> Pairs:
    """Each token's k largest, where those of latents that were on at the token before count 1 / release times, exact
    among the candidates: what counts at least `share` of the token's k-th by the matmul's own values."""
    N, F = pre.shape
    layout = pre.layout

    def top(value_P: Array, margin: float) -> Array:
        return held_top.held_top(layout.start_N, layout.end_N, token_P, latent_P, value_P, F, k, release, margin)

    floor_N = pre.scaled_floor(pre.row_floors(k), share * release)
    token_P, latent_P = pre.candidates(floor_N, 6 * k * N)
    near_P = top(pre.approximate(token_P, latent_P), share)
    token_P, latent_P = token_P[near_P], latent_P[near_P]
    value_P = pre.exact(token_P, latent_P)
    return kernels.keep(N, token_P, latent_P, value_P, top(value_P, 1.0))


def held_top_columns(pre: Preactivations, k: int, release: float) -> Columns:
    """`held_top_pairs` of a finished SAE, whose activations have any scale."""
    return columns(*held_top_pairs(pre, k, release, CANDIDATE_SHARE)[1:])


def budget_threshold(batches: Sequence[Preactivations], k: float, release: float = 1.0) -> float:
    """The one threshold at which all batches together have k active latents per token (of a Schmitt trigger where
    release is below 1), for inference."""
    lowest = min(quantile_floor(pre, 2 * k) for pre in batches)
    critical = []
    for pre in batches:
        token_P, latent_P, value_P = pre.scan(pre.constant_floor(release * lowest), round(4 * k * pre.n_valid))
        critical.append(pre.critical(token_P, latent_P, value_P, release))
    critical_P = np.concatenate(critical)
    count = round(k * sum(pre.n_valid for pre in batches))
    if len(critical_P) <= count:
        return lowest
    # Between the last pair that is on and the first that is not, so that > and >= mean the same.
    last_two = np.partition(critical_P, [len(critical_P) - count - 1, len(critical_P) - count])[-count - 1 :][:2]
    return float(last_two.mean())


def quantile_floor(pre: Preactivations, k: float) -> float:
    """A first guess: the value that 1.2 k latents of a token exceed on average, from a sample of tokens."""
    rows = np.flatnonzero(pre.layout.valid_N)
    own = pre.dense(rows[:: max(1, len(rows) // 64)]).float().flatten()
    sample = torch.from_numpy(pre.partition.of_latents(own.numpy()))
    rank = max(1, round(sample.numel() * (1 - 1.2 * k / pre.shape[1])))
    return max(0.0, float(sample.kthvalue(min(rank, sample.numel())).values))
