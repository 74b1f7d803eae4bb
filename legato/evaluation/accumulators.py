"""Streaming sums from which every consistency and position metric is computed.

All sums are float64, memory is O(F * lags + F * L) whatever the number of tokens, and two accumulators that saw
different rows add up to the one that saw both (`merge`), so ranks reduce exactly.

Shape legend: B rows (contexts), L positions, F latents (or D raw dimensions), K lags, N flat tokens (b * L + t),
P active pairs, S stretches (the part of one document that lies in one row).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from itertools import pairwise

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from legato.codes import SparseCodes
from legato.errors import UsageError

DEFAULT_LAGS = (1, 2, 4, 8, 16, 32, 64)
MAX_LAGS = 64  # one bit per lag in a 64-bit word

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def check_lags(lags: Sequence[int]) -> tuple[int, ...]:
    """The lags as a tuple of increasing positive integers; UsageError otherwise."""
    lags = tuple(int(lag) for lag in lags)
    if not lags or lags[0] < 1 or any(b <= a for a, b in pairwise(lags)) or len(lags) > MAX_LAGS:
        raise UsageError(f"lags must be 1 to {MAX_LAGS} increasing positive integers, not {list(lags)}")
    return lags


# --- which tokens and pairs count -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PairLayout:
    """Where the valid positions and pairs of one batch lie; shared by everything that is measured on the batch.

    A pair (t, t + lag) is valid if both ends are valid and of the same document in the same row.
    stretch_N: stretch of each token, -1 where the token is not valid.  left_N / right_N: bit k is set where the token
    is the left / right end of a valid pair at lags[k].  size_S: valid tokens of a stretch.  pairs_SK: its valid pairs.
    """

    lags: tuple[int, ...]
    shape: tuple[int, int]
    stretch_N: NDArray[np.int32]
    left_N: NDArray[np.uint64]
    right_N: NDArray[np.uint64]
    size_S: Ints
    pairs_SK: Ints
    tokens_L: Ints
    pairs_KL: Ints

    @classmethod
    def of(cls, mask_BL: Tensor, doc_BL: Tensor | None = None, lags: Sequence[int] = DEFAULT_LAGS) -> "PairLayout":
        """doc_BL None: every row is one document."""
        lags = check_lags(lags)
        doc_BL = torch.zeros(mask_BL.shape) if doc_BL is None else doc_BL
        if mask_BL.dim() != 2 or mask_BL.shape != doc_BL.shape:
            raise ValueError(f"mask and doc must both be [B, L], not {list(mask_BL.shape)} and {list(doc_BL.shape)}")
        mask = np.ascontiguousarray(mask_BL.detach().cpu().numpy().astype(np.bool_))
        doc = np.ascontiguousarray(doc_BL.detach().cpu().numpy().astype(np.int64))
        stretch_N, left_N, right_N, size_S, pairs_SK, pairs_KL = _lay_out(mask, doc, np.asarray(lags, np.int64))
        B, L = mask_BL.shape
        return cls(lags, (B, L), stretch_N, left_N, right_N, size_S, pairs_SK, mask.sum(0), pairs_KL)

    @property
    def n_tokens(self) -> int:
        return int(self.tokens_L.sum())

    def valid_rows(self) -> int:
        """Rows with at least one valid position."""
        return int((self.stretch_N.reshape(self.shape) >= 0).any(1).sum())


@numba.njit(cache=True)
def _lay_out(mask, doc, lags):  # type: ignore[no-untyped-def]
    B, L = mask.shape
    K = lags.size
    stretch = np.full(B * L, -1, np.int32)
    n_stretches = 0
    for b in range(B):
        last_doc = np.int64(0)
        started = False
        for t in range(L):
            if mask[b, t]:
                if not started or doc[b, t] != last_doc:
                    n_stretches += 1
                started = True
                last_doc = doc[b, t]
                stretch[b * L + t] = n_stretches - 1
    left = np.zeros(B * L, np.uint64)
    right = np.zeros(B * L, np.uint64)
    size = np.zeros(n_stretches, np.int64)
    pairs_SK = np.zeros((n_stretches, K), np.int64)
    pairs_KL = np.zeros((K, L), np.int64)
    for b in range(B):
        for t in range(L):
            token = b * L + t
            s = stretch[token]
            if s < 0:
                continue
            size[s] += 1
            for k in range(K):
                if t + lags[k] < L and stretch[token + lags[k]] == s:
                    bit = np.uint64(1) << np.uint64(k)
                    left[token] |= bit
                    right[token + lags[k]] |= bit
                    pairs_SK[s, k] += 1
                    pairs_KL[k, t] += 1
    return stretch, left, right, size, pairs_SK, pairs_KL


# --- codes sorted by latent -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LatentOrder:
    """The active pairs of a batch grouped by latent, by token within a latent: pairs start_F[i] .. start_F[i + 1]."""

    start_F: Ints
    token_P: NDArray[np.int32]
    value_P: NDArray[np.float32]

    @classmethod
    def of(cls, codes: SparseCodes, layout: PairLayout) -> "LatentOrder":
        """Counting sort, O(P + F). Pairs at positions that are not valid are dropped."""
        if codes.shape[:2] != layout.shape:
            raise ValueError(f"codes are {codes.shape[:2]} rows x positions, the mask is {layout.shape}")
        return cls(
            *_sort_by_latent(
                codes.token_P.detach().cpu().numpy(),
                codes.latent_P.detach().cpu().numpy(),
                codes.value_P.detach().float().cpu().numpy(),
                layout.stretch_N,
                codes.shape[2],
            )
        )

    @property
    def n_latents(self) -> int:
        return self.start_F.size - 1


@numba.njit(cache=True)
def _sort_by_latent(token_P, latent_P, value_P, stretch_N, n_latents):  # type: ignore[no-untyped-def]
    start = np.zeros(n_latents + 1, np.int64)
    for j in range(token_P.size):
        if stretch_N[token_P[j]] >= 0:
            start[latent_P[j] + 1] += 1
    for i in range(n_latents):
        start[i + 1] += start[i]
    place = start[:-1].copy()
    token = np.empty(start[-1], np.int32)
    value = np.empty(start[-1], np.float32)
    for j in range(token_P.size):
        if stretch_N[token_P[j]] >= 0:
            at = place[latent_P[j]]
            place[latent_P[j]] = at + 1
            token[at] = token_P[j]
            value[at] = value_P[j]
    return start, token, value


# --- the sums ---------------------------------------------------------------------------------------------------------


class Summed:
    """A dataclass whose array and number fields are sums: adding the fields of two accumulators merges them."""

    def merge(self, other: "Summed") -> None:
        """Add what another accumulator saw (another rank's rows); the two must measure the same things."""
        assert type(self) is type(other)
        for f in fields(self):  # type: ignore[arg-type]
            mine, theirs = getattr(self, f.name), getattr(other, f.name)
            if isinstance(mine, Summed):
                mine.merge(theirs)
            elif f.metadata.get("identity"):
                assert mine == theirs, f"cannot merge sums over different {f.name}"
            else:
                setattr(self, f.name, mine + theirs)

    def reduce(self, all_reduce: Callable[[Tensor], None]) -> None:
        """Sum over ranks in place; `all_reduce` sums a float64 tensor over the ranks in place."""
        for f in fields(self):  # type: ignore[arg-type]
            mine = getattr(self, f.name)
            if isinstance(mine, Summed):
                mine.reduce(all_reduce)
            elif not f.metadata.get("identity"):
                total = torch.as_tensor(mine, dtype=torch.float64).clone()
                all_reduce(total)
                setattr(self, f.name, total.numpy() if isinstance(mine, np.ndarray) else float(total))


@dataclass
class PairCounts(Summed):
    """How many valid tokens and pairs there were, by position (of the pair's left end)."""

    lags: tuple[int, ...] = field(metadata={"identity": True})
    tokens_L: Floats
    pairs_KL: Floats

    @classmethod
    def zero(cls, n_positions: int, lags: Sequence[int]) -> "PairCounts":
        lags = check_lags(lags)
        return cls(lags, np.zeros(n_positions), np.zeros((len(lags), n_positions)))

    def add(self, layout: PairLayout) -> None:
        assert layout.lags == self.lags
        self.tokens_L += layout.tokens_L
        self.pairs_KL += layout.pairs_KL

    @property
    def n_tokens(self) -> float:
        return float(self.tokens_L.sum())

    @property
    def pairs_K(self) -> Floats:
        return self.pairs_KL.sum(1)


@dataclass
class PairSums(Summed):
    """Second-order sums of F series: what autocorrelation and its two nulls need.

    total_F, square_F: sums of f and f^2 over valid tokens.  at_FL: sum of f by position.
    product_FK: sum of f_t f_{t+lag} over valid pairs.  ends_FK: sum of f_t + f_{t+lag} over valid pairs.
    shuffled_product_FK, shuffled_ends_FK: the expectations of these two over all orders of the values inside each
    stretch: pairs_s (S^2 - Q) / (n (n - 1)) and 2 pairs_s S / n, with n tokens, sum S and sum of squares Q of stretch
    s.
    """

    total_F: Floats
    square_F: Floats
    at_FL: Floats
    product_FK: Floats
    ends_FK: Floats
    shuffled_product_FK: Floats
    shuffled_ends_FK: Floats

    @classmethod
    def zero(cls, n_series: int, n_positions: int, n_lags: int) -> "PairSums":
        per_lag = [np.zeros((n_series, n_lags)) for _ in range(4)]
        return cls(np.zeros(n_series), np.zeros(n_series), np.zeros((n_series, n_positions)), *per_lag)

    def _arrays(self) -> tuple[Floats, ...]:
        return tuple(getattr(self, f.name) for f in fields(self))

    def add_dense(self, acts_BLD: Tensor, layout: PairLayout) -> None:
        """Add a dense signal (the raw stream), series = dimensions. Float64 throughout: means may dwarf variances."""
        B, L = layout.shape
        x_BLD = acts_BLD.detach().cpu().double().numpy()
        stretch_BL = layout.stretch_N.reshape(B, L)
        x_BLD = np.where(stretch_BL[..., None] >= 0, x_BLD, 0.0)
        self.total_F += x_BLD.sum((0, 1))
        self.square_F += np.einsum("bld,bld->d", x_BLD, x_BLD)
        self.at_FL += x_BLD.sum(0).T
        for k, lag in enumerate(layout.lags):
            if lag >= L:
                continue
            pair_BL = (layout.left_N.reshape(B, L)[:, : L - lag] >> np.uint64(k) & np.uint64(1)).astype(np.float64)
            left, right = x_BLD[:, : L - lag], x_BLD[:, lag:]
            self.product_FK[:, k] += np.einsum("bl,bld,bld->d", pair_BL, left, right)
            self.ends_FK[:, k] += np.einsum("bl,bld->d", pair_BL, left) + np.einsum("bl,bld->d", pair_BL, right)
        sum_SD = np.zeros((layout.size_S.size, x_BLD.shape[2]))
        square_SD = np.zeros_like(sum_SD)
        for s, (b, first, last) in enumerate(_stretch_spans(stretch_BL)):
            x_TD = x_BLD[b, first:last]  # positions that are not valid inside the span hold zeros
            sum_SD[s] = x_TD.sum(0)
            square_SD[s] = np.einsum("td,td->d", x_TD, x_TD)
        size_S = layout.size_S.astype(np.float64)
        product_S = 1.0 / np.maximum(size_S * (size_S - 1.0), 1.0)  # a stretch of one token has no pairs
        self.shuffled_product_FK += ((sum_SD**2 - square_SD) * product_S[:, None]).T @ layout.pairs_SK
        self.shuffled_ends_FK += 2.0 * (sum_SD / size_S[:, None]).T @ layout.pairs_SK


def _stretch_spans(stretch_BL: NDArray[np.int32]) -> list[tuple[int, int, int]]:
    """(row, first position, one past the last position) of each stretch, in order."""
    spans = []
    for b, stretch_L in enumerate(stretch_BL):
        valid_T = np.flatnonzero(stretch_L >= 0)
        if valid_T.size:
            cuts = np.flatnonzero(np.diff(stretch_L[valid_T])) + 1
            spans += [(b, int(part[0]), int(part[-1]) + 1) for part in np.split(valid_T, cuts)]
    return spans


@dataclass
class CodeSums(Summed):
    """Everything the consistency and position metrics need to know about the codes of one SAE.

    value, firing: pair sums of the codes and of their on/off indicator.  runs_F: maximal runs of consecutive on
    positions inside a stretch.  rows_F: rows in which a latent fires.  between_F: sum over stretches of (sum of f)^2 /
    n, for the variance between documents.  steepest_F: sum over the rows in which a latent fires of its largest
    |f_t - f_{t-1}| / ||x_t - x_{t-1}||, divided by the number of latents that fire in the row (T-SAE smoothness).
    """

    counts: PairCounts
    value: PairSums
    firing: PairSums
    runs_F: Floats
    rows_F: Floats
    between_F: Floats
    steepest_F: Floats
    l0_L: Floats
    l0_square_L: Floats
    n_rows: float = 0.0
    n_stretches: float = 0.0
    n_rows_with_steps: float = 0.0

    @classmethod
    def zero(cls, n_latents: int, n_positions: int, lags: Sequence[int] = DEFAULT_LAGS) -> "CodeSums":
        counts = PairCounts.zero(n_positions, lags)
        return cls(
            counts,
            value=PairSums.zero(n_latents, n_positions, len(counts.lags)),
            firing=PairSums.zero(n_latents, n_positions, len(counts.lags)),
            runs_F=np.zeros(n_latents),
            rows_F=np.zeros(n_latents),
            between_F=np.zeros(n_latents),
            steepest_F=np.zeros(n_latents),
            l0_L=np.zeros(n_positions),
            l0_square_L=np.zeros(n_positions),
        )

    @property
    def n_latents(self) -> int:
        return self.runs_F.size

    def add(self, layout: PairLayout, order: LatentOrder, step_BL: Tensor | None = None) -> None:
        """Add one batch.

        step_BL: ||x_t - x_{t-1}|| of the raw activations, needed for smoothness only; column 0 is not read.
        """
        if order.n_latents != self.n_latents or layout.shape[1] != self.counts.tokens_L.size:
            raise ValueError("these codes have another number of latents or positions than the accumulator")
        self.counts.add(layout)
        self.n_rows += layout.valid_rows()
        self.n_stretches += layout.size_S.size
        l0_BL = np.bincount(order.token_P, minlength=layout.stretch_N.size).reshape(layout.shape).astype(np.float64)
        self.l0_L += l0_BL.sum(0)
        self.l0_square_L += (l0_BL**2).sum(0)
        if step_BL is None:
            inverse_step_N = np.zeros(0)
        else:
            self.n_rows_with_steps += layout.valid_rows()
            step_N = step_BL.detach().cpu().double().numpy().ravel()
            inverse_step_N = np.divide(1.0, step_N, out=np.zeros_like(step_N), where=step_N > 0)
        distinct_B = _distinct_latents(order.start_F, order.token_P, layout.shape[0], layout.shape[1])
        _add_latents(
            order.start_F,
            order.token_P,
            order.value_P,
            (
                np.asarray(layout.lags, np.int64),
                layout.stretch_N,
                layout.left_N,
                layout.right_N,
                layout.size_S,
                layout.pairs_SK,
            ),
            layout.shape[1],
            inverse_step_N,
            distinct_B,
            (*self.value._arrays(), *self.firing._arrays(), self.runs_F, self.rows_F, self.between_F, self.steepest_F),
        )


@numba.njit(cache=True)
def _distinct_latents(start_F, token_P, n_rows, n_positions):  # type: ignore[no-untyped-def]
    distinct = np.zeros(n_rows, np.int64)
    for i in range(start_F.size - 1):
        last_row = -1
        for j in range(start_F[i], start_F[i + 1]):
            row = token_P[j] // n_positions
            if row != last_row:
                distinct[row] += 1
                last_row = row
    return distinct


@numba.njit(cache=True)
def _shuffle_stretch(sum_s, square_s, n, pairs_K, product_K, ends_K):  # type: ignore[no-untyped-def]
    for k in range(pairs_K.size):
        if pairs_K[k] > 0:  # then n >= 2
            product_K[k] += pairs_K[k] * (sum_s * sum_s - square_s) / (n * (n - 1.0))
            ends_K[k] += 2.0 * pairs_K[k] * sum_s / n


@numba.njit(cache=True, parallel=True)
def _add_latents(start_F, token_P, value_P, layout, n_positions, inverse_step_N, distinct_B, sums):  # type: ignore[no-untyped-def]
    # One latent is one thread's work from start to end, so the result does not depend on the number of threads.
    for i in numba.prange(start_F.size - 1):
        _add_latent(i, start_F, token_P, value_P, layout, n_positions, inverse_step_N, distinct_B, sums)


@numba.njit(cache=True)
def _add_latent(i, start_F, token_P, value_P, layout, n_positions, inverse_step_N, distinct_B, sums):  # type: ignore[no-untyped-def]
    lags, stretch_N, left_N, right_N, size_S, pairs_SK = layout
    v_total, v_square, v_at, v_product, v_ends, v_sh_product, v_sh_ends = sums[:7]
    f_total, f_square, f_at, f_product, f_ends, f_sh_product, f_sh_ends = sums[7:14]
    runs_F, rows_F, between_F, steepest_F = sums[14:]
    K = lags.size
    one = np.uint64(1)
    has_steps = inverse_step_N.size > 0
    begin, end = start_F[i], start_F[i + 1]
    if begin == end:
        return
    ahead = np.full(K, begin)  # per lag, the first pair of this latent that may be the partner
    stretch = stretch_N[token_P[begin]]
    row = token_P[begin] // n_positions
    sum_s = 0.0
    square_s = 0.0
    count_s = 0.0
    steepest = 0.0
    runs = 0
    rows = 1
    for j in range(begin, end):
        token = token_P[j]
        f = np.float64(value_P[j])
        if stretch_N[token] != stretch:
            n = size_S[stretch]
            between_F[i] += sum_s * sum_s / n
            _shuffle_stretch(sum_s, square_s, n, pairs_SK[stretch], v_sh_product[i], v_sh_ends[i])
            _shuffle_stretch(count_s, count_s, n, pairs_SK[stretch], f_sh_product[i], f_sh_ends[i])
            stretch = stretch_N[token]
            sum_s = 0.0
            square_s = 0.0
            count_s = 0.0
        if token // n_positions != row:
            steepest_F[i] += steepest / distinct_B[row]
            steepest = 0.0
            row = token // n_positions
            rows += 1
        sum_s += f
        square_s += f * f
        count_s += 1.0
        position = token % n_positions
        v_at[i, position] += f
        f_at[i, position] += 1.0
        follows = j > begin and token_P[j - 1] == token - 1 and stretch_N[token - 1] == stretch
        if not follows:
            runs += 1
        left = left_N[token]
        right = right_N[token]
        for k in range(K):
            if (left >> np.uint64(k)) & one:
                v_ends[i, k] += f
                f_ends[i, k] += 1.0
                target = token + lags[k]
                p = max(ahead[k], j + 1)
                while p < end and token_P[p] < target:
                    p += 1
                ahead[k] = p
                if p < end and token_P[p] == target:
                    v_product[i, k] += f * np.float64(value_P[p])
                    f_product[i, k] += 1.0
            if (right >> np.uint64(k)) & one:
                v_ends[i, k] += f
                f_ends[i, k] += 1.0
        if has_steps:
            if position > 0 and stretch_N[token - 1] == stretch:
                before = np.float64(value_P[j - 1]) if follows else 0.0
                steepest = max(steepest, abs(f - before) * inverse_step_N[token])
            next_is_on = j + 1 < end and token_P[j + 1] == token + 1
            if position + 1 < n_positions and stretch_N[token + 1] == stretch and not next_is_on:
                steepest = max(steepest, f * inverse_step_N[token + 1])
        v_total[i] += f
        v_square[i] += f * f
        f_total[i] += 1.0
        f_square[i] += 1.0
    n = size_S[stretch]
    between_F[i] += sum_s * sum_s / n
    _shuffle_stretch(sum_s, square_s, n, pairs_SK[stretch], v_sh_product[i], v_sh_ends[i])
    _shuffle_stretch(count_s, count_s, n, pairs_SK[stretch], f_sh_product[i], f_sh_ends[i])
    steepest_F[i] += steepest / distinct_B[row]
    runs_F[i] += runs
    rows_F[i] += rows
