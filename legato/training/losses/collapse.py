"""Checks that a temporal term improves its latents and does not only switch them off.

Shape legend: F latents, Q active pairs sorted by latent.
"""

from collections.abc import Mapping

import numpy as np

from legato.sae.groups import leading_count
from legato.sae.kernels.pairs import PairsByLatent
from legato.training.losses.base import Array, leading_pairs

DENSE = 0.1  # a latent that fires on more than this share of the tokens is dense


def group_diagnostics(order: PairsByLatent, n_valid: int, slow_fraction: float, dead_F: Array) -> dict[str, float]:
    """The state of the leading `slow_fraction` of the latents (all of them: 1) on a batch of n_valid valid tokens.

    dead_F: bool, latents that the trainer holds dead; one batch is too short to tell a dead latent from a rare one.
    group_latents, group_l0 (active per token), group_mass_share (of the sum of all codes; 0 where nothing fires),
    group_dead and group_dense (latents; dense: on more than a tenth of the tokens), group_norm and code_norm (root of
    the mean over tokens of the squared norm of the group's codes, of all codes).

    Latent 0 fires with 1 on both tokens, latent 1 with 2 on one of them:

    >>> from legato.sae.kernels.pairs import sort_by_latent
    >>> order = sort_by_latent(np.array([0, 0, 1]), np.array([0, 1, 0]), np.array([1.0, 2.0, 1.0]), 2)
    >>> group_diagnostics(order, n_valid=2, slow_fraction=0.5, dead_F=np.zeros(2, bool))["group_mass_share"]
    0.5
    """
    slow = leading_pairs(order, slow_fraction)
    n_latents = leading_count(len(order.ptr_F) - 1, slow_fraction)
    mass, slow_mass = (float(pairs.value_Q.sum(dtype=np.float64)) for pairs in (order, slow))
    power, slow_power = (float(np.square(pairs.value_Q, dtype=np.float64).sum()) for pairs in (order, slow))
    return {
        "group_latents": float(n_latents),
        "group_l0": len(slow.value_Q) / n_valid,
        "group_mass_share": slow_mass / mass if mass else 0.0,
        "group_dead": float(dead_F[:n_latents].sum()),
        "group_dense": float((np.diff(slow.ptr_F) > DENSE * n_valid).sum()),
        "group_norm": (slow_power / n_valid) ** 0.5,
        "code_norm": (power / n_valid) ** 0.5,
    }


def collapse(start: Mapping[str, float], now: Mapping[str, float]) -> str | None:
    """Say in one line what has collapsed between two `group_diagnostics` of a run, or None.

    The rule: the group's L0 below 20 % of its start, its share of the mass halved, or more than half of it dead.

    >>> start = {"group_l0": 8.0, "group_mass_share": 0.25, "group_latents": 16, "group_dead": 0}
    >>> collapse(start, {**start, "group_l0": 1.0})
    'the penalised group collapsed: L0 fell from 8 to 1'
    """
    reasons = []
    if now["group_l0"] < 0.2 * start["group_l0"]:
        reasons.append(f"L0 fell from {start['group_l0']:.3g} to {now['group_l0']:.3g}")
    if start["group_mass_share"] > 0 and now["group_mass_share"] <= 0.5 * start["group_mass_share"]:
        reasons.append(f"mass share fell from {start['group_mass_share']:.3g} to {now['group_mass_share']:.3g}")
    if now["group_dead"] > 0.5 * now["group_latents"]:
        reasons.append(f"{now['group_dead']:.0f} of {now['group_latents']:.0f} latents are dead")
    return f"the penalised group collapsed: {', '.join(reasons)}" if reasons else None
