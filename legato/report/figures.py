"""Every static figure of a run, drawn from what the run folder holds and nothing else."""

import io
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from legato.report.ablation_figures import ablation_heat_maps, consistency_cost
from legato.report.consistency_figures import (
    autocorrelation_over_lag,
    excess_by_firing_rate,
    kappa_excess_distribution,
    kappa_over_lag,
    position_matrix,
)
from legato.report.missing import MissingResult
from legato.report.style import figure_style
from legato.report.training_figures import sparsity_fidelity, training_curves
from legato.results import SavedRun


@dataclass(frozen=True)
class FigureSpec:
    """A figure by its file name, how the report titles and explains it, and what draws it."""

    name: str
    section: str
    title: str
    caption: str
    draw: Callable[[SavedRun], Figure]


FIGURES = (
    FigureSpec(
        "training_curves",
        "training",
        "Training curves",
        "Every arm reads the same activation batches in the same order. The loss sums an arm's own terms, so its level "
        "compares only between arms with the same terms; FVU, L0 and dead latents compare across all of them.",
        training_curves,
    ),
    FigureSpec(
        "fvu_l0",
        "reconstruction",
        "Reconstruction at which sparsity",
        "Held-out text. Lower and further left is better; arms compare directly only where they sit at the same L0.",
        sparsity_fidelity,
    ),
    FigureSpec(
        "kappa_over_lag",
        "consistency",
        "Does a latent that fires now fire again later?",
        "Kappa of firing at increasing distance, mean over alive latents. Shuffling tokens inside a document keeps its "
        "topic and loses its order; shuffling across documents at the same position keeps only position. The shaded "
        "gap is what order adds; the last panel compares that gap between arms.",
        kappa_over_lag,
    ),
    FigureSpec(
        "ac_over_lag",
        "consistency",
        "Autocorrelation of activations",
        "The same with the strength of activation instead of on and off.",
        autocorrelation_over_lag,
    ),
    FigureSpec(
        "kappa_excess_distribution",
        "consistency",
        "Distribution over latents",
        "Kappa excess at lag 1 of each alive latent. A mean that moves because of a few latents shows here as a tail.",
        kappa_excess_distribution,
    ),
    FigureSpec(
        "kappa_by_firing_rate",
        "consistency",
        "Within bins of firing rate",
        "Latents that fire often hold longer in any SAE. A real gain shows in every bin, not only through a shift "
        "between bins.",
        excess_by_firing_rate,
    ),
    FigureSpec(
        "position_matrix",
        "position",
        "Position by position correlation",
        "How alike a latent's activation is at two positions of the same text, mean over latents. A band along the "
        "diagonal is persistence; marks at fixed rows and columns are attachment to position.",
        position_matrix,
    ),
    FigureSpec(
        "ablation",
        "ablation",
        "Window by coefficient",
        "One SAE per cell, all trained on the same activations. Darker is better (L0: closer to the baseline's). "
        "The baseline's value stands under each title and takes part in the colour scale. A silent latent fires on no "
        "held-out token.",
        ablation_heat_maps,
    ),
    FigureSpec(
        "fvu_kappa",
        "ablation",
        "What consistency costs",
        "Up and left is better. The dashed stairs run along the arms that no other arm beats in both; a solid line is "
        "the baseline at other sparsities, the fair comparison for an arm that pays in FVU.",
        consistency_cost,
    ),
)


def drawn(run: SavedRun) -> Iterator[tuple[FigureSpec, Figure | MissingResult]]:
    """Each figure of the run, or what it lacks; the caller saves a figure before asking for the next."""
    for spec in FIGURES:
        with figure_style():
            try:
                yield spec, spec.draw(run)
            except MissingResult as missing:
                yield spec, missing


def write_figures(run: SavedRun | str | Path, out_dir: str | Path | None = None) -> dict[str, Path]:
    """Write `<out_dir>/<name>.png` for every figure the saved results allow; return the paths by name.

    out_dir: `figures` in the run folder by default. A figure whose data were not saved is left out.
    """
    run = run if isinstance(run, SavedRun) else SavedRun.open(run)
    out = Path(out_dir) if out_dir is not None else run.path / "figures"
    out.mkdir(parents=True, exist_ok=True)
    written = {}
    for spec, figure in drawn(run):
        if isinstance(figure, Figure):
            written[spec.name] = out / f"{spec.name}.png"
            figure.savefig(written[spec.name])
    return written


def svg_markup(figure: Figure, prefix: str) -> str:
    """The figure as an `<svg>` element without fixed size, its ids under `prefix` so that several share a page."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    markup = buffer.getvalue()
    markup = markup[markup.index("<svg") :]
    markup = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", markup, count=1)
    markup = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", markup, count=1)
    markup = re.sub(r"<metadata>.*?</metadata>", "", markup, flags=re.DOTALL)
    referred = set(re.findall(r'(?:url\(#|href="#)([^")]+)', markup))
    markup = re.sub(r' id="([^"]*)"', lambda id_: f' id="{prefix}-{id_[1]}"' if id_[1] in referred else "", markup)
    markup = markup.replace("url(#", f"url(#{prefix}-")
    return markup.replace('xlink:href="#', f'xlink:href="#{prefix}-')
