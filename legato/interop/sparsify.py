"""sparsify folders: `<run>/<hookpoint>/{cfg.json, sae.safetensors}`, the run's config.json beside the hookpoints.

Shape legend: D activation width, F latents.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from legato.errors import LegatoError
from legato.interop.hook_names import layer_and_site
from legato.interop.stored import StoredSAE, check_weights, known, usable_numbers
from legato.interop.untrusted import read_json, read_safetensors

CFG_FILENAME = "cfg.json"
WEIGHTS_FILENAME = "sae.safetensors"


def read_sparsify(folder: Path) -> StoredSAE:
    """A TopK SAE; the ReLU comes before the selection, which keeps the same codes.

    Raises LegatoError for what is no autoencoder with a plain top k: transcoders (they put out something else than they
    read), skip connections, groupmax and signed selection.
    """
    cfg = read_json(folder / CFG_FILENAME)
    for key, why in (
        ("transcode", "it is a transcoder, which reads one place and writes another"),
        ("skip_connection", "it has a skip connection past its latents"),
        ("signed", "it selects by magnitude and keeps the sign"),
    ):
        if cfg.get(key):
            raise LegatoError(f"{folder}: {why}; only autoencoders can be read")
    if cfg.get("activation", "topk") != "topk":
        raise LegatoError(f"{folder} selects its latents by {cfg['activation']!r}; only topk can be read")

    state = read_safetensors(folder / WEIGHTS_FILENAME)
    names = {"encoder.weight": "W_enc", "encoder.bias": "b_enc"}
    weights = {names.get(name, name): tensor for name, tensor in state.items()}
    if "W_enc" in weights and weights["W_enc"].ndim == 2:
        weights["W_enc"] = weights["W_enc"].T.contiguous()
    check_weights("topk", weights, what=str(folder / WEIGHTS_FILENAME))
    D, F = weights["W_enc"].shape
    stated = (cfg.get("d_in", D), cfg.get("num_latents") or cfg.get("expansion_factor", 0) * D or F)
    if stated != (D, F):
        raise LegatoError(f"{folder}: cfg.json states {stated} for (d_in, latents), the tensors have {(D, F)}")
    numbers = usable_numbers("topk", cfg, F, what=str(folder))
    return StoredSAE(
        architecture="topk",
        weights=weights,
        apply_b_dec_to_input=True,
        details=_details(folder, cfg),
        **numbers,
    )


def _details(folder: Path, cfg: Mapping[str, Any]) -> dict[str, Any]:
    config = folder.resolve().parent / "config.json"
    run = read_json(config) if config.is_file() else {}
    hookpoint = folder.resolve().name
    try:
        layer, site = layer_and_site(hookpoint)
    except LegatoError:  # renamed: whoever evaluates it says the place
        return known(model=run.get("model"), source={"format": "sparsify", **cfg})
    return known(
        model=run.get("model"),
        layer=layer,
        site=site,
        context_length=run.get("ctx_len"),
        dataset=run.get("dataset"),
        source={"format": "sparsify", "hookpoint": hookpoint, **cfg},
    )
