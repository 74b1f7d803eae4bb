"""sparsify folders: `<run>/<hookpoint>/{cfg.json, sae.safetensors}`, the run's config.json beside the hookpoints.

Shape legend: D activation width, F latents.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from legato.common.errors import LegatoError
from legato.common.safe_read import as_dict, read_json_object, read_safetensors, write_json
from legato.sae.formats.hook_names import layer_and_site
from legato.sae.formats.weights import (
    SAEWeights,
    both_signs,
    check_weights,
    has_unit_rows,
    known,
    new_sae,
    usable_numbers,
    with_input_bias,
)

CFG_FILENAME = "cfg.json"
WEIGHTS_FILENAME = "sae.safetensors"
LEGATO_KEY = "legato"  # in cfg.json: what the SAE knows of itself, where Legato wrote it


def read_sparsify(folder: Path) -> SAEWeights:
    """A TopK SAE; the ReLU comes before the selection, which keeps the same codes.

    Raises LegatoError for what is no autoencoder with a plain top k: transcoders (they put out something else than they
    read), skip connections and groupmax.
    """
    cfg = read_json_object(folder / CFG_FILENAME)
    config = folder.absolute().parent / "config.json"
    run = read_json_object(config) if config.is_file() else {}
    if run.get("transcode"):  # before 2025-02-12 cfg.json did not say so
        cfg["transcode"] = True
    for key, why in (
        ("transcode", "it is a transcoder, which reads one place and writes another"),
        ("skip_connection", "it has a skip connection past its latents"),
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
    times, latents = cfg.get("expansion_factor"), cfg.get("num_latents") or None
    if latents is None and isinstance(times, int):
        latents = times * D
    if (cfg.get("d_in", D), latents or F) != (D, F):
        raise LegatoError(f"{folder}: cfg.json states other sizes than the {D} x {F} of its tensors")
    numbers = usable_numbers("topk", cfg, F, what=str(folder))
    if cfg.get("signed"):
        weights = both_signs(weights)
    return SAEWeights(
        architecture="topk",
        weights=weights,
        apply_b_dec_to_input=True,
        details=as_dict(cfg.get(LEGATO_KEY)) or _details(folder.absolute().name, cfg, run),
        numbers=numbers,
    )


def _details(hookpoint: str, cfg: Mapping[str, Any], run: Mapping[str, Any]) -> dict[str, Any]:
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


def write_sparsify(folder: Path, stored: SAEWeights) -> None:
    """A topk SAE as a hookpoint's folder; the bias is rounded once, since sparsify subtracts b_dec from the input."""
    if stored.architecture != "topk":
        raise LegatoError(
            f"sparsify has only topk SAEs and this one is {stored.architecture}: "
            "export to saelens, or to dictionary_learning where it keeps no state"
        )
    weights = with_input_bias(stored.weights)
    D, F = weights["W_enc"].shape
    tensors: dict[str, Tensor] = {
        "encoder.weight": weights["W_enc"].T.contiguous(),
        "encoder.bias": weights["b_enc"],
        "W_dec": weights["W_dec"].contiguous(),
        "b_dec": weights["b_dec"].contiguous(),
    }
    cfg = {
        "activation": "topk",
        "expansion_factor": max(1, F // D),
        "normalize_decoder": has_unit_rows(weights["W_dec"]),
        "num_latents": F,
        "k": stored.numbers["k"],
        "multi_topk": False,
        "skip_connection": False,
        "transcode": False,
        "d_in": D,
        LEGATO_KEY: stored.details,
    }
    with new_sae(folder, WEIGHTS_FILENAME) as new:
        save_file(tensors, new / WEIGHTS_FILENAME)
        write_json(new / CFG_FILENAME, cfg)
