"""What a saved SAE says about where it comes from."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from legato.errors import UsageError
from legato.interop.hook_names import layer_and_site
from legato.sae import SparseAutoencoder


@dataclass(frozen=True)
class Origin:
    """None where the SAE does not say. hook_name: where it reads, in the words of the tool that saved it."""

    model: str | None = None
    layer: int | None = None
    site: str | None = None
    hook_name: str | None = None
    context_length: int | None = None
    dataset: str | None = None
    held_out: float | None = None
    by_legato: bool = False

    def place(self) -> tuple[int, str] | None:
        """(layer, site); UsageError for a hook that Legato cannot read."""
        if self.layer is not None:
            return self.layer, self.site or "resid_post"
        return None if self.hook_name is None else layer_and_site(self.hook_name)


def origin_of(sae: SparseAutoencoder, path: str | Path) -> Origin:
    """From legato.json, else from the metadata of the format the SAE came in (SAELens' where its cfg.json lies)."""
    details: dict[str, Any] = {**_saelens_metadata(Path(path)), **sae.details}
    context = details.get("context_length") or details.get("context_size")
    return Origin(
        model=details.get("model") or details.get("model_name"),
        layer=details.get("layer"),
        site=details.get("site"),
        hook_name=details.get("module_path") or details.get("hook_name"),
        context_length=int(context) if context else None,
        dataset=details.get("dataset"),
        held_out=details.get("held_out"),
        by_legato="objective" in sae.details,
    )


def _saelens_metadata(folder: Path) -> Mapping[str, Any]:
    if not (folder / "cfg.json").is_file():
        return {}
    try:
        cfg = json.loads((folder / "cfg.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(f"{folder / 'cfg.json'} is damaged: {error}") from error
    metadata = cfg.get("metadata") if isinstance(cfg, dict) else None
    return metadata if isinstance(metadata, dict) else {}
