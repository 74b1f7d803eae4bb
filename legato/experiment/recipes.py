"""The recipes of --temporal by name: changes to the baseline. `A+B` makes both changes."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

from legato.sae import architectures as kinds
from legato.training import losses as terms

# Beside hysteresis on TopK: docs/findings.md has the reasons.
LEGATO_TERM = terms.Slowness(window=4, coefficient=0.05)
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


def _architecture(make: Callable[[Options], kinds.Architecture]) -> Recipe:
    return Recipe("architecture", lambda o: {"architecture": make(o)})


def _term(make: Callable[[Options], terms.TemporalLoss]) -> Recipe:
    return Recipe("term", lambda o: {"terms": (make(o),)})


def _published_tsae(options: Options) -> dict[str, Any]:
    """Make the objective of the published T-SAE, its weights converted to our units.

    temporal-saes adds .1 * InfoNCE at temperature 1 to the mean over its two groups of w_g times the squared error. On
    activations of unit mean square (its normalize_activations; on raw ones of norm 6e3 the term would vanish beside the
    error) that is, on ours of mean square D beside sum_g w_g ||e_g||^2 / D, temperature D and weight .2.
    """
    term = terms.TsaeContrastive(coefficient=0.2, temperature=float(options.d_in))
    return {"groups": MATRYOSHKA, "terms": (term,)}


RECIPES: dict[str, Recipe] = {
    "legato": Recipe(
        "architecture",
        lambda o: {"architecture": kinds.HysteresisTopK(o.k, release=o.release), "terms": (LEGATO_TERM,)},
    ),
    "hysteresis": _architecture(lambda o: kinds.Hysteresis(o.k, release=o.release)),
    "hysteresis_topk": _architecture(lambda o: kinds.HysteresisTopK(o.k, release=o.release)),
    "window_topk": _architecture(lambda o: kinds.WindowTopK(o.k, window=o.window)),
    "persistent": _architecture(lambda o: kinds.Persistent(o.k)),
    "topk": _architecture(lambda o: kinds.TopK(o.k)),
    "jumprelu": _architecture(lambda o: kinds.JumpReLU(o.k)),
    "gated": _architecture(lambda o: kinds.Gated(k=o.k)),
    "relu": _architecture(lambda o: kinds.ReLU(o.l1)),
    "window_group_lasso": Recipe(
        "architecture",
        lambda o: {"architecture": kinds.ReLU(0.0), "terms": (terms.WindowGroupLasso(o.window, o.l1 / o.d_in),)},
    ),
    "matryoshka": Recipe("groups", lambda o: {"groups": MATRYOSHKA}),
    "tsae": Recipe("groups", _published_tsae),
    "contrastive": _term(
        lambda o: terms.Contrastive(
            o.weight(0.02), lags=o.lags, temperature=o.temperature, slow_fraction=o.slow_fraction
        )
    ),
    "window_variance": _term(lambda o: terms.WindowVariance(o.window, o.weight(0.3), slow_fraction=o.slow_fraction)),
    "slowness": _term(lambda o: terms.Slowness(o.window, o.weight(0.1), slow_fraction=o.slow_fraction)),
    "fused_lasso": _term(lambda o: terms.FusedLasso(o.weight(0.1), slow_fraction=o.slow_fraction)),
    "position_penalty": _term(lambda o: terms.PositionPenalty(o.weight(0.1), slow_fraction=o.slow_fraction)),
    "shuffled": Recipe("control", lambda o: {"shuffle_positions": True}),
    "frozen_decoder": Recipe("control", lambda o: {"freeze_decoder": True}),
}


def recipes() -> dict[str, Recipe]:
    """RECIPES, and one for each further architecture and loss that a file of its own defines.

    Such a one gets those of the options that its fields are named after.
    """
    found = dict(RECIPES)
    for name, architecture in kinds.all_architectures().items():
        if name not in ("standard", "batchtopk"):  # they have another name above, or are the baseline's own
            found.setdefault(name, _architecture(partial(_made, architecture)))
    for name, loss in terms.losses().items():
        found.setdefault(name, _term(partial(_made, loss)))
    return found


def _made(kind: type, options: Options) -> Any:
    given = {field.name: getattr(options, field.name, None) for field in fields(kind)}
    return kind(**{name: value for name, value in given.items() if value is not None})


def names_of(kind: str) -> tuple[str, ...]:
    """The recipes of a kind."""
    return tuple(name for name, recipe in recipes().items() if recipe.kind == kind)
