"""The arms of an experiment: which SAEs the bank trains, by the names they carry in every result."""

from dataclasses import replace
from typing import Any

from legato.config import ExperimentConfig
from legato.consistency_losses import (
    Contrastive,
    FusedLasso,
    PositionPenalty,
    Slowness,
    TemporalTerm,
    TsaeContrastive,
    WindowVariance,
)
from legato.sparsity import BatchTopK, Hysteresis, TopK
from legato.train import ArmConfig

MATRYOSHKA = ((0.2, 0.2), (1.0, 0.8))  # share of the latents, weight: the groups of temporal-saes


def arms(config: ExperimentConfig, d_in: int) -> list[ArmConfig]:
    """The baseline first, then its sweep over k, the named arms and the window x coefficient grid.

    With several seeds every arm is there once a seed, `_seed<n>` at the end of its name from the second on.
    d_in: width of the activations, which the published T-SAE objective depends on.
    """
    d_sae = config.training.d_sae
    bank = [ArmConfig("baseline", BatchTopK(config.training.k), d_sae)]
    bank += [ArmConfig(f"baseline_k{k}", BatchTopK(k), d_sae) for k in config.arms.sweep_k]
    bank += [_named(name, config, d_in) for name in config.arms.temporal]
    bank += [_window_variance(window, coefficient, config) for window, coefficient in config.arms.grid_points]
    unique = {arm.name: arm for arm in bank}.values()
    return [
        replace(arm, name=arm.name if place == 0 else f"{arm.name}_seed{seed}", seed=seed)
        for place, seed in enumerate(config.training.seeds)
        for arm in unique
    ]


def grid_name(window: int, coefficient: float) -> str:
    return f"window_variance_w{window}_c{coefficient:g}"


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
        "sparsity": {"type": type(arm.sparsity).__name__, **vars(arm.sparsity)},
        "terms": [vars(each) for each in arm.terms],
        "groups": [list(group) for group in arm.groups],
    }


def _named(name: str, config: ExperimentConfig, d_in: int) -> ArmConfig:
    options, k, d_sae = config.arms, config.training.k, config.training.d_sae

    def with_term(term: TemporalTerm) -> ArmConfig:
        return ArmConfig(name, BatchTopK(k), d_sae, (term,))

    def weight(default: float) -> float:
        return default if options.coefficient is None else options.coefficient

    if name == "hysteresis":
        return ArmConfig(name, Hysteresis(k, release=options.release), d_sae)
    if name == "topk":
        return ArmConfig(name, TopK(k), d_sae)
    if name == "matryoshka":
        return ArmConfig(name, BatchTopK(k), d_sae, groups=MATRYOSHKA)
    if name == "tsae":
        return ArmConfig(name, BatchTopK(k), d_sae, (_published_tsae(d_in),), groups=MATRYOSHKA)
    if name == "contrastive":
        return with_term(Contrastive(coefficient=weight(0.02)))
    if name == "slowness":
        return with_term(Slowness(window=options.window, coefficient=weight(0.1)))
    if name == "fused_lasso":
        return with_term(FusedLasso(coefficient=weight(0.1)))
    if name == "position_penalty":
        return with_term(PositionPenalty(coefficient=weight(0.1)))
    assert name == "window_variance", name
    return _window_variance(options.window, weight(0.3), config)


def _window_variance(window: int, coefficient: float, config: ExperimentConfig) -> ArmConfig:
    term = WindowVariance(window=window, coefficient=coefficient)
    return ArmConfig(grid_name(window, coefficient), BatchTopK(config.training.k), config.training.d_sae, (term,))


def _published_tsae(d_in: int) -> TsaeContrastive:
    """The published weights, carried over to our units.

    temporal-saes adds .1 * InfoNCE at temperature 1 to the mean over its two groups of w_g times the squared error. On
    activations of unit mean square (its normalize_activations; on raw ones of norm 6e3 the term would vanish beside the
    error) that is, on ours of mean square D beside sum_g w_g ||e_g||^2 / D, temperature D and weight .2.
    """
    return TsaeContrastive(coefficient=0.2, temperature=float(d_in))
