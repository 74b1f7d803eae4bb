"""Planted sources: their properties and their firings.

Shape legend: B rows, L positions, F sources.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from legato.common.errors import UsageError

Floats = NDArray[np.float64]
Range = tuple[float, float]

# Mean 0 and within -1..1 over the context, so that a source keeps its rate and no probability is negative.
PROFILES = ("ramp", "fall", "first_half", "second_half")


@dataclass(frozen=True)
class Family:
    """Sources drawn alike: each property evenly spread over its range, in an order of its own, so that no property
    depends on another.

    rate: share of positions where the source is on (spread evenly in its logarithm, like topic and magnitude).
    persistence: rho, the correlation of on/off between adjacent tokens of one document; rho^lag at a lag.
    position: swing of the rate around its mean along the context, 0 (flat) to 1 (down to 0, up to twice).
    topic: share of the documents in which the source can be on.
    magnitude: mean code where it is on. spread: standard deviation of the log of the code around it.
    magnitude_persistence: correlation of the log code between adjacent tokens.
    """

    rate: Range = (0.01, 0.05)
    persistence: Range = (0.0, 0.0)
    position: Range = (0.0, 0.0)
    topic: Range = (1.0, 1.0)
    magnitude: Range = (1.0, 1.0)
    spread: Range = (0.3, 0.3)
    magnitude_persistence: Range = (0.0, 0.0)

    def __post_init__(self) -> None:
        for name in (f.name for f in fields(self)):
            least, most = 0.0, np.inf if name in ("magnitude", "spread") else 1.0
            low, high = getattr(self, name)
            if not least <= low <= high <= most or (name in ("rate", "topic", "magnitude") and low == 0):
                raise UsageError(f"sources: {name} {low} to {high} must be a range within {least:g} to {most:g}")
        worst = self.rate[1] / self.topic[0] * (1 + self.position[1])
        if worst > 1:
            raise UsageError(
                f"sources: rate {self.rate[1]:g} in a share {self.topic[0]:g} of the documents needs a probability of "
                f"{worst:.3g}: lower the rate or the position swing, or widen the topic"
            )


FAMILIES = {
    "mixed": Family(
        persistence=(0.0, 0.9),
        position=(0.0, 1.0),
        topic=(0.1, 1.0),
        magnitude=(0.7, 1.4),
        magnitude_persistence=(0.0, 0.9),
    ),
    "iid": Family(),
    "persistent": Family(persistence=(0.6, 0.9)),
    "topic": Family(topic=(0.1, 0.3)),
    "position": Family(position=(0.5, 1.0)),
}


@dataclass(frozen=True)
class Sources:
    """The planted properties, one value per source (see Family). profile_F: places in PROFILES."""

    rate_F: Floats
    persistence_F: Floats
    position_F: Floats
    topic_F: Floats
    magnitude_F: Floats
    spread_F: Floats
    magnitude_persistence_F: Floats
    profile_F: NDArray[np.int64]

    @property
    def count(self) -> int:
        return self.rate_F.size

    @property
    def l0(self) -> float:
        """Mean number of sources that are on at a token."""
        return float(self.rate_F.sum())

    def rate_LF(self, length: int) -> Floats:
        """Compute the probability that each source is on, by position."""
        shapes_LF = profile_shapes(length)[:, self.profile_F]
        return self.rate_F * (1 + self.position_F * shapes_LF)

    def planted(self, length: int) -> dict[str, Floats]:
        """Return the properties that metrics are ranked against. position: coefficient of variation of the rate along
        the context; topic: 1 less the share of documents."""
        rate_LF = self.rate_LF(length)
        return {
            "persistence": self.persistence_F,
            "rate": self.rate_F,
            "magnitude": self.magnitude_F,
            "magnitude_persistence": self.magnitude_persistence_F,
            "position": rate_LF.std(0) / self.rate_F,
            "topic": 1 - self.topic_F,
        }

    @classmethod
    def draw(cls, families: Sequence[tuple[Family, int]], rng: np.random.Generator) -> "Sources":
        """Draw `count` sources of each family, one after the other."""
        parts = [_drawn(family, count, rng) for family, count in families]
        return cls(**{f.name: np.concatenate([part[f.name] for part in parts]) for f in fields(cls)})


def _drawn(family: Family, count: int, rng: np.random.Generator) -> dict[str, NDArray[Any]]:
    def spread_out(bounds: Range, logarithmic: bool) -> Floats:
        low, high = np.log(bounds) if logarithmic else bounds
        values_F = low + (high - low) * (rng.permutation(count) + 0.5) / count
        return np.exp(values_F) if logarithmic else values_F

    columns = {
        f"{f.name}_F": spread_out(getattr(family, f.name), f.name in ("rate", "topic", "magnitude"))
        for f in fields(family)
    }
    return {**columns, "profile_F": rng.permutation(count) % len(PROFILES)}


def profile_shapes(length: int) -> Floats:
    """Return the shapes of PROFILES, [L, 4]."""
    ramp_L = np.linspace(-1, 1, length)
    half_L = np.where(np.arange(length) < length // 2, 1.0, -1.0)
    half_L -= half_L.mean()
    half_L /= np.abs(half_L).max()
    return np.stack([ramp_L, -ramp_L, half_L, -half_L], 1)


def fire(sources: Sources, starts_BL: NDArray[np.bool_], rng: np.random.Generator) -> NDArray[np.float32]:
    """Draw code_BLF of rows whose documents begin where starts_BL is True (and at position 0): positive where a source
    is on, 0 elsewhere.

    Each source carries a uniform number that a token keeps with probability rho and draws anew otherwise; it is on
    where that number lies below the rate of the position. With a flat profile this is the two-state Markov chain with
    stationary rate p and P(on | on) = rho + (1 - rho) p, and with any profile the rate is exact at every position. For
    each document it is drawn whether it has the source's topic. Log codes are kept and drawn anew in the same way, with
    their own persistence.
    """
    chance_FL = np.ascontiguousarray((sources.rate_LF(starts_BL.shape[1]) / sources.topic_F).T)
    return _fire(
        starts_BL,
        chance_FL,
        sources.topic_F,
        sources.persistence_F,
        sources.magnitude_F * np.exp(-(sources.spread_F**2) / 2),
        sources.spread_F,
        sources.magnitude_persistence_F,
        rng,
    )


@numba.njit(cache=True)
def _fire(starts_BL, chance_FL, topic_F, keep_F, scale_F, spread_F, keep_code_F, rng):  # type: ignore[no-untyped-def]
    F, L = chance_FL.shape
    B = len(starts_BL)
    code_BLF = np.zeros((B, L, F), np.float32)
    for b in range(B):
        for i in range(F):
            level = 0.0
            log_code = 0.0
            last_on = -1  # of this document
            is_topic = False
            for t in range(L):
                opens = t == 0 or starts_BL[b, t]
                if opens:
                    is_topic = topic_F[i] >= 1.0 or rng.random() < topic_F[i]
                    last_on = -1
                if not is_topic:
                    continue
                if opens or keep_F[i] == 0.0 or rng.random() >= keep_F[i]:
                    level = rng.random()
                if level < chance_FL[i, t]:
                    # kept over each token in between, whether the source was on there or not
                    if last_on < 0 or rng.random() >= keep_code_F[i] ** (t - last_on):
                        log_code = rng.standard_normal()
                    last_on = t
                    code_BLF[b, t, i] = scale_F[i] * np.exp(spread_F[i] * log_code)
    return code_BLF
