"""Provenance of a saved SAE, as it says itself."""

from dataclasses import dataclass

from legato.sae.autoencoder import SparseAutoencoder
from legato.sae.formats.hook_names import layer_and_site


@dataclass(frozen=True)
class Provenance:
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


def origin_of(sae: SparseAutoencoder) -> Provenance:
    """From the SAE's details: legato.json, or what the format it came in records."""
    details = sae.details
    context = details.get("context_length")
    return Provenance(
        model=details.get("model"),
        layer=details.get("layer"),
        site=details.get("site"),
        hook_name=details.get("module_path"),
        context_length=int(context) if context else None,
        dataset=details.get("dataset"),
        held_out=details.get("held_out"),
        by_legato="objective" in sae.details,
    )
