"""The arms of an experiment: the SAEs to train. Only this module decides an arm's fields; they are saved and read."""

import dataclasses
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from legato.common.errors import UsageError
from legato.experiment.config import ExperimentConfig
from legato.experiment.recipes import Options, recipes
from legato.sae.architectures import BatchTopK
from legato.training.config import SAEConfig


@dataclass(frozen=True)
class Arm:
    """One SAE of a run.

    name: of its files and its row. group: the same without the seed. method: its recipe's name, whatever k and seed.
    role: `baseline`, `named` (asked for by name), `grid` (a member of the window x coefficient ablation alone), `sweep`
        (`method` at another k) or `control` (made of a trained SAE without training).
    in_grid: whether it is a point of the ablation, asked for by name or not.
    recipe: its options and every coefficient, as saved.
    """

    name: str
    group: str
    method: str
    role: str
    seed: int
    in_grid: bool = False
    recipe: dict[str, Any] = dataclasses.field(default_factory=dict, compare=False)

    def saved(self) -> dict[str, Any]:
        """Return `training.recipe` of metrics.json and `objective` of legato.json."""
        own = {name: getattr(self, name) for name in ("role", "method", "group", "in_grid", "seed")}
        return {**self.recipe, **own}


@dataclass(frozen=True)
class PlannedArm:
    """An arm and the SAE that is trained for it; sae.name is the arm's."""

    arm: Arm
    sae: SAEConfig


def planned_arms(config: ExperimentConfig, d_in: int) -> list[PlannedArm]:
    """Plan the baseline, its sweep over k, the named arms with their sweeps and the window x coefficient grid.

    Every arm is planned once per seed. d_in: width of the activations, for the published T-SAE objective. Raises
    UsageError where an arm without a k is to be swept.
    """
    given = {**vars(config.arms), "d_in": d_in, "k": config.training.k}
    sweep, options = config.arms.sweep_k, Options(**{f.name: given[f.name] for f in dataclasses.fields(Options)})
    base = SAEConfig("baseline", BatchTopK(config.training.k), config.training.d_sae)
    bank = [_first(base, "baseline"), *(_at_k(base, k) for k in sweep)]
    for name in config.arms.temporal:
        sae = _changed(base, name, options)
        bank += [_first(sae, "named"), *(_at_k(sae, k) for k in sweep if name in config.arms.sweep_arms)]
    for window, coefficient in config.arms.grid_points:
        point = replace(options, window=window, coefficient=coefficient)
        bank.append(_first(_changed(base, "window_variance", point), "grid"))
    unique: dict[str, PlannedArm] = {}
    for planned in bank:  # one that is named and a point of the grid is kept as both
        known = unique.setdefault(planned.sae.name, planned)
        if planned.arm.in_grid and not known.arm.in_grid:
            unique[planned.sae.name] = replace(known, arm=replace(known.arm, in_grid=True))
    seeds, found = config.training.seeds, []
    for seed, planned in product(seeds, unique.values()):
        name = seeded(planned.arm.group, seed, seeds[0])
        sae = replace(planned.sae, name=name, seed=seed, term_warmup=config.arms.term_warmup)
        found.append(PlannedArm(replace(planned.arm, name=name, seed=seed, recipe=recipe(sae)), sae))
    return found


def seeded(group: str, seed: int, first: int) -> str:
    """Return the name of a group's arm of a seed; the run's first seed is left out of the name."""
    return group if seed == first else f"{group}_seed{seed}"


def recipe(sae: SAEConfig) -> dict[str, Any]:
    """Return the options of an SAE's training with every coefficient."""
    term = sae.terms[0] if sae.terms else None
    return {
        "term": term.name if term else None,
        "window": term.window if term else None,
        "coefficient": term.coefficient if term else None,
        "k": getattr(sae.architecture, "k", None),
        "seed": sae.seed,
        "d_sae": sae.d_sae,
        "sparsity": sae.architecture.settings(),
        "terms": [vars(each) for each in sae.terms],
        "term_warmup": sae.term_warmup if sae.terms else None,
        "groups": [list(group) for group in sae.groups],
        "freeze_decoder": sae.freeze_decoder,
        "shuffle_positions": sae.shuffle_positions,
    }


def _changed(base: SAEConfig, name: str, options: Options) -> SAEConfig:
    """Apply a name of --temporal to the baseline; the name of a grid's arm has window and weight."""
    sae, known = base, recipes()
    for part in name.split("+"):
        fields = known[part].fields(options)
        sae = replace(sae, **{**fields, "terms": (*sae.terms, *fields.get("terms", ()))})
    if name == "window_variance":
        return replace(sae, name=f"{name}_w{sae.terms[0].window}_c{sae.terms[0].coefficient:g}")
    return replace(sae, name="_".join(name.split("+")))


def _first(sae: SAEConfig, role: str) -> PlannedArm:
    return PlannedArm(Arm(sae.name, sae.name, sae.name, role, sae.seed, in_grid=role == "grid"), sae)


def _at_k(sae: SAEConfig, k: int) -> PlannedArm:
    """Plan the same SAE with another budget, a member of its method's sweep."""
    architecture: Any = sae.architecture
    if not hasattr(architecture, "k"):
        raise UsageError(f"--sweep_arms {sae.name}: it has no k to sweep")
    name = f"{sae.name}_k{k}"
    return PlannedArm(
        Arm(name, name, sae.name, "sweep", sae.seed), replace(sae, name=name, architecture=replace(architecture, k=k))
    )
