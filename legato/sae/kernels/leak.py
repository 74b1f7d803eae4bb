"""A leak along the sequence: h_t = l h_{t-1} + (1 - l) a_t, on active pairs and back, and on dense codes.

Shape legend: B rows, L positions, N flat tokens, F latents, Q input pairs by latent, H pairs with a code by latent.
"""

from typing import NamedTuple

import numpy as np
from numba import njit, prange

from legato.sae.kernels.pairs import Array, Pairs, PairsByLatent, by_token
from legato.sae.segments import Segments


class Carried(NamedTuple):
    """Codes by latent, tokens ascending, those of latent f in ptr_F[f]:ptr_F[f+1]. input_H: the place among the input
    pairs of what entered at that token, -1 where nothing did. linked_H: whether the code carries on the one before."""

    ptr_F: Array
    token_H: Array
    latent_H: Array
    value_H: Array
    input_H: Array
    linked_H: Array

    def pairs(self, N: int) -> Pairs:
        """Return the codes in token order."""
        return by_token(self.token_H, self.latent_H, self.value_H, N)


def leak_forward(order: PairsByLatent, leak_F: Array, tail: float, layout: Segments) -> Carried:
    """The codes h of the input pairs a (in `order`); a stretch ends where no input is and h < tail * its peak."""
    F = len(leak_F)
    arrays = (order.ptr_F, order.token_Q, order.value_Q, leak_F, leak_F.dtype.type(tail), layout.start_N, layout.end_N)
    count_F = np.zeros(F + 1, np.int64)
    nothing = np.empty(0, np.int32)
    _leak_forward(*arrays, count_F[1:], nothing, nothing, order.value_Q[:0], nothing, np.empty(0, np.bool_), False)
    ptr_F = np.cumsum(count_F)
    H = int(ptr_F[-1])
    token_H, latent_H, input_H = (np.empty(H, np.int32) for _ in range(3))
    value_H, linked_H = np.empty(H, order.value_Q.dtype), np.empty(H, np.bool_)
    _leak_forward(*arrays, ptr_F[:-1], token_H, latent_H, value_H, input_H, linked_H, True)
    return Carried(ptr_F, token_H, latent_H, value_H, input_H, linked_H)


@njit(parallel=True, cache=True)
def _leak_forward(
    ptr_F, token_Q, value_Q, leak_F, tail, start_N, end_N, at_F, token_H, latent_H, value_H, input_H, linked_H, fill
):
    """Without `fill`: at_F[f] = the number of codes of latent f. With it: codes written from at_F[f] on."""
    one = value_Q.dtype.type(1)
    for f in prange(ptr_F.shape[0] - 1):
        leak = leak_F[f]
        i = at_F[f] if fill else 0
        for q in range(ptr_F[f], ptr_F[f + 1]):
            t = token_Q[q]
            if q == ptr_F[f] or start_N[t] != start_N[token_Q[q - 1]]:
                h = peak = value_Q.dtype.type(0)
            linked = h > 0
            h = leak * h + (one - leak) * value_Q[q]
            peak = max(peak, h)
            if fill:
                token_H[i], latent_H[i], value_H[i], input_H[i], linked_H[i] = t, f, h, q, linked
            i += 1
            until = end_N[t] if q + 1 == ptr_F[f + 1] else min(end_N[t], token_Q[q + 1])
            for later in range(t + 1, until):
                h = leak * h
                if h < tail * peak:
                    h = peak = value_Q.dtype.type(0)
                    break
                if fill:
                    token_H[i], latent_H[i], value_H[i], input_H[i], linked_H[i] = later, f, h, -1, True
                i += 1
        if not fill:
            at_F[f] = i


@njit(parallel=True, cache=True)
def leak_backward(carried: Carried, gradient_H: Array, order: PairsByLatent, leak_F: Array) -> tuple[Array, Array]:
    """Derivatives by the inputs (Q) and by the leaks (F), from those by the codes; where stretches end is taken as
    given."""
    ptr_F, _, _, value_H, input_H, linked_H = carried
    value_Q = order.value_Q
    gradient_Q = np.empty_like(value_Q)
    by_leak_F = np.empty(len(leak_F))
    one = value_Q.dtype.type(1)
    for f in prange(len(leak_F)):
        leak = leak_F[f]
        later = value_Q.dtype.type(0)
        by_leak = 0.0
        for i in range(ptr_F[f + 1] - 1, ptr_F[f] - 1, -1):
            total = gradient_H[i] + later
            entered = value_Q.dtype.type(0)
            if input_H[i] >= 0:
                entered = value_Q[input_H[i]]
                gradient_Q[input_H[i]] = (one - leak) * total
            before = value_H[i - 1] if linked_H[i] else value_Q.dtype.type(0)
            by_leak += total * (before - entered)
            later = leak * total if linked_H[i] else value_Q.dtype.type(0)
        by_leak_F[f] = by_leak
    return gradient_Q, by_leak_F
