"""An SAE as a file holds it, whatever the format, and what every format is checked for.

Shape legend: D activation width, F latents.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from legato.common.errors import LegatoError
from legato.common.files import whole
from legato.sae.architectures import architecture_named

_KINDS: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("model", "site", "module_path", "dataset"), str),
    **dict.fromkeys(("layer", "context_length"), int),
    **dict.fromkeys(("objective", "training", "source", "processed"), dict),
    "held_out": (int, float),
}
_LATENTS_AT_ONCE = 4096


@dataclass(frozen=True, kw_only=True)
class SAEWeights:
    """A SAE as read from a file, in float32, decoder norms and normalisers folded where the file asked for it.

    architecture: its name in `architectures()`: SAELens' standard, topk, jumprelu, gated, or one of Legato's.
    weights: tensors by SAELens' names: W_enc (D, F), W_dec (F, D), b_dec (D) and those of the architecture
        (`Architecture.shapes`).
    apply_b_dec_to_input: whether b_dec is subtracted from the activation before encoding.
    details: what the file says about the SAE (model, layer, site, module_path, context_length, ...), under the names
        of legato.json; "source" tells the format and what it has beyond an SAE's function.
    numbers: the architecture's own, such as k (`Architecture.numbers`).
    """

    architecture: str
    weights: dict[str, Tensor]
    apply_b_dec_to_input: bool
    details: dict[str, Any] = field(default_factory=dict)
    numbers: dict[str, Any] = field(default_factory=dict)


def checked_details(details: Mapping[str, Any], *, what: str) -> dict[str, Any]:
    """The details as they are. LegatoError where one of those that Legato acts on is of another type."""
    for name, kind in _KINDS.items():
        value = details.get(name)
        if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
            raise LegatoError(f"{what}: its details say {name} = {str(value)[:80]!r}, which cannot be: mend the file")
    return dict(details)


def known(**details: Any) -> dict[str, Any]:
    """Keep the entries that are not None."""
    return {name: value for name, value in details.items() if value is not None}


def usable_numbers(architecture: str, given: Mapping[str, Any], F: int, *, what: str) -> dict[str, Any]:
    """The architecture's own numbers. LegatoError where one is missing or out of its range."""
    wanted = architecture_named(architecture).numbers
    for name, number in wanted.items():
        if not number.allows(value := given.get(name), F):
            raise LegatoError(f"{what}: {number.problem.format(architecture=architecture, name=name, value=value)}")
    return {name: given[name] for name in wanted}


def check_weights(architecture: str, weights: Mapping[str, Tensor], *, what: str) -> None:
    """LegatoError where tensors are missing, unexpected, do not fit together or are not finite."""
    expected = architecture_named(architecture).shapes()
    missing, surplus = sorted(expected.keys() - weights.keys()), sorted(weights.keys() - expected.keys())
    if missing or surplus:
        detail = "; ".join(
            f"{label} {', '.join(names)}" for label, names in (("missing", missing), ("unexpected", surplus)) if names
        )
        raise LegatoError(f"{what}: the tensors are not those of a {architecture} SAE ({detail})")
    if weights["W_enc"].ndim != 2:
        raise LegatoError(f"{what}: W_enc has shape {tuple(weights['W_enc'].shape)}, expected (d_in, d_sae)")
    size = dict(zip("DF", weights["W_enc"].shape, strict=True))
    if 0 in size.values():
        raise LegatoError(f"{what}: W_enc has shape {tuple(size.values())}: the SAE has no latents, or no width")
    for name, axes in expected.items():
        shape, wanted = tuple(weights[name].shape), tuple(size[axis] for axis in axes)
        if shape != wanted:
            raise LegatoError(f"{what}: {name} has shape {shape}, expected {wanted}")
        if not weights[name].is_floating_point():
            raise LegatoError(f"{what}: {name} holds {weights[name].dtype}, not numbers with a fraction")
        if not torch.isfinite(weights[name]).all():
            raise LegatoError(f"{what}: {name} holds values that are not finite")


def both_signs(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a selection by magnitude that keeps the sign, as one of positive codes: latent F + f is f below 0.

    One of the two is always 0, so the k largest magnitudes of F are the k largest of 2 F, and L0 and L1 those of the
    magnitudes.
    """
    signs = {"W_enc": 1, "b_enc": 0, "W_dec": 0}
    return {name: torch.cat([w, -w], signs[name]) if name in signs else w for name, w in weights.items()}


def has_unit_rows(W_dec: Tensor) -> bool:
    norm_F = W_dec.norm(dim=-1)
    return torch.allclose(norm_F, torch.ones_like(norm_F))


def fold_decoder_norm(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Unit decoder rows and codes in units of the reconstruction; a row of zeros stays one."""
    norm_F = weights["W_dec"].norm(dim=-1)
    return {
        **weights,
        "W_enc": weights["W_enc"] * norm_F,
        "b_enc": weights["b_enc"] * norm_F,
        "W_dec": weights["W_dec"] / norm_F.clamp_min(torch.finfo(torch.float32).tiny)[:, None],
    }


def encoded(vector_D: Tensor, W_enc: Tensor) -> Tensor:
    """vector_D @ W_enc (F), in float64: what subtracting a vector from the input takes off the pre-activations."""
    wide_D = vector_D.double()
    return torch.cat([wide_D @ part.double() for part in W_enc.split(_LATENTS_AT_ONCE, dim=1)])


def without_input_bias(stored: SAEWeights) -> dict[str, Tensor]:
    """The weights of the same SAE that takes activations as they are: b_dec goes into the encoder's biases."""
    return _shifted(stored.weights, -1) if stored.apply_b_dec_to_input else stored.weights


def with_input_bias(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of without_input_bias, for formats whose SAEs subtract b_dec. Exact up to rounding a bias."""
    return _shifted(weights, 1)


def _shifted(weights: Mapping[str, Tensor], sign: int) -> dict[str, Tensor]:
    shift_F = sign * encoded(weights["b_dec"], weights["W_enc"])
    gain_F = weights["r_mag"].double().exp() if "r_mag" in weights else 1.0
    shifts = {"b_enc": shift_F, "b_gate": shift_F, "b_mag": gain_F * shift_F}
    return {
        **weights,
        **{name: (weights[name].double() + by_F).float() for name, by_F in shifts.items() if name in weights},
    }


@contextmanager
def new_sae(path: Path, marker: str | None) -> Iterator[Path]:
    """A place to write an SAE, which becomes `path`, whole or not at all, when the block ends without an error.

    marker: the file that tells a folder with an SAE, which is replaced; any other that is not empty is refused. None:
    the SAE is one file.
    """
    if marker is None and path.is_dir():
        raise LegatoError(f"{path} is a folder; name a file in it to save to")
    is_taken = path.is_file() or (path.is_dir() and any(path.iterdir()))
    if marker is not None and is_taken and not (path / marker).is_file():
        raise LegatoError(f"{path} exists and is not a SAE folder; choose another place to save to")
    try:
        with whole(path) as new:
            if marker is not None:
                new.mkdir()
            yield new
    except OSError as error:
        raise LegatoError(f"cannot save the SAE in {path}: {error.strerror or error}") from error
