"""One safetensors file: an SAE's tensors by SAELens' names, what it is beside them as JSON in the file's header."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from legato.common.errors import LegatoError, UsageError
from legato.common.safe_read import read_safetensors, safetensors_header
from legato.sae.architectures import architectures
from legato.sae.formats.weights import SAEWeights, check_weights, new_sae, usable_numbers

HEADER = "legato"
SUFFIX = ".safetensors"


def is_one_file(path: Path) -> bool:
    return HEADER in safetensors_header(path)


def read_one_file(path: Path) -> SAEWeights:
    try:
        header = json.loads(safetensors_header(path)[HEADER])
        digest = header.pop("sha256", None)
        architecture, details = header["architecture"], header["details"]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise LegatoError(f"{path} is damaged: its header does not say what SAE it is") from error
    known = architectures()
    if str(architecture) not in known or not isinstance(details, dict):
        raise LegatoError(f"{path} holds architecture {architecture!r}; can be read: {', '.join(known)}")
    if strange := sorted(header.keys() - {"architecture", "details", *known[architecture].numbers}):
        raise LegatoError(f"{path} is damaged, or of a later version: its header holds {strange[0]!r}")
    weights = read_safetensors(path)
    if digest not in (None, _digest_of(header, weights)):
        raise LegatoError(f"{path} is damaged, or was changed after it was saved: save the SAE again")
    check_weights(architecture, weights, what=str(path))
    numbers = usable_numbers(architecture, header, weights["W_enc"].shape[1], what=str(path))
    return SAEWeights(
        architecture=architecture, weights=weights, apply_b_dec_to_input=False, details=details, numbers=numbers
    )


def write_one_file(path: Path, stored: SAEWeights) -> None:
    """Replaces a file of its own kind only."""
    if path.suffix != SUFFIX:
        raise UsageError(f"{path} would be one file of tensors: give it a name that ends in {SUFFIX}")
    if path.is_file() and not is_one_file(path):
        raise UsageError(f"{path} exists and is not an SAE of Legato's; choose another place to save to")
    header = {**_header(stored), "sha256": sha256_of(stored)}
    tensors = {name: tensor.contiguous() for name, tensor in stored.weights.items()}
    with new_sae(path, marker=None) as new:
        save_file(tensors, new, metadata={HEADER: json.dumps(header, allow_nan=False)})


def sha256_of(stored: SAEWeights) -> str:
    """SHA-256 of all that an SAE is, in whatever format it was found."""
    return _digest_of(_header(stored), stored.weights)


def _header(stored: SAEWeights) -> dict[str, Any]:
    return {"architecture": stored.architecture, **stored.numbers, "details": stored.details}


def _digest_of(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} ".encode() + tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()
