"""Streaming sums from which every consistency and position metric is computed.

All sums are float64, memory is O(F * lags + F * L) whatever the number of tokens, and two accumulators that saw
different rows add up to the one that saw both (`merge`).

Shape legend: B rows (contexts), L positions, F latents (or D raw dimensions), K lags, N flat tokens (b * L + t),
P active pairs, S stretches (the part of one document that lies in one row).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields

import numba
import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from legato.evaluation.sums.lag_pairs import DEFAULT_LAGS, Floats, LagPairs, check_lags
from legato.sae.kernels.pairs import PairsByLatent


class Summed:
    """A dataclass whose array and number fields are sums: adding the fields of two accumulators merges them."""

    def merge(self, other: "Summed") -> None:
        """Add the sums of another accumulator over other rows; the two must measure the same things."""
        assert type(self) is type(other)
        for f in fields(self):  # type: ignore[arg-type]
            mine, theirs = getattr(self, f.name), getattr(other, f.name)
            if isinstance(mine, Summed):
                mine.merge(theirs)
            elif f.metadata.get("identity"):
                assert mine == theirs, f"cannot merge sums over different {f.name}"
            else:
                setattr(self, f.name, mine + theirs)


@dataclass
class PairCounts(Summed):
    """Number of valid tokens and pairs by position (of the pair's left end) and lag."""

    lags: tuple[int, ...] = field(metadata={"identity": True})
    tokens_L: Floats
    pairs_KL: Floats

    @classmethod
    def zero(cls, n_positions: int, lags: Sequence[int]) -> "PairCounts":
        lags = check_lags(lags)
        return cls(lags, np.zeros(n_positions), np.zeros((len(lags), n_positions)))

    def add(self, layout: LagPairs) -> None:
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
    """Second-order sums of F series, for autocorrelation and its two nulls.

    total_F, square_F: sums of f and f^2 over valid tokens.  at_FL: sum of f by position.
    product_FK: sum of f_t f_{t+lag} over valid pairs.  ends_FK: sum of f_t + f_{t+lag} over valid pairs.
    shuffled_product_FK, shuffled_ends_FK: the expectations of these two over all orders of the values inside each
    stretch: pairs_s (S^2 - Q) / (n (n - 1)) and 2 pairs_s S / n; stretch s has n tokens, sum S, sum of squares Q.
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

    def add_dense(self, acts_BLD: Tensor, layout: LagPairs) -> None:
        """Add a dense signal (the raw stream), one series per dimension. In float64: means may far exceed variances."""
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
    """List (row, first position, one past the last position) of each stretch, in order."""
    spans = []
    for b, stretch_L in enumerate(stretch_BL):
        valid_T = np.flatnonzero(stretch_L >= 0)
        if valid_T.size:
            cuts = np.flatnonzero(np.diff(stretch_L[valid_T])) + 1
            spans += [(b, int(part[0]), int(part[-1]) + 1) for part in np.split(valid_T, cuts)]
    return spans


@dataclass
class CodeSums(Summed):
    """Sums over the codes of one SAE for all consistency and position metrics.

    value, firing: pair sums of the codes and of their on/off indicator.  runs_F: maximal runs of consecutive on
    positions inside a stretch.  rows_F: rows in which a latent fires.  between_F: sum over stretches of (sum of f)^2 /
    n, for the variance between documents.  steepest_F: sum over the rows in which a latent fires of its largest
    |f_t - f_{t-1}| / ||x_t - x_{t-1}||, divided by the number of latents that fire in the row (T-SAE smoothness).
    l0_L, l0_square_L: sums of L0 and of its square by position.  n_rows: rows with a valid position;
    n_rows_with_steps: those of them that smoothness was measured on.
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

    def add(self, layout: LagPairs, order: PairsByLatent, step_BL: Tensor | None = None) -> None:
        """Add one batch.

        step_BL: ||x_t - x_{t-1}|| of the raw activations, needed for smoothness only; column 0 is not read.
        Raises ValueError for codes of another number of latents or positions.
        """
        if order.n_latents != self.n_latents or layout.shape[1] != self.counts.tokens_L.size:
            raise ValueError("these codes have another number of latents or positions than the accumulator")
        self.counts.add(layout)
        self.n_rows += layout.valid_rows()
        self.n_stretches += layout.size_S.size
        l0_BL = np.bincount(order.token_Q, minlength=layout.stretch_N.size).reshape(layout.shape).astype(np.float64)
        self.l0_L += l0_BL.sum(0)
        self.l0_square_L += (l0_BL**2).sum(0)
        if step_BL is None:
            inverse_step_N = np.zeros(0)
        else:
            self.n_rows_with_steps += layout.valid_rows()
            step_N = step_BL.detach().cpu().double().numpy().ravel()
            inverse_step_N = np.divide(1.0, step_N, out=np.zeros_like(step_N), where=step_N > 0)
        places = (layout.stretch_N, layout.left_N, layout.right_N)
        distinct_B = _distinct_latents(order.ptr_F, order.token_Q, layout.shape[0], layout.shape[1])
        _add_latents(
            order.ptr_F,
            order.token_Q,
            order.value_Q,
            (np.asarray(layout.lags, np.int64), *places, layout.size_S, layout.pairs_SK),
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
            sum_s = square_s = count_s = 0.0
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


@numba.njit(cache=True, parallel=True)
def _add_latents(start_F, token_P, value_P, layout, n_positions, inverse_step_N, distinct_B, sums):  # type: ignore[no-untyped-def]
    # Each latent is done by one thread from start to end, so the result does not depend on the number of threads.
    for i in numba.prange(start_F.size - 1):
        _add_latent(i, start_F, token_P, value_P, layout, n_positions, inverse_step_N, distinct_B, sums)


DENSE_RATE = 0.1
ROUNDING = 1e-12  # a constant series leaves a variance of about 1e-16 of its mean square


def firing_rate(sums: CodeSums) -> Floats:
    """Compute each latent's share of valid positions where it is on, p_i."""
    return sums.firing.total_F / max(sums.counts.n_tokens, 1.0)


def share_between_groups(sums: CodeSums, squares_F: Floats, groups: float) -> Floats:
    """Compute epsilon squared, (SSB - (G - 1) MSW) / SST (Kelley 1935): eta squared less its mean for equal groups.

    squares_F: sum over groups of (sum of f)^2 / n. NaN where the latent does not vary or a group is a token.
    """
    n = max(sums.counts.n_tokens, 1.0)
    correction_F = sums.value.total_F**2 / n
    total_F = sums.value.square_F - correction_F
    total_F = np.where(total_F > ROUNDING * sums.value.square_F, total_F, np.nan)
    between_F = squares_F - correction_F
    noise_F = (total_F - between_F) / (n - groups) if n > groups else np.nan
    return (between_F - (groups - 1.0) * noise_F) / total_F
