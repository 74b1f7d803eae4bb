"""The arms of an experiment: which SAEs the bank trains, by the names they carry in every result."""

import dataclasses
from typing import Any

from legato.config import ExperimentConfig
from legato.consistency_losses import Contrastive, TemporalTerm, WindowVariance
from legato.sparsity import BatchTopK
from legato.train import ArmConfig


def arms(config: ExperimentConfig) -> list[ArmConfig]:
    """The baseline first, then the temporal arms; with several seeds each arm once a seed (`_seed<n>` from the
    second)."""
    named: dict[str, tuple[TemporalTerm, ...]] = {"baseline": ()}
    for term in config.arms.temporal:
        named |= {name: (built,) for name, built in [_named_term(term, config)]}
    training = config.training
    return [
        ArmConfig(
            name=name if position == 0 else f"{name}_seed{seed}",
            sparsity=BatchTopK(training.k),
            d_sae=training.d_sae,
            terms=terms,
            seed=seed,
        )
        for position, seed in enumerate(training.seeds)
        for name, terms in named.items()
    ]


def _named_term(term: str, config: ExperimentConfig) -> tuple[str, TemporalTerm]:
    window, coefficient = config.arms.window, config.arms.coefficient
    if term == "contrastive":
        return "contrastive", Contrastive(coefficient=0.1)
    return f"window_variance_w{window}_c{coefficient:g}", WindowVariance(window=window, coefficient=coefficient)


def recipe(arm: ArmConfig) -> dict[str, Any]:
    """What is different about an arm, with every coefficient, as it is saved beside its results."""
    term = arm.terms[0] if arm.terms else None
    return {
        "role": None,
        "term": term.name if term else None,
        "window": term.window if term else None,
        "coefficient": term.coefficient if term else None,
        "seed": arm.seed,
        "d_sae": arm.d_sae,
        "sparsity": {"type": type(arm.sparsity).__name__, **dataclasses.asdict(arm.sparsity)},  # type: ignore[call-
        overload] "terms": [dataclasses.asdict(each) for each in arm.terms],  # type: ignore[call-overload]
    }
