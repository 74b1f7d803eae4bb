"""The arms of an experiment: which SAEs the bank trains, by the names they carry in every result."""

from dataclasses import replace
from typing import Any

from legato.common.errors import UsageError
from legato.experiment.config import ExperimentConfig
from legato.sae.architectures import (
    BatchTopK,
    Gated,
    Hysteresis,
    HysteresisTopK,
    JumpReLU,
    Persistent,
    ReLU,
    TopK,
    WindowTopK,
)
from legato.training.config import SAEConfig
from legato.training.losses import (
    Contrastive,
    FusedLasso,
    PositionPenalty,
    Slowness,
    TemporalLoss,
    TsaeContrastive,
    WindowGroupLasso,
    WindowVariance,
)

LEGATO_TERM = Slowness(window=4, coefficient=0.05)  # beside hysteresis on TopK: docs/findings.md has the reasons
MATRYOSHKA = ((0.2, 0.2), (1.0, 0.8))  # share of the latents, weight: the groups of temporal-saes


def arms(config: ExperimentConfig, d_in: int) -> list[SAEConfig]:
    """The baseline first, then its sweep over k, the named arms with theirs and the window x coefficient grid.

    With several seeds every arm is there once a seed, `_seed<n>` at the end of its name from the second on.
    d_in: width of the activations, which the published T-SAE objective depends on.
    """
    d_sae = config.training.d_sae
    bank = [SAEConfig("baseline", BatchTopK(config.training.k), d_sae)]
    bank += [_at_k(bank[0], k) for k in config.arms.sweep_k]
    for name in config.arms.temporal:
        arm = _named(name, config, d_in)
        bank += [arm, *(_at_k(arm, k) for k in config.arms.sweep_k if name in config.arms.sweep_arms)]
    bank += [_window_variance(window, coefficient, config) for window, coefficient in config.arms.grid_points]
    unique = {arm.name: arm for arm in bank}.values()
    return [
        replace(
            arm,
            name=arm.name if place == 0 else f"{arm.name}_seed{seed}",
            seed=seed,
            term_warmup=config.arms.term_warmup,
        )
        for place, seed in enumerate(config.training.seeds)
        for arm in unique
    ]


def grid_name(window: int, coefficient: float) -> str:
    return f"window_variance_w{window}_c{coefficient:g}"


def is_baseline(name: str) -> bool:
    """Whether an arm of this name is the baseline, of whatever seed."""
    return name.split("_seed")[0] == "baseline"


def recipe(arm: SAEConfig) -> dict[str, Any]:
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
        "term_warmup": arm.term_warmup if arm.terms else None,
        "groups": [list(group) for group in arm.groups],
        "freeze_decoder": arm.freeze_decoder,
        "shuffle_positions": arm.shuffle_positions,
    }


def _named(name: str, config: ExperimentConfig, d_in: int) -> SAEConfig:
    """The arm of a name in --temporal. `A+B` differs from the baseline in both and is called A_B."""
    parts = name.split("+")
    if parts == ["window_variance"]:
        return _window_variance(config.arms.window, _weight(config, 0.3), config)
    arm = SAEConfig("_".join(parts), BatchTopK(config.training.k), config.training.d_sae)
    for part in parts:
        arm = replace(arm, **_difference(part, arm, config, d_in))
    return arm


def _difference(part: str, arm: SAEConfig, config: ExperimentConfig, d_in: int) -> dict[str, Any]:
    """The fields in which a named part changes an arm."""
    options, k = config.arms, config.training.k

    def with_term(term: TemporalLoss) -> dict[str, Any]:
        return {"terms": (*arm.terms, term)}

    if part == "legato":
        return {"sparsity": HysteresisTopK(k, release=options.release), **with_term(LEGATO_TERM)}
    if part == "hysteresis":
        return {"sparsity": Hysteresis(k, release=options.release)}
    if part == "hysteresis_topk":
        return {"sparsity": HysteresisTopK(k, release=options.release)}
    if part == "window_topk":
        return {"sparsity": WindowTopK(k, window=options.window)}
    if part == "persistent":
        return {"sparsity": Persistent(k)}
    if part == "topk":
        return {"sparsity": TopK(k)}
    if part == "jumprelu":
        return {"sparsity": JumpReLU(k)}
    if part == "gated":
        return {"sparsity": Gated(k=k)}
    if part == "relu":
        return {"sparsity": ReLU(options.l1)}
    if part == "window_group_lasso":
        return {"sparsity": ReLU(0.0), **with_term(WindowGroupLasso(options.window, options.l1 / d_in))}
    if part == "shuffled":
        return {"shuffle_positions": True}
    if part == "frozen_decoder":
        return {"freeze_decoder": True}
    if part == "matryoshka":
        return {"groups": MATRYOSHKA}
    if part == "tsae":
        return {"groups": MATRYOSHKA, **with_term(_published_tsae(d_in))}
    return with_term(_term(part, config))


def _term(name: str, config: ExperimentConfig) -> TemporalLoss:
    """A named temporal term under the run's options, with its own coefficient where they give none."""
    options, slow = config.arms, config.arms.slow_fraction
    if name == "contrastive":
        weight = _weight(config, 0.02)
        return Contrastive(weight, lags=options.lags, temperature=options.temperature, slow_fraction=slow)
    if name == "slowness":
        return Slowness(options.window, _weight(config, 0.1), slow_fraction=slow)
    if name == "fused_lasso":
        return FusedLasso(_weight(config, 0.1), slow_fraction=slow)
    if name == "position_penalty":
        return PositionPenalty(_weight(config, 0.1), slow_fraction=slow)
    assert name == "window_variance", name
    return WindowVariance(options.window, _weight(config, 0.3), slow_fraction=slow)


def _weight(config: ExperimentConfig, default: float) -> float:
    return default if config.arms.coefficient is None else config.arms.coefficient


def _at_k(arm: SAEConfig, k: int) -> SAEConfig:
    """The same arm with another budget, a member of its sweep."""
    sparsity: Any = arm.sparsity
    if not hasattr(sparsity, "k"):
        raise UsageError(f"--sweep_arms {arm.name}: it has no k to sweep")
    return replace(arm, name=f"{arm.name}_k{k}", sparsity=replace(sparsity, k=k))


def _window_variance(window: int, coefficient: float, config: ExperimentConfig) -> SAEConfig:
    term = WindowVariance(window, coefficient, slow_fraction=config.arms.slow_fraction)
    return SAEConfig(grid_name(window, coefficient), BatchTopK(config.training.k), config.training.d_sae, (term,))


def _published_tsae(d_in: int) -> TsaeContrastive:
    """The published weights, carried over to our units.

    temporal-saes adds .1 * InfoNCE at temperature 1 to the mean over its two groups of w_g times the squared error. On
    activations of unit mean square (its normalize_activations; on raw ones of norm 6e3 the term would vanish beside the
    error) that is, on ours of mean square D beside sum_g w_g ||e_g||^2 / D, temperature D and weight .2.
    """
    return TsaeContrastive(coefficient=0.2, temperature=float(d_in))
