"""The arms of an experiment: which SAEs the bank trains, by the names they carry in every result."""

import dataclasses
from typing import Any

from legato.config import ExperimentConfig
from legato.consistency_losses import Contrastive, TemporalTerm, WindowVariance
from legato.sparsity import BatchTopK, Hysteresis, Sparsity
from legato.train import ArmConfig

Recipe = tuple[str, Sparsity, tuple[TemporalTerm, ...]]


def arms(config: ExperimentConfig) -> list[ArmConfig]:
    """The baseline first, then its sweep over k, the temporal arms and the window x coefficient grid.

    With several seeds every arm is there once a seed, `_seed<n>` at the end of its name from the second on.
    """
    training = config.training
    plain = BatchTopK(training.k)
    recipes: list[Recipe] = [("baseline", plain, ())]
    recipes += [(f"baseline_k{k}", BatchTopK(k), ()) for k in config.arms.sweep_k]
    recipes += [_temporal(name, config) for name in config.arms.temporal]
    grid = config.arms.grid_points
    recipes += [(_grid_name(w, c), plain, (WindowVariance(window=w, coefficient=c),)) for w, c in grid]
    unique = {name: (sparsity, terms) for name, sparsity, terms in recipes}
    return [
        ArmConfig(name if place == 0 else f"{name}_seed{seed}", sparsity, training.d_sae, terms, seed)
        for place, seed in enumerate(training.seeds)
        for name, (sparsity, terms) in unique.items()
    ]


def recipe(arm: ArmConfig) -> dict[str, Any]:
    """What is different about an arm, with every coefficient, as it is saved beside its results."""
    term = arm.terms[0] if arm.terms else None
    return {
        "term": term.name if term else None,
        "window": term.window if term else None,
        "coefficient": term.coefficient if term else None,
        "k": getattr(arm.sparsity, "k", None),
        "seed": arm.seed,
        "d_sae": arm.d_sae,
        "sparsity": {"type": type(arm.sparsity).__name__, **_fields(arm.sparsity)},
        "terms": [_fields(each) for each in arm.terms],
    }


def _temporal(name: str, config: ExperimentConfig) -> Recipe:
    options = config.arms
    plain = BatchTopK(config.training.k)
    if name == "window_variance":
        term = WindowVariance(window=options.window, coefficient=options.coefficient)
        return _grid_name(term.window, term.coefficient), plain, (term,)
    if name == "contrastive":
        return name, plain, (Contrastive(coefficient=options.contrastive_coefficient),)
    assert name == "hysteresis", name
    return name, Hysteresis(config.training.k, release=options.release), ()


def _grid_name(window: int, coefficient: float) -> str:
    return f"window_variance_w{window}_c{coefficient:g}"


def _fields(record: Any) -> dict[str, Any]:
    return dataclasses.asdict(record)
