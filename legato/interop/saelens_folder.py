"""SAELens inference folders: `cfg.json` + `sae_weights.safetensors`, as SAELens 6.54 saves and opens them.

`SAE.load_from_disk(folder)` opens what `write_saelens_folder` writes; neither function needs SAELens installed. SAELens
knows the architecture `hysteresis` after `import legato.interop.saelens`.

Shape legend: D activation width, F latents.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from legato.errors import LegatoError, UsageError

CFG_FILENAME = "cfg.json"
WEIGHTS_FILENAME = "sae_weights.safetensors"
LEGATO_FILENAME = "legato.json"

# The layout written here. SAELens parses a folder whose metadata.sae_lens_version is below 6 as its older, flat layout.
SAELENS_VERSION = "6.54.0"

_WEIGHT_SHAPES: dict[str, dict[str, str]] = {
    "standard": {"W_enc": "DF", "b_enc": "F", "W_dec": "FD", "b_dec": "D"},
    "topk": {"W_enc": "DF", "b_enc": "F", "W_dec": "FD", "b_dec": "D"},
    "jumprelu": {"W_enc": "DF", "b_enc": "F", "W_dec": "FD", "b_dec": "D", "threshold": "F"},
    "hysteresis": {"W_enc": "DF", "b_enc": "F", "W_dec": "FD", "b_dec": "D", "threshold": "F"},
    "gated": {"W_enc": "DF", "b_gate": "F", "b_mag": "F", "r_mag": "F", "W_dec": "FD", "b_dec": "D"},
}

# What SAELens' own trainer records; a key the caller does not know stays None, which SAELens reads as unset.
_METADATA_KEYS = (
    "dataset_path",
    "hook_name",
    "model_name",
    "model_class_name",
    "hook_head_index",
    "context_size",
    "seqpos_slice",
    "model_from_pretrained_kwargs",
    "prepend_bos",
    "exclude_special_tokens",
    "sequence_separator_token",
    "disable_concat_sequences",
)


@dataclass(frozen=True)
class SAELensFolder:
    """A SAE as read from a SAELens folder, decoder norms folded where the folder asked for it.

    architecture: standard, topk, jumprelu, hysteresis or gated.
    weights: float32 tensors by SAELens' names: W_enc (D, F), W_dec (F, D), b_dec (D) and, by architecture,
        b_enc (F); threshold (F), a jumprelu latent fires strictly above it; b_gate, b_mag, r_mag (F).
    k: latents per token (topk only).
    release: share of the threshold down to which a latent that is on stays on (hysteresis only; see sae.held).
    apply_b_dec_to_input: whether b_dec is subtracted from the activation before encoding.
    metadata: the folder's metadata (model_name, hook_name, ...).
    legato: the content of legato.json beside it, None where there is none.
    """

    architecture: str
    weights: dict[str, Tensor]
    k: int | None
    release: float | None
    apply_b_dec_to_input: bool
    metadata: dict[str, Any]
    legato: dict[str, Any] | None


def write_saelens_folder(
    path: str | Path,
    *,
    architecture: str,
    W_enc: Tensor,
    W_dec: Tensor,
    b_dec: Tensor,
    b_enc: Tensor | None = None,
    threshold: Tensor | float | None = None,
    k: int | None = None,
    release: float | None = None,
    b_gate: Tensor | None = None,
    b_mag: Tensor | None = None,
    r_mag: Tensor | None = None,
    apply_b_dec_to_input: bool = True,
    metadata: Mapping[str, Any] | None = None,
    legato: Mapping[str, Any] | None = None,
) -> Path:
    """Save a SAE that maps raw activations to raw activations as a SAELens folder; return its path.

    architecture: `standard` (ReLU), `topk` (needs k), `jumprelu` (needs threshold), `hysteresis` (needs threshold and
        release), `gated` (needs b_gate, b_mag, r_mag and no b_enc), or `batchtopk`, which SAELens saves for inference
        as jumprelu, its one threshold for all latents.
    W_enc (D, F), W_dec (F, D), b_dec (D), b_enc / b_gate / b_mag / r_mag (F); threshold (F) or one number.
    metadata: model_name, hook_name, context_size, prepend_bos, ...; unknown keys are kept.
    legato: what SAELens has no field for, written beside it as legato.json.

    The folder appears whole or not at all: it is written under a temporary name and renamed. A SAE folder that is
    there already is replaced; any other non-empty folder is refused. Tensors are stored in float32.
    Raises LegatoError for tensors that do not fit together or are not finite. Layout: SAELens 6.54 `SAE.save_model`.
    """
    path = Path(path)
    stored_as = "jumprelu" if architecture == "batchtopk" else architecture
    if stored_as not in _WEIGHT_SHAPES:
        known = ", ".join([*_WEIGHT_SHAPES, "batchtopk"])
        raise UsageError(f"architecture {architecture!r} cannot be saved as a SAELens folder; choose one of {known}")
    for owner, name, value in (("topk", "k", k), ("hysteresis", "release", release)):
        if (stored_as == owner) != (value is not None):
            raise UsageError(f"architecture {architecture!r} {'needs' if stored_as == owner else 'takes no'} {name}")

    F = W_enc.shape[-1]
    if threshold is not None:
        threshold = torch.as_tensor(threshold, dtype=torch.float32).expand(F)
    given = {
        "W_enc": W_enc,
        "b_enc": b_enc,
        "threshold": threshold,
        "b_gate": b_gate,
        "b_mag": b_mag,
        "r_mag": r_mag,
        "W_dec": W_dec,
        "b_dec": b_dec,
    }
    weights = {
        name: tensor.detach().to("cpu", torch.float32).clone(memory_format=torch.contiguous_format)
        for name, tensor in given.items()
        if tensor is not None
    }
    _check_weights(stored_as, weights, what=f"SAE to be saved in {path}")

    cfg: dict[str, Any] = {
        "d_in": W_enc.shape[0],
        "d_sae": F,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": apply_b_dec_to_input,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {
            "sae_lens_version": SAELENS_VERSION,
            "sae_lens_training_version": None,
            **dict.fromkeys(_METADATA_KEYS),
            **(metadata or {}),
        },
    }
    if stored_as == "topk":
        cfg |= {"k": k, "rescale_acts_by_decoder_norm": False}
    if stored_as == "hysteresis":
        cfg["release"] = _usable_release(release, what=f"SAE to be saved in {path}")
    cfg["architecture"] = stored_as

    if path.is_file() or (path.is_dir() and any(path.iterdir()) and not (path / CFG_FILENAME).is_file()):
        raise LegatoError(f"{path} exists and is not a SAE folder; choose another place to save to")
    try:
        _replace_folder(path, weights, cfg, legato)
    except OSError as error:
        raise LegatoError(f"cannot save the SAE in {path}: {error.strerror or error}") from error
    return path


def read_saelens_folder(path: str | Path) -> SAELensFolder:
    """Read a SAELens folder that encodes raw activations.

    A topk folder with `rescale_acts_by_decoder_norm` is returned with the decoder norms folded into the encoder, which
    leaves the selection, the codes and the reconstruction as SAELens computes them.
    Raises UsageError where the folder or a file is missing, LegatoError where it is damaged or asks for something that
    cannot be reproduced (another architecture, run-time normalisation, head reshaping, the layout before SAELens 6).
    """
    path = Path(path)
    for name in (CFG_FILENAME, WEIGHTS_FILENAME):
        if not (path / name).is_file():
            raise UsageError(f"{path} is not a SAELens folder: it has no {name}")
    cfg = _read_json(path / CFG_FILENAME)
    metadata = cfg.get("metadata") or {}
    version = str(metadata.get("sae_lens_version") or cfg.get("sae_lens_version") or "0")
    if not version.split(".")[0].isdigit() or int(version.split(".")[0]) < 6:
        raise LegatoError(f"{path} has SAELens' layout before version 6; load and save it once with SAELens 6 or later")
    architecture = cfg.get("architecture")
    if architecture not in _WEIGHT_SHAPES:
        raise LegatoError(f"{path} holds architecture {architecture!r}; can be read: {', '.join(_WEIGHT_SHAPES)}")
    for key in ("normalize_activations", "reshape_activations"):
        if cfg.get(key, "none") != "none":
            raise LegatoError(f"{path} asks for {key}={cfg[key]!r}, which is not folded into its weights")

    try:
        stored = load_file(path / WEIGHTS_FILENAME)
    except (SafetensorError, OSError) as error:
        raise LegatoError(f"{path / WEIGHTS_FILENAME} is damaged: {error}") from error
    weights = {name: tensor.to(torch.float32) for name, tensor in stored.items()}
    _check_weights(architecture, weights, what=str(path))
    k = cfg.get("k") if architecture == "topk" else None
    if architecture == "topk":
        if not isinstance(k, int) or not 0 < k <= weights["W_enc"].shape[1]:
            raise LegatoError(f"{path} is a topk SAE without a usable k ({k!r})")
        if cfg.get("rescale_acts_by_decoder_norm", False):
            weights = _fold_decoder_norm(weights)
    release = _usable_release(cfg.get("release"), what=str(path)) if architecture == "hysteresis" else None
    legato = _read_json(path / LEGATO_FILENAME) if (path / LEGATO_FILENAME).is_file() else None
    subtracts_b_dec = bool(cfg.get("apply_b_dec_to_input", True))
    return SAELensFolder(architecture, weights, k, release, subtracts_b_dec, metadata, legato)


def _usable_release(release: Any, *, what: str) -> float:
    if not isinstance(release, int | float) or not 0 < release <= 1:
        raise LegatoError(f"{what}: release must lie above 0 and at most at 1, not at {release!r}")
    return float(release)


def _check_weights(architecture: str, weights: dict[str, Tensor], *, what: str) -> None:
    expected = _WEIGHT_SHAPES[architecture]
    missing, surplus = sorted(expected.keys() - weights.keys()), sorted(weights.keys() - expected.keys())
    if missing or surplus:
        detail = "; ".join(
            f"{label} {', '.join(names)}" for label, names in (("missing", missing), ("unexpected", surplus)) if names
        )
        raise LegatoError(f"{what}: the tensors are not those of a {architecture} SAE ({detail})")
    if weights["W_enc"].ndim != 2:
        raise LegatoError(f"{what}: W_enc has shape {tuple(weights['W_enc'].shape)}, expected (d_in, d_sae)")
    size = dict(zip("DF", weights["W_enc"].shape, strict=True))
    for name, axes in expected.items():
        shape, wanted = tuple(weights[name].shape), tuple(size[axis] for axis in axes)
        if shape != wanted:
            raise LegatoError(f"{what}: {name} has shape {shape}, expected {wanted}")
        if not torch.isfinite(weights[name]).all():
            raise LegatoError(f"{what}: {name} holds values that are not finite")


def _fold_decoder_norm(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    norm_F = weights["W_dec"].norm(dim=-1)
    return weights | {
        "W_enc": weights["W_enc"] * norm_F,
        "b_enc": weights["b_enc"] * norm_F,
        "W_dec": weights["W_dec"] / norm_F[:, None],
    }


def _replace_folder(
    path: Path, weights: dict[str, Tensor], cfg: dict[str, Any], legato: Mapping[str, Any] | None
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        new = staging / "new"
        new.mkdir()
        save_file(weights, new / WEIGHTS_FILENAME)
        _write_json(new / CFG_FILENAME, cfg)
        if legato is not None:
            _write_json(new / LEGATO_FILENAME, legato)
        if path.exists():
            os.replace(path, staging / "old")
        try:
            os.replace(new, path)
        except OSError:
            if (staging / "old").exists():
                os.replace(staging / "old", path)
            raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise LegatoError(f"{path} is damaged: {error}") from error
    if not isinstance(content, dict):
        raise LegatoError(f"{path} is damaged: expected an object")
    return content
