"""SAELens folders: `cfg.json` + `sae_weights.safetensors`, as SAELens 6.54 saves and opens them.

`SAE.load_from_disk(folder)` opens what `write_saelens_folder` writes; neither function needs SAELens installed. SAELens
knows Legato's own architectures after `import legato.interop.saelens`.

Shape legend: D activation width, F latents.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from legato.common.errors import LegatoError, UsageError
from legato.common.files import Manifest, sha256_json
from legato.common.safe_read import as_dict, read_json_object, read_safetensors, write_json
from legato.sae.architectures import architectures
from legato.sae.formats.saelens_training import THRESHOLD_AT_THE_END, training_normaliser, with_threshold
from legato.sae.formats.weights import (
    SAEWeights,
    both_signs,
    check_weights,
    fold_decoder_norm,
    known,
    new_sae,
    usable_numbers,
)

CFG_FILENAME = "cfg.json"
WEIGHTS_FILENAME = "sae_weights.safetensors"
LEGATO_FILENAME = "legato.json"
FORMAT_KEY, FORMAT = "format", "legato-sae-1"
CHECKSUMS_KEY = "sha256"  # in legato.json: of the two files beside it, and of the rest of itself

_VOUCHED_FOR = (CFG_FILENAME, WEIGHTS_FILENAME)

# The layout written here. SAELens parses a folder whose metadata.sae_lens_version is below 6 as its older, flat layout.
SAELENS_VERSION = "6.54.0"

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


def write_saelens_folder(
    path: str | Path,
    stored: SAEWeights,
    *,
    metadata: Mapping[str, Any] | None = None,
    legato: Mapping[str, Any] | None = None,
) -> Path:
    """Save a SAE that maps raw activations to raw activations as a SAELens folder; return its path.

    metadata: model_name, hook_name, context_size, prepend_bos, ...; unknown keys are kept.
    legato: what SAELens has no field for, written beside it as legato.json.

    The folder appears whole or not at all: it is written under a temporary name and renamed. A SAE folder that is
    there already is replaced; any other non-empty folder is refused. Tensors are stored in float32.
    Raises LegatoError for tensors and numbers that do not fit together or are not finite. Layout: SAELens 6.54
    `SAE.save_model`.
    """
    path, architecture, what = Path(path), stored.architecture, f"SAE to be saved in {path}"
    weights = {
        name: tensor.detach().to("cpu", torch.float32).clone(memory_format=torch.contiguous_format)
        for name, tensor in stored.weights.items()
    }
    check_weights(architecture, weights, what=what)
    D, F = weights["W_enc"].shape
    cfg: dict[str, Any] = {
        "d_in": D,
        "d_sae": F,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": stored.apply_b_dec_to_input,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {
            "sae_lens_version": SAELENS_VERSION,
            "sae_lens_training_version": None,
            **dict.fromkeys(_METADATA_KEYS),
            **(metadata or {}),
        },
    }
    cfg |= usable_numbers(architecture, stored.numbers, F, what=what)
    if architecture == "topk":
        cfg["rescale_acts_by_decoder_norm"] = False
    cfg["architecture"] = architecture

    with new_sae(path, CFG_FILENAME) as folder:
        save_file(weights, folder / WEIGHTS_FILENAME)
        write_json(folder / CFG_FILENAME, cfg)
        if legato is not None:
            sums = {LEGATO_FILENAME: sha256_json(legato), **Manifest.of(folder, _VOUCHED_FOR).sha256}
            write_json(folder / LEGATO_FILENAME, {**legato, FORMAT_KEY: FORMAT, CHECKSUMS_KEY: sums})
    return path


def read_saelens_folder(path: str | Path) -> SAEWeights:
    """Read a SAELens folder, a training save or an inference save, as an SAE that encodes raw activations.

    Decoder norms are folded where `rescale_acts_by_decoder_norm` asks for it, which leaves the selection, the codes and
    the reconstruction as SAELens computes them. What a training save has besides: see saelens_training.py.
    Raises UsageError where the folder or a file is missing, LegatoError where it is damaged or asks for something that
    cannot be reproduced (another architecture, run-time normalisation, head reshaping, the layout before SAELens 6).
    """
    path = Path(path)
    for name in (CFG_FILENAME, WEIGHTS_FILENAME):
        if not (path / name).is_file():
            raise UsageError(f"{path} is not a SAELens folder: it has no {name}")
    legato = _read_legato(path)
    cfg = read_json_object(path / CFG_FILENAME)
    metadata = as_dict(cfg.get("metadata"))
    version = str(metadata.get("sae_lens_version") or cfg.get("sae_lens_version") or "0")
    if not version.split(".")[0].isdigit() or int(version.split(".")[0]) < 6:
        raise LegatoError(f"{path} has SAELens' layout before version 6; load and save it once with SAELens 6 or later")
    saved_as = str(cfg.get("architecture"))
    architecture = "jumprelu" if saved_as in THRESHOLD_AT_THE_END else {"abstopk": "topk"}.get(saved_as, saved_as)
    if architecture not in architectures():
        can = ", ".join([*architectures(), "abstopk", *THRESHOLD_AT_THE_END])
        raise LegatoError(f"{path} holds architecture {saved_as!r}; can be read: {can}")
    if metadata.get("hook_head_index") is not None:
        raise LegatoError(f"{path} reads head {metadata['hook_head_index']} alone, which is no site here")
    # hook_z puts the heads side by side, as the site attn_z is read.
    if cfg.get("reshape_activations", "none") not in ("none", "hook_z"):
        raise LegatoError(f"{path} asks for reshape_activations={cfg['reshape_activations']!r}: it cannot be read here")
    normaliser = training_normaliser(path, cfg)

    weights = read_safetensors(path / WEIGHTS_FILENAME)
    if saved_as in THRESHOLD_AT_THE_END:
        weights = with_threshold(weights, what=str(path))
    check_weights(architecture, weights, what=str(path))
    numbers = usable_numbers(architecture, cfg, weights["W_enc"].shape[1], what=str(path))
    if saved_as in ("topk", "abstopk", *THRESHOLD_AT_THE_END) and cfg.get("rescale_acts_by_decoder_norm", False):
        weights = fold_decoder_norm(weights)
    subtracts_b_dec = bool(cfg.get("apply_b_dec_to_input", True))
    if normaliser is not None:
        weights = normaliser.folded_into(weights, subtracts_b_dec)
    if saved_as == "abstopk":
        weights = both_signs(weights)
    return SAEWeights(
        architecture=architecture,
        weights=weights,
        apply_b_dec_to_input=subtracts_b_dec,
        details=_details(metadata, saved_as) if legato is None else legato,
        numbers=numbers,
    )


def _read_legato(folder: Path) -> dict[str, Any] | None:
    """legato.json less its seal, which it and what lies beside it must match; None where there is none."""
    if not (folder / LEGATO_FILENAME).is_file():
        return None
    content = read_json_object(folder / LEGATO_FILENAME)
    legato = {key: value for key, value in content.items() if key not in (FORMAT_KEY, CHECKSUMS_KEY)}
    if len(legato) == len(content):  # of an earlier version, or taken out by who changed a file
        return legato
    sums, format_of = as_dict(content.get(CHECKSUMS_KEY)), content.get(FORMAT_KEY)
    if sums and format_of not in (None, FORMAT):
        raise LegatoError(f"{folder / LEGATO_FILENAME} is of format {format_of!r}, not {FORMAT!r}: use a newer legato")
    damaged = Manifest(folder, sums).damaged(_VOUCHED_FOR)
    if format_of is None or sums.get(LEGATO_FILENAME) != sha256_json(legato):
        damaged.insert(0, LEGATO_FILENAME)
    for name in damaged:
        raise LegatoError(
            f"{folder / name} is damaged, or not what was saved with this {LEGATO_FILENAME}: save the SAE again, "
            f"or take {FORMAT_KEY!r} and {CHECKSUMS_KEY!r} out of {LEGATO_FILENAME} to read it as it is"
        )
    return legato


def _details(metadata: Mapping[str, Any], saved_as: str) -> dict[str, Any]:
    trained_as = as_dict(metadata.get("training_architecture_details"))
    return known(
        model=metadata.get("model_name"),
        module_path=metadata.get("hook_name"),
        context_length=metadata.get("context_size"),
        bos=metadata.get("prepend_bos"),
        dataset=metadata.get("dataset_path"),
        processed=as_dict(metadata.get("model_from_pretrained_kwargs")) or None,
        source=known(
            format="saelens",
            version=metadata.get("sae_lens_version"),
            architecture=metadata.get("training_architecture") or saved_as,
            group_ends=trained_as.get("matryoshka_widths"),
            k=trained_as.get("k"),
        ),
    )
