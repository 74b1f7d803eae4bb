"""Every figure of a run, drawn from what the run folder holds and nothing else."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from legato.report.figures.ablation import ablation_heat_maps
from legato.report.figures.consistency import (
    autocorrelation_over_lag,
    excess_by_firing_rate,
    half_life_by_rate,
    kappa_excess_distribution,
    kappa_over_lag,
)
from legato.report.figures.latents import kind_map, kinds_of_latents, redundancy_map
from legato.report.figures.matched import matched_comparison
from legato.report.figures.missing import MissingResult
from legato.report.figures.plot import Plot, drawing
from legato.report.figures.position import offset_test, position_matrix, position_measures, position_profiles
from legato.report.figures.tradeoff import consistency_cost, sparsity_fidelity
from legato.report.figures.training import training_curves
from legato.results.saved_run import SavedRun


@dataclass(frozen=True)
class FigureSpec:
    """A figure by its file name, how the report titles and explains it, and what draws it.

    on_page: False for what the page shows in another figure.
    """

    name: str
    section: str
    title: str
    caption: str
    draw: Callable[[SavedRun], Plot]
    on_page: bool = True


FIGURES = (
    FigureSpec(
        "matched",
        "matched",
        "Ratios to the baseline where the cost is equal",
        "To the right of 1 a method holds longer than the baseline; to the right of the dashed line it reaches the "
        "target. A bar that crosses 1 is no difference.",
        matched_comparison,
    ),
    FigureSpec(
        "training_curves",
        "training",
        "Training curves",
        "Every arm reads the same batches in the same order, so FVU, L0 and dead latents compare directly. The loss "
        "sums an arm's own terms: it compares only between arms with the same terms.",
        training_curves,
    ),
    FigureSpec(
        "fvu_l0",
        "reconstruction",
        "Reconstruction at which sparsity",
        "Lower and further left is better; arms compare directly only where they sit at the same L0. Held-out text.",
        sparsity_fidelity,
    ),
    FigureSpec(
        "kappa_over_lag",
        "consistency",
        "Does a latent that is active now stay so?",
        "The gap between the solid and the dashed line is what the order of the text adds: shuffling inside a document "
        "keeps its topic, shuffling at the same position keeps only position. Means over alive latents.",
        kappa_over_lag,
    ),
    FigureSpec("ac_over_lag", "consistency", "Autocorrelation over lag", "", autocorrelation_over_lag, on_page=False),
    FigureSpec(
        "kappa_excess_distribution",
        "consistency",
        "Distribution over latents",
        "A whole hill that moves right is a gain in most latents; a mean that moves because of a few shows as a tail. "
        "Kappa excess at lag 1 of each alive latent.",
        kappa_excess_distribution,
    ),
    FigureSpec(
        "kappa_by_firing_rate",
        "consistency",
        "Within bins of firing rate",
        "A real gain shows in every bin. Latents that fire often hold longer in any SAE, so a shift between bins alone "
        "would look like a gain.",
        excess_by_firing_rate,
    ),
    FigureSpec(
        "half_life",
        "consistency",
        "Half-life against firing rate",
        "The line is the median: where it lies above the baseline's, latents of the same rate hold longer. Half-life: "
        "tokens until the autocorrelation has halved.",
        half_life_by_rate,
    ),
    FigureSpec(
        "position_matrix",
        "position",
        "Position by position correlation",
        "A band along the diagonal is persistence; marks at fixed rows and columns are attachment to position. "
        "Correlation over texts of a latent at two positions, mean over latents.",
        position_matrix,
    ),
    FigureSpec(
        "position_profiles",
        "position",
        "Profiles over position",
        "A flat line does not depend on position. First panel: L0 of the arms in colour; then, for the first four, the "
        "three latents that depend on position most. Bands: 95 %.",
        position_profiles,
    ),
    FigureSpec(
        "position_measures",
        "position",
        "Two measures of attachment to position",
        "Latents at the upper right are bound to position. Eta² sees the strength of activation, mutual information "
        "only whether it fires. Both are corrected for chance; latents at or below zero are not drawn.",
        position_measures,
    ),
    FigureSpec(
        "offset",
        "position",
        "The same text at another offset",
        "Close to 1: the same tokens get the same latents wherever the text stands. Dotted: what another token of the "
        "document would share by chance.",
        offset_test,
    ),
    FigureSpec(
        "redundancy_map",
        "redundancy",
        "Who fires with whom, and when",
        "Blocks at lag 0 are latents that say the same thing; what appears only at a later lag is a sequence such as "
        "the two halves of a name. Correlation in excess of the null that keeps position; latents clustered.",
        redundancy_map,
    ),
    FigureSpec(
        "kinds",
        "specialisation",
        "Kinds of latents",
        "What an arm's latents are, by a fixed rule on each one. Token: a few tokens decide; phrase and passage: it "
        "holds over the next, over sixteen tokens.",
        kinds_of_latents,
    ),
    FigureSpec(
        "kind_map",
        "specialisation",
        "Map of latents",
        "Each dot is a latent, near those with similar descriptors, coloured by its cluster. The map and the clusters "
        "are the same for every arm, so that a region that fills or empties is a difference between arms.",
        kind_map,
    ),
    FigureSpec(
        "fvu_kappa",
        "ablation",
        "What consistency costs",
        "Up and left is better. The dashed stairs are the Pareto front, the arms that no other beats in both; a solid "
        "line is an arm at other sparsities, the fair comparison for one that pays in FVU.",
        consistency_cost,
    ),
    FigureSpec(
        "ablation",
        "ablation",
        "Window by coefficient",
        "Darker is better (L0: closer to the baseline's). One SAE per cell, all on the same activations; the "
        "baseline's value stands under each title. A silent latent fires on no held-out token.",
        ablation_heat_maps,
    ),
)


def on_page(run: SavedRun) -> Iterator[tuple[FigureSpec, Plot | MissingResult]]:
    """Return each figure for the page, or the reason that it is missing."""
    for spec in FIGURES:
        if spec.on_page:
            yield spec, _made(spec, run)


def _made(spec: FigureSpec, run: SavedRun) -> Plot | MissingResult:
    with drawing():
        try:
            return spec.draw(run)
        except MissingResult as missing:
            return missing


def write_figures(run: SavedRun | str | Path, out_dir: str | Path | None = None) -> dict[str, Path]:
    """Write `<out_dir>/<name>.png` for every figure the saved results allow; return the paths by name.

    out_dir: `figures` in the run folder by default. A figure whose data were not saved is left out.
    """
    run = SavedRun.of(run)
    out = Path(out_dir) if out_dir is not None else run.path / "figures"
    out.mkdir(parents=True, exist_ok=True)
    written = {}
    for spec in FIGURES:
        plot = _made(spec, run)
        if isinstance(plot, Plot):
            written[spec.name] = out / f"{spec.name}.png"
            written[spec.name].write_bytes(plot.png())
    return written
