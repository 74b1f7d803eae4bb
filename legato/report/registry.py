"""Every figure of a run, drawn from what the run folder holds and nothing else."""

from pathlib import Path

from legato.report.figures.ablation import ablation_heat_maps
from legato.report.figures.consistency import (
    autocorrelation_over_lag,
    excess_by_firing_rate,
    half_life_by_rate,
    kappa_excess_distribution,
    kappa_over_lag,
)
from legato.report.figures.drawn import Figure, draw, write_pngs
from legato.report.figures.latents import kind_map, kinds_of_latents, redundancy_map
from legato.report.figures.matched import matched_comparison
from legato.report.figures.position import offset_test, position_matrix, position_measures, position_profiles
from legato.report.figures.tradeoff import consistency_cost, sparsity_fidelity
from legato.report.figures.training import training_curves
from legato.results.saved_run import SavedRun

# What the page says of each stands in figures/figures.yaml.
FIGURES = {
    "matched": matched_comparison,
    "training_curves": training_curves,
    "fvu_l0": sparsity_fidelity,
    "kappa_over_lag": kappa_over_lag,
    "ac_over_lag": autocorrelation_over_lag,
    "kappa_excess_distribution": kappa_excess_distribution,
    "kappa_by_firing_rate": excess_by_firing_rate,
    "half_life": half_life_by_rate,
    "position_matrix": position_matrix,
    "position_profiles": position_profiles,
    "position_measures": position_measures,
    "offset": offset_test,
    "redundancy_map": redundancy_map,
    "kinds": kinds_of_latents,
    "kind_map": kind_map,
    "fvu_kappa": consistency_cost,
    "ablation": ablation_heat_maps,
}


def draw_figures(run: SavedRun) -> list[Figure]:
    """Every figure of a run, or what it lacks, in the order of the page."""
    return draw(FIGURES, Path(__file__).parent / "figures" / "figures.yaml", run)


def write_figures(run: SavedRun | str | Path) -> list[Figure]:
    """Write `figures/<name>.png` in the run folder for each figure that the saved results allow; return them all."""
    run = SavedRun.of(run)
    figures = draw_figures(run)
    write_pngs(figures, run.path / "figures")
    return figures
