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
    "hysteresis_topk": {"W_enc": "DF", "b_enc": "F", "W_dec": "FD", "b_dec": "D"},
    "window_topk": {"W_enc": "DF", "b_enc": "F", "W_dec": "FD", "b_dec": "D", "threshold": "F"},
    "persistent": {"W_enc": "DF", "b_enc": "F", "W_dec": "FD", "b_dec": "D", "threshold": "F", "leak": "F"},
    "gated": {"W_enc": "DF", "b_gate": "F", "b_mag": "F", "r_mag": "F", "W_dec": "FD", "b_dec": "D"},
}

# What each architecture has beside its tensors.
_NUMBERS: dict[str, tuple[str, ...]] = {
    "topk": ("k",),
    "hysteresis": ("release",),
    "hysteresis_topk": ("k", "release"),
    "window_topk": ("window",),
    "persistent": ("tail",),
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

    architecture: standard, topk, jumprelu, gated, or one of Legato's: hysteresis, hysteresis_topk, window_topk,
        persistent.
    weights: float32 tensors by SAELens' names: W_enc (D, F), W_dec (F, D), b_dec (D) and, by architecture,
        b_enc (F); threshold (F), a jumprelu latent fires strictly above it; b_gate, b_mag, r_mag (F).
    k: latents per token (topk, hysteresis_topk).
    release: share of the threshold down to which a latent that is on stays on (hysteresis, hysteresis_topk).
    window: tokens for which a latent is chosen at once (window_topk).
    tail: share of a stretch's peak below which its codes are cut (persistent, whose weights hold leak (F)).
    apply_b_dec_to_input: whether b_dec is subtracted from the activation before encoding.
    metadata: the folder's metadata (model_name, hook_name, ...).
    legato: the content of legato.json beside it, None where there is none.
    """

    architecture: str
    weights: dict[str, Tensor]
    k: int | None
    release: float | None
    window: int | None
    tail: float | None
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
    window: int | None = None,
    tail: float | None = None,
    leak: Tensor | None = None,
    b_gate: Tensor | None = None,
    b_mag: Tensor | None = None,
    r_mag: Tensor | None = None,
    apply_b_dec_to_input: bool = True,
    metadata: Mapping[str, Any] | None = None,
    legato: Mapping[str, Any] | None = None,
) -> Path:
    """Save a SAE that maps raw activations to raw activations as a SAELens folder; return its path.

    architecture: `standard` (ReLU), `topk` (needs k), `jumprelu` (needs threshold), `hysteresis` (needs threshold and
        release), `hysteresis_topk` (k and release), `window_topk` (threshold and window), `persistent` (threshold,
        leak and tail), `gated` (needs b_gate, b_mag, r_mag and no b_enc), or `batchtopk`, which SAELens saves for
        inference as jumprelu, its one threshold for all latents.
    W_enc (D, F), W_dec (F, D), b_dec (D), b_enc / leak / b_gate / b_mag / r_mag (F); threshold (F) or one number.
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
    own = _NUMBERS.get(stored_as, ())
    numbers = {"k": k, "release": release, "window": window, "tail": tail}
    for name, value in numbers.items():
        if (name in own) != (value is not None):
            raise UsageError(f"architecture {architecture!r} {'needs' if name in own else 'takes no'} {name}")

    F = W_enc.shape[-1]
    if threshold is not None:
        threshold = torch.as_tensor(threshold, dtype=torch.float32).expand(F)
    given = {
        "W_enc": W_enc,
        "b_enc": b_enc,
        "threshold": threshold,
        "leak": leak,
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
    cfg |= _usable_numbers(stored_as, numbers, F, what=f"SAE to be saved in {path}")
    if stored_as == "topk":
        cfg["rescale_acts_by_decoder_norm"] = False
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
    numbers = _usable_numbers(architecture, cfg, weights["W_enc"].shape[1], what=str(path))
    if architecture == "topk" and cfg.get("rescale_acts_by_decoder_norm", False):
        weights = _fold_decoder_norm(weights)
    legato = _read_json(path / LEGATO_FILENAME) if (path / LEGATO_FILENAME).is_file() else None
    subtracts_b_dec = bool(cfg.get("apply_b_dec_to_input", True))
    k, release, window, tail = (numbers.get(name) for name in ("k", "release", "window", "tail"))
    return SAELensFolder(architecture, weights, k, release, window, tail, subtracts_b_dec, metadata, legato)


def _usable_numbers(architecture: str, given: Mapping[str, Any], F: int, *, what: str) -> dict[str, Any]:
    """The architecture's own numbers. LegatoError where one is missing or out of its range."""
    numbers: dict[str, Any] = {name: given.get(name) for name in _NUMBERS.get(architecture, ())}
    for name, value in numbers.items():
        whole = isinstance(value, int) and not isinstance(value, bool)
        if name == "k" and not (whole and 0 < value <= F):
            raise LegatoError(f"{what}: a {architecture} SAE without a usable k ({value!r})")
        if name == "release" and not (isinstance(value, int | float) and 0 < value <= 1):
            raise LegatoError(f"{what}: release must lie above 0 and at most at 1, not at {value!r}")
        if name == "tail" and not (isinstance(value, int | float) and 0 < value < 1):
            raise LegatoError(f"{what}: tail must lie between 0 and 1, not at {value!r}")
        if name == "window" and not (whole and value >= 1):
            raise LegatoError(f"{what}: window must be a whole number of tokens, not {value!r}")
    return numbers


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
