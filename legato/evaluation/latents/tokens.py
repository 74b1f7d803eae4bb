"""Information of a latent about the current token, from sparse counts of (latent, token).

Shape legend: F latents, V token ids, P (latent, token) pairs that occur, N flat tokens, C distinct token counts.
"""

from dataclasses import dataclass, field

import numba
import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from legato.evaluation.sums.accumulators import Summed
from legato.evaluation.sums.lag_pairs import Floats, Ints, LagPairs
from legato.sae.kernels.pairs import PairsByLatent

TOP_TOKENS = 3
_TOKEN_BITS = 32
_PENDING = 1 << 20


@dataclass
class TokenCounts(Summed):
    """Counts of the valid positions of each token, and of those where each latent fires.

    Only pairs that occur are stored, 16 bytes each: at most one per firing, whatever F and V are.
    key_P: latent << 32 | token, increasing. count_P: positions. tokens_V: positions of each token, as long as the
    largest id seen.
    """

    n_latents: int
    tokens_V: Ints = field(default_factory=lambda: np.zeros(0, np.int64))
    key_P: Ints = field(default_factory=lambda: np.zeros(0, np.int64))
    count_P: Ints = field(default_factory=lambda: np.zeros(0, np.int64))
    _pending: list[Ints] = field(default_factory=list)
    _n_pending: int = 0

    def add(self, tokens_BL: Tensor, layout: LagPairs, order: PairsByLatent) -> None:
        """Add a batch. tokens_BL: token ids, read at valid positions only."""
        if order.n_latents != self.n_latents or tuple(tokens_BL.shape) != layout.shape:
            raise ValueError("these tokens or codes have another shape than the accumulator or the mask")
        tokens_N = tokens_BL.detach().cpu().numpy().astype(np.int64).ravel()
        self.tokens_V = _longer_sum(self.tokens_V, np.bincount(tokens_N[layout.stretch_N >= 0]))
        latent_P = np.repeat(np.arange(self.n_latents, dtype=np.int64), np.diff(order.ptr_F))
        self._pending.append(latent_P << _TOKEN_BITS | tokens_N[order.token_Q])
        self._n_pending += latent_P.size
        if self._n_pending >= max(_PENDING, self.key_P.size):  # so that merging costs O(log) a firing
            self._flush()

    def merge(self, other: Summed) -> None:
        assert isinstance(other, TokenCounts)
        assert other.n_latents == self.n_latents, "cannot merge sums over different latents"
        self._flush()
        other._flush()
        self.tokens_V = _longer_sum(self.tokens_V, other.tokens_V)
        self._add_pairs(other.key_P, other.count_P)

    @property
    def n_tokens(self) -> int:
        return int(self.tokens_V.sum())

    def pairs(self) -> tuple[Ints, Ints, Ints]:
        """Return (latent_P, token_P, count_P), by latent, then by token."""
        self._flush()
        return self.key_P >> _TOKEN_BITS, self.key_P & ((1 << _TOKEN_BITS) - 1), self.count_P

    def _flush(self) -> None:
        if self._pending:
            key_P, count_P = np.unique(np.concatenate(self._pending), return_counts=True)
            self._pending, self._n_pending = [], 0
            self._add_pairs(key_P, count_P)

    def _add_pairs(self, key_P: Ints, count_P: Ints) -> None:
        keys, counts = np.concatenate([self.key_P, key_P]), np.concatenate([self.count_P, count_P])
        order = np.argsort(keys, kind="stable")  # two sorted runs: one merge
        keys = keys[order]
        first = np.flatnonzero(np.diff(keys, prepend=-1))
        self.key_P = keys[first]
        self.count_P = np.add.reduceat(counts[order], first) if first.size else counts


def _longer_sum(a_V: NDArray[np.int64], b_V: NDArray[np.int64]) -> Ints:
    longer, shorter = (a_V, b_V) if a_V.size >= b_V.size else (b_V, a_V)
    total = longer.astype(np.int64)
    total[: shorter.size] += shorter
    return total


@dataclass(frozen=True)
class TokenInformation:
    """Numbers of each latent, in nats: plug-in mutual information of firing and token, its Miller-Madow correction,
    its expectation for firings shuffled over all positions, and the entropy of firing."""

    plug_in_F: Floats
    correction_F: Floats
    shuffled_F: Floats
    entropy_F: Floats

    @property
    def miller_madow_F(self) -> Floats:
        return self.plug_in_F - self.correction_F

    @property
    def adjusted_F(self) -> Floats:
        """Compute (I - E I) / (H - E I): 0 by chance, 1 where the token decides (Vinh, Epps & Bailey 2010).

        NaN where the latent never fires, never stops, or fires too rarely to tell chance from a rule.
        """
        room_F = self.entropy_F - self.shuffled_F
        defined_F = room_F > 1e-9 * self.entropy_F
        return np.divide(self.plug_in_F - self.shuffled_F, room_F, out=np.full(room_F.size, np.nan), where=defined_F)


def token_information(sums: TokenCounts) -> TokenInformation:
    """Compute the mutual information of firing (on / off) and the id of the current token.

    With k of a token's c positions on, n of N positions on, and h(x) = x log x:
        N I = sum over tokens of (h(k) + h(c - k) - h(c)) - h(n) - h(N - n) + h(N),
    to which tokens that the latent never fires on add nothing.
    The Miller-Madow correction is (m_joint - m_firing - m_token + 1) / (2 N), m = cells seen (Miller 1955). It is the
    first term of a series in 1 / count: with thousands of tokens and tens of firings most cells hold one firing, and
    it removes only a tenth of the bias. So the exact expectation for firings shuffled over all positions is given too:
    k is then hypergeometric (Vinh, Epps & Bailey 2010).
    """
    latent_P, token_P, count_P = sums.pairs()
    F, N = sums.n_latents, sums.n_tokens
    on_F = np.bincount(latent_P, weights=count_P, minlength=F)
    firing_F = _h(on_F) + _h(N - on_F) - _h(N)
    total_P = sums.tokens_V[token_P]
    cells_F = np.bincount(latent_P, weights=_h(count_P) + _h(total_P - count_P) - _h(total_P), minlength=F)
    seen = np.count_nonzero(sums.tokens_V)
    # on cells: one per pair; off cells: every token but those that the latent always fires on
    joint_F = np.bincount(latent_P, minlength=F) + seen - np.bincount(latent_P, weights=count_P == total_P, minlength=F)
    correction_F = joint_F - ((on_F > 0).astype(np.int64) + (on_F < N)) - seen + 1
    distinct_F, back_F = np.unique(on_F.astype(np.int64), return_inverse=True)
    counts_C, multiplicity_C = np.unique(sums.tokens_V[sums.tokens_V > 0], return_counts=True)
    shuffled_F = _expected_cells(distinct_F, counts_C, multiplicity_C.astype(np.float64), N)[back_F]
    n = max(N, 1)
    return TokenInformation(
        (cells_F - firing_F) / n, correction_F / (2.0 * n), (shuffled_F - firing_F) / n, -firing_F / n
    )


def _h(x: NDArray[np.int64] | Floats | int) -> Floats:
    value = np.asarray(x, np.float64)
    return value * np.log(np.where(value > 0, value, 1.0))


@numba.njit(cache=True)
def _xlogx(x):  # type: ignore[no-untyped-def]
    return x * np.log(x) if x > 0 else 0.0


@numba.njit(cache=True, parallel=True)
def _expected_cells(on_X, counts_C, multiplicity_C, N):  # type: ignore[no-untyped-def]
    """Compute E sum over tokens of h(k) + h(c - k) - h(c), k ~ Hypergeometric(N, c, n), for each n in on_X."""
    result = np.zeros(on_X.size)
    for x in numba.prange(on_X.size):
        n = on_X[x]
        total = 0.0
        for j in range(counts_C.size):
            c = counts_C[j]
            low, high = max(0, n + c - N), min(n, c)
            mode = min(high, max(low, (n + 1) * (c + 1) // (N + 2)))
            value = _xlogx(mode) + _xlogx(c - mode)  # weights relative to the mode's, divided by their sum at the end
            mass = 1.0
            weight = 1.0
            k = mode
            while k < high and weight > 1e-18:
                weight *= (c - k) / (k + 1) * ((n - k) / (N - c - n + k + 1))
                k += 1
                value += weight * (_xlogx(k) + _xlogx(c - k))
                mass += weight
            weight = 1.0
            k = mode
            while k > low and weight > 1e-18:
                weight *= k / (c - k + 1) * ((N - c - n + k) / (n - k + 1))
                k -= 1
                value += weight * (_xlogx(k) + _xlogx(c - k))
                mass += weight
            total += multiplicity_C[j] * (value / mass - _xlogx(c))
        result[x] = total
    return result


def token_features(sums: TokenCounts) -> dict[str, np.ndarray]:
    """Return per-latent columns (see table.py); NaN where undefined."""
    information = token_information(sums)
    fires_F = information.entropy_F > 0
    share_F = np.divide(
        information.miller_madow_F, information.entropy_F, out=np.full(fires_F.size, np.nan), where=fires_F
    )
    token_FT, top_share_F = _top_tokens(sums)
    tops = {f"top_token{rank + 1 if rank else ''}": token_FT[:, rank] for rank in range(TOP_TOKENS)}
    return {
        "token_mi": information.miller_madow_F,
        "token_mi_share": share_F,
        "token_mi_adjusted": information.adjusted_F,
        **tops,
        "top_token_share": top_share_F,
    }


def _top_tokens(sums: TokenCounts) -> tuple[Floats, Floats]:
    """Find the ids each latent fires on most, [F, TOP_TOKENS] (ties: smaller id first), and the first one's share."""
    latent_P, token_P, count_P = sums.pairs()
    order_P = np.lexsort((token_P, -count_P, latent_P))
    start_F = np.searchsorted(latent_P, np.arange(sums.n_latents + 1))
    token_FT = np.full((sums.n_latents, TOP_TOKENS), np.nan)
    for rank in range(TOP_TOKENS):
        has_F = np.diff(start_F) > rank
        token_FT[has_F, rank] = token_P[order_P[start_F[:-1][has_F] + rank]]
    on_F = np.bincount(latent_P, weights=count_P, minlength=sums.n_latents)
    share_F = np.full(sums.n_latents, np.nan)
    fires_F = on_F > 0
    share_F[fires_F] = count_P[order_P[start_F[:-1][fires_F]]] / on_F[fires_F]
    return token_FT, share_F
