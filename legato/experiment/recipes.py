"""The recipes of --temporal by name: changes to the baseline. `A+B` makes both changes."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

from legato.sae.architectures import (
    Architecture,
    Gated,
    Hysteresis,
    HysteresisTopK,
    JumpReLU,
    Persistent,
    ReLU,
    TopK,
    WindowTopK,
    all_architectures,
)
from legato.training.losses import (
    Contrastive,
    FusedLasso,
    PositionPenalty,
    Slowness,
    TemporalLoss,
    TsaeContrastive,
    WindowGroupLasso,
    WindowVariance,
    losses,
)

LEGATO_TERM = Slowness(window=4, coefficient=0.05)  # beside hysteresis on TopK: docs/findings.md has the reasons
MATRYOSHKA = ((0.2, 0.2), (1.0, 0.8))  # share of the latents, weight: the groups of temporal-saes


@dataclass(frozen=True)
class Options:
    """The flags that recipes read, under their names, and the width of the activations."""

    d_in: int
    k: int
    window: int
    coefficient: float | None
    slow_fraction: float
    lags: tuple[int, ...]
    temperature: float
    l1: float
    release: float

    def weight(self, default: float) -> float:
        """Return --coefficient, or the term's default."""
        return default if self.coefficient is None else self.coefficient


@dataclass(frozen=True)
class Recipe:
    """A change to the baseline: fields of its SAEConfig; `terms` are added to those that it has.

    kind: an arm has at most one recipe of the kind "architecture" and one of the kind "groups".
    """

    kind: str
    fields: Callable[[Options], dict[str, Any]]


def _architecture(make: Callable[[Options], Architecture]) -> Recipe:
    return Recipe("architecture", lambda o: {"architecture": make(o)})


def _term(make: Callable[[Options], TemporalLoss]) -> Recipe:
    return Recipe("term", lambda o: {"terms": (make(o),)})


def _published_tsae(d_in: int) -> TsaeContrastive:
    """Make the published T-SAE term, its weights converted to our units.

    temporal-saes adds .1 * InfoNCE at temperature 1 to the mean over its two groups of w_g times the squared error. On
    activations of unit mean square (its normalize_activations; on raw ones of norm 6e3 the term would vanish beside the
    error) that is, on ours of mean square D beside sum_g w_g ||e_g||^2 / D, temperature D and weight .2.
    """
    return TsaeContrastive(coefficient=0.2, temperature=float(d_in))


RECIPES: dict[str, Recipe] = {
    "legato": Recipe(
        "architecture", lambda o: {"architecture": HysteresisTopK(o.k, release=o.release), "terms": (LEGATO_TERM,)}
    ),
    "hysteresis": _architecture(lambda o: Hysteresis(o.k, release=o.release)),
    "hysteresis_topk": _architecture(lambda o: HysteresisTopK(o.k, release=o.release)),
    "window_topk": _architecture(lambda o: WindowTopK(o.k, window=o.window)),
    "persistent": _architecture(lambda o: Persistent(o.k)),
    "topk": _architecture(lambda o: TopK(o.k)),
    "jumprelu": _architecture(lambda o: JumpReLU(o.k)),
    "gated": _architecture(lambda o: Gated(k=o.k)),
    "relu": _architecture(lambda o: ReLU(o.l1)),
    "window_group_lasso": Recipe(
        "architecture", lambda o: {"architecture": ReLU(0.0), "terms": (WindowGroupLasso(o.window, o.l1 / o.d_in),)}
    ),
    "matryoshka": Recipe("groups", lambda o: {"groups": MATRYOSHKA}),
    "tsae": Recipe("groups", lambda o: {"groups": MATRYOSHKA, "terms": (_published_tsae(o.d_in),)}),
    "contrastive": _term(
        lambda o: Contrastive(o.weight(0.02), lags=o.lags, temperature=o.temperature, slow_fraction=o.slow_fraction)
    ),
    "window_variance": _term(lambda o: WindowVariance(o.window, o.weight(0.3), slow_fraction=o.slow_fraction)),
    "slowness": _term(lambda o: Slowness(o.window, o.weight(0.1), slow_fraction=o.slow_fraction)),
    "fused_lasso": _term(lambda o: FusedLasso(o.weight(0.1), slow_fraction=o.slow_fraction)),
    "position_penalty": _term(lambda o: PositionPenalty(o.weight(0.1), slow_fraction=o.slow_fraction)),
    "shuffled": Recipe("control", lambda o: {"shuffle_positions": True}),
    "frozen_decoder": Recipe("control", lambda o: {"freeze_decoder": True}),
}


# Registered architectures that have another name above, or are the baseline's own.
_KNOWN = ("standard", "batchtopk")


def recipes() -> dict[str, Recipe]:
    """RECIPES, and one for each further architecture and loss that a file of its own defines.

    Such a one gets those of the options that its fields are named after.
    """
    found = dict(RECIPES)
    for name, architecture in all_architectures().items():
        if name not in _KNOWN:
            found.setdefault(name, _architecture(partial(_made, architecture)))
    for name, loss in losses().items():
        found.setdefault(name, _term(partial(_made, loss)))
    return found


def _made(kind: type, options: Options) -> Any:
    given = {field.name: getattr(options, field.name, None) for field in fields(kind)}
    return kind(**{name: value for name, value in given.items() if value is not None})


def names_of(kind: str) -> tuple[str, ...]:
    """The recipes of a kind."""
    return tuple(name for name, recipe in recipes().items() if recipe.kind == kind)
