"""SAEs on the Hugging Face hub: `push_to_hub` with a model card written from the metrics, `from_pretrained` back.

A repository holds one SAE or several, each a folder as `SparseAutoencoder.save` writes it.
"""

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

from legato.common.errors import LegatoError
from legato.sae.autoencoder import SparseAutoencoder
from legato.sae.formats.hub_download import download, hub_errors

METRICS_FILE = "metrics.json"
CARD_FILE = "README.md"
_CARD = Path(__file__).parent / "model_card.md.j2"

# Key in an arm's metrics, what it is called on the card, digits.
_CARD_ROWS = (
    ("core.fvu", "Fraction of variance unexplained", 4),
    ("core.l0", "Active latents per token (L0)", 1),
    ("core.frac_alive", "Share of latents that fire on the held-out text", 3),
    ("core.ce_loss_score", "CE loss score (1: as good as without the SAE)", 4),
    ("consistency.kappa1_excess_within", "Kappa of firing at lag 1 over the within-document null", 4),
    ("consistency.kappa1_excess_cross", "Kappa of firing at lag 1 over the fixed-position null", 4),
    ("consistency.position_shuffled.kappa1_excess_within", "The first kappa on position-shuffled activations", 4),
    ("consistency.ac1_excess_within", "Autocorrelation at lag 1 over the within-document null", 4),
    ("consistency.half_life_median", "Median half-life, tokens", 1),
    ("core.tokens", "Held-out tokens these are measured on", 0),
)


def push_to_hub(
    sae: SparseAutoencoder | str | Path,
    repo_id: str,
    *,
    subfolder: str | None = None,
    metrics: Mapping[str, Any] | None = None,
    private: bool = False,
    token: str | None = None,
    message: str | None = None,
) -> str:
    """Upload an SAE with a model card and its metrics; returns the commit's URL.

    sae: an SAE, or the folder of one. Of a folder `<run>/saes/<name>`, the metrics are read from the run.
    subfolder: where in the repository, for several SAEs in one. metrics: the SAE's part of metrics.json.
    Raises UsageError for a name the hub does not allow or a token that may not write, LegatoError where the hub cannot
    be reached.
    """
    from huggingface_hub import HfApi

    if not isinstance(sae, SparseAutoencoder):
        metrics = _metrics_of(Path(sae)) if metrics is None else metrics
        sae = SparseAutoencoder.load(sae)
    with tempfile.TemporaryDirectory() as scratch:
        folder = sae.save(Path(scratch, "sae"))
        (folder / CARD_FILE).write_text(model_card(sae, repo_id, metrics, subfolder), encoding="utf-8")
        if metrics is not None:
            (folder / METRICS_FILE).write_text(json.dumps(metrics, indent=1, allow_nan=False), encoding="utf-8")
        api = HfApi(token=token)
        with hub_errors(repo_id, "upload to"):
            api.create_repo(repo_id, private=private, exist_ok=True)
            commit = api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                path_in_repo=subfolder,
                commit_message=message or f"Legato SAE ({sae.architecture.name}, {sae.d_sae} latents)",
            )
    return str(commit.commit_url)


def from_pretrained(
    repo_id: str, *, subfolder: str | None = None, revision: str | None = None, token: str | None = None
) -> SparseAutoencoder:
    """Load an SAE from the hub, or from the local cache where the hub cannot be reached; any format Legato reads.

    subfolder: of a repository with several SAEs, the folder of one. Raises as `hub_download.download` does.
    """
    return SparseAutoencoder.load(download(repo_id, subfolder=subfolder, revision=revision, token=token))


def model_card(
    sae: SparseAutoencoder, repo_id: str, metrics: Mapping[str, Any] | None = None, subfolder: str | None = None
) -> str:
    """Write README.md of the repository: the SAE, its use, and its measured numbers."""
    known = {
        "Language model": sae.details.get("model"),
        "Layer": sae.details.get("layer"),
        "Read at": sae.details.get("module_path"),
        "Context length": sae.details.get("context_length"),
        "Text": sae.details.get("dataset"),
        "Architecture": sae.architecture.name,
        "Width": sae.d_in,
        "Latents": sae.d_sae,
    }
    measured = [(text, _value(metrics or {}, key), digits) for key, text, digits in _CARD_ROWS]
    return jinja2.Template(_CARD.read_text(encoding="utf-8"), trim_blocks=True, keep_trailing_newline=True).render(
        repo_id=repo_id,
        subfolder=subfolder,
        known={name: value for name, value in known.items() if value is not None},
        measured=[(text, f"{value:.{digits}f}") for text, value, digits in measured if value is not None],
    )


def _value(metrics: Mapping[str, Any], key: str) -> float | None:
    node: Any = metrics
    for part in key.split("."):
        node = node.get(part) if isinstance(node, Mapping) else None
    return node if isinstance(node, int | float) else None


def _metrics_of(folder: Path) -> Mapping[str, Any] | None:
    """Read the metrics uploaded with the SAE, or those of the run that holds its folder; None where there are none."""
    beside, run = folder / METRICS_FILE, folder.resolve().parent.parent / METRICS_FILE
    try:
        if beside.is_file():
            return json.loads(beside.read_text(encoding="utf-8"))
        if folder.resolve().parent.name == "saes" and run.is_file():
            return json.loads(run.read_text(encoding="utf-8")).get(folder.resolve().name)
    except ValueError as error:
        raise LegatoError(f"the metrics of {folder} are damaged: {error}") from error
    return None
