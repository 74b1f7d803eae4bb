"""Gemma Scope's `params.npz`: JumpReLU SAEs that encode the activation without subtracting b_dec.

Shape legend: D activation width, F latents.
"""

import re
from pathlib import Path
from typing import Any

import torch

from legato.common.errors import LegatoError
from legato.common.safe_read import read_npz
from legato.sae.formats.weights import SAEWeights, check_weights, known

FILENAME = "params.npz"
_PLACE = re.compile(r"gemma-scope-(?P<size>\d+b)-(?P<tuned>pt|it)-(?P<site>res|mlp|att)(?![a-z])")
_SITES = {"res": "resid_post", "mlp": "mlp_out", "att": "attn_out"}


def read_folder(folder: Path) -> SAEWeights:
    return read_gemma_scope(folder / FILENAME)


def read_gemma_scope(path: Path) -> SAEWeights:
    """path: the file, in whose folders' names Gemma Scope keeps the model, site and layer."""
    weights = {re.sub("^w_", "W_", name): tensor.float() for name, tensor in read_npz(path).items()}
    scaling_factor = weights.pop("scaling_factor", None)
    if scaling_factor is not None and not torch.allclose(scaling_factor, torch.ones_like(scaling_factor)):
        raise LegatoError(f"{path} scales its codes by a scaling_factor, which cannot be read here")
    check_weights("jumprelu", weights, what=str(path))
    return SAEWeights(
        architecture="jumprelu",
        weights=weights,
        apply_b_dec_to_input=False,
        details={**_place(path), "source": {"format": "gemma-scope"}},
    )


def _place(path: Path) -> dict[str, Any]:
    folders = path.absolute().parent.as_posix()
    release, layer = _PLACE.search(folders), re.search(r"/layer_(\d+)(?:/|$)", folders)
    site = None if release is None else _SITES[release["site"]]
    model = None
    if release is not None:
        model = f"google/gemma-2-{release['size']}{'-it' if release['tuned'] == 'it' else ''}"
    if site == "attn_out":  # Gemma Scope reads the heads' outputs before they are mixed, which is no site here
        return known(model=model)
    return known(model=model, layer=None if layer is None else int(layer[1]), site=site)
