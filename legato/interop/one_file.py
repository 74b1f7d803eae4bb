"""One safetensors file: an SAE's tensors by SAELens' names, what it is beside them as JSON in the file's header."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from legato.errors import LegatoError
from legato.interop.stored import WEIGHT_SHAPES, StoredSAE, check_weights, usable_numbers
from legato.interop.untrusted import read_safetensors, safetensors_header

HEADER = "legato"


def is_one_file(path: Path) -> bool:
    return HEADER in safetensors_header(path)


def read_one_file(path: Path) -> StoredSAE:
    try:
        header = json.loads(safetensors_header(path)[HEADER])
        architecture, details = header["architecture"], header["details"]
    except (ValueError, KeyError, TypeError) as error:
        raise LegatoError(f"{path} is damaged: its header does not say what SAE it is") from error
    if architecture not in WEIGHT_SHAPES or not isinstance(details, dict):
        raise LegatoError(f"{path} holds architecture {architecture!r}; can be read: {', '.join(WEIGHT_SHAPES)}")
    weights = read_safetensors(path)
    check_weights(architecture, weights, what=str(path))
    numbers = usable_numbers(architecture, header, weights["W_enc"].shape[1], what=str(path))
    return StoredSAE(architecture=architecture, weights=weights, apply_b_dec_to_input=False, details=details, **numbers)


def write_one_file(
    path: Path,
    architecture: str,
    weights: Mapping[str, Tensor],
    numbers: Mapping[str, Any],
    details: Mapping[str, Any],
) -> None:
    header = {"architecture": architecture, **numbers, "details": details}
    tensors = {name: tensor.detach().contiguous() for name, tensor in weights.items()}
    save_file(tensors, path, metadata={HEADER: json.dumps(header, allow_nan=False)})
