"""Published SAEs that are files of weights with the rest in their names: Gemma Scope 1 and 2, Llama Scope, Qwen-Scope,
Goodfire.

None of them subtracts b_dec from the activation. Names are looked at as they are given, never through a link: in the
hub client's cache a file is a link to its content.

Shape legend: D activation width, F latents.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor

from legato.common.errors import LegatoError, UsageError
from legato.common.safe_read import as_dict, read_json_object, read_npz, read_safetensors, read_state_dict
from legato.sae.formats.hook_names import layer_and_site
from legato.sae.formats.weights import SAEWeights, check_weights, known, usable_numbers

GEMMA_SCOPE, GEMMA_SCOPE_2, LLAMA_SCOPE = "params.npz", "params.safetensors", "hyperparams.json"
QWEN_SCOPE = re.compile(r"layer(?P<layer>\d+)\.sae\.pt")
_GEMMA_PLACE = re.compile(r"gemma-scope-(?P<size>\d+b)-(?P<tuned>pt|it)-(?P<site>res|mlp|att)(?![a-z])")
_GEMMA_SITES = {"res": "resid_post", "mlp": "mlp_out", "att": "attn_z"}  # att: the heads before they are mixed
_GEMMA_2_PLACE = re.compile(r"gemma-scope-2-(?P<model>\d+[mb]-(?:pt|it))")
_GEMMA_2_SITES = {
    "resid_post": "resid_post",
    "attn_out": "self_attn.o_proj:input",
    "mlp_out": "post_feedforward_layernorm",
}
_QWEN_PLACE = re.compile(r"SAE-Res-(?P<model>.+?)-W\d+K-L0_(?P<k>\d+)")
_GOODFIRE_PLACE = re.compile(r"(?P<model>Llama-3\.\d-\d+B-Instruct)-SAE-l(?P<layer>\d+)")


def read_gemma_scope(path: Path) -> SAEWeights:
    """JumpReLU of `params.npz`; the folders' names tell the model, site and layer."""
    weights = {re.sub("^w_", "W_", name): tensor.float() for name, tensor in read_npz(path).items()}
    scaling_factor = weights.pop("scaling_factor", None)
    if scaling_factor is not None and not torch.allclose(scaling_factor, torch.ones_like(scaling_factor)):
        raise LegatoError(f"{path} scales its codes by a scaling_factor, which cannot be read here")
    folders = path.absolute().parent.as_posix()
    place, layer = _GEMMA_PLACE.search(folders), re.search(r"/layer_(\d+)(?:/|$)", folders)
    details: dict[str, Any] = {} if layer is None else {"layer": int(layer[1])}
    if place is not None:
        details["model"] = f"google/gemma-2-{place['size']}{'-it' if place['tuned'] == 'it' else ''}"
        details["site"] = _GEMMA_SITES[place["site"]]
    return _read("jumprelu", weights, path, "gemma-scope", details)


def read_gemma_scope_2(path: Path) -> SAEWeights:
    """JumpReLU of `params.safetensors`; `config.json` beside it, else the folders' names, tell model, layer and site.

    Raises LegatoError for a transcoder, which reads one place and writes another.
    """
    weights = {re.sub("^w_", "W_", name): tensor.float() for name, tensor in read_safetensors(path).items()}
    config = read_json_object(path.parent / "config.json") if (path.parent / "config.json").is_file() else {}
    folders = path.absolute().parent.as_posix()
    hook_in, hook_out = config.get("hf_hook_point_in"), config.get("hf_hook_point_out")  # of an SAE they are the same
    writes_elsewhere = hook_out is not None and hook_out != hook_in
    if writes_elsewhere or "affine_skip_connection" in weights or re.search("transcoder|/clt", folders):
        raise LegatoError(f"{path} is a transcoder, which reads one place and writes another; only SAEs can be read")
    if config.get("architecture", "jump_relu") != "jump_relu":
        raise LegatoError(f"{path} is a {config['architecture']!r} SAE; of Gemma Scope 2 jump_relu can be read")
    found, layer = _GEMMA_2_PLACE.search(folders), re.search(r"/layer_(\d+)_", f"{folders}_")
    site = next((site for name, site in _GEMMA_2_SITES.items() if re.search(rf"/{name}(_all)?/", folders)), None)
    details: dict[str, Any] = known(layer=None if layer is None else int(layer[1]), site=site)
    if hook_in:
        details["layer"], details["site"] = _hugging_face_hook(str(hook_in))
    model = config.get("model_name") or (f"gemma-3-{found['model']}" if found else None)
    if model is not None:  # some of the published files say gemma-v3; the smallest model's id has no -pt
        model = str(model).rpartition("/")[2].replace("-v3-", "-3-").replace("270m-pt", "270m")
        details["model"] = f"google/{model}"
    return _read(
        "jumprelu", weights, path, "gemma-scope-2", details, known(l0=config.get("l0"), type=config.get("type"))
    )


def _hugging_face_hook(hook: str) -> tuple[int, str]:
    """`model.layers.9.output`, `model.layers.9.self_attn.o_proj.input` as a layer and a site."""
    if hook.endswith(".input"):
        layer, site = layer_and_site(hook.removesuffix(".input"))
        return layer, "resid_pre" if site == "resid_post" else f"{site}:input"
    return layer_and_site(hook.removesuffix(".output"))


def read_llama_scope(folder: Path) -> SAEWeights:
    """A folder of `hyperparams.json` and `checkpoints/final.safetensors`: one JumpReLU threshold for all latents.

    The SAE takes activations times sqrt(D) / their average norm over the data set. Its threshold was measured after
    that factor was folded into the biases, and the decoder rows (where `sparsity_include_decoder_norm`) made of unit
    norm, so it is in units of the raw activations: Language-Model-SAEs f0058a58, `from_config`, `post_processing.py`.
    """
    config, path = read_json_object(folder / LLAMA_SCOPE), folder / "checkpoints/final.safetensors"
    hook = str(config.get("hook_point_in"))
    if config.get("hook_point_out", hook) != hook:
        raise LegatoError(f"{folder} is a transcoder, which reads one place and writes another; only SAEs can be read")
    for key, wanted in (
        ("act_fn", "jumprelu"),
        ("use_glu_encoder", False),
        ("apply_decoder_bias_to_pre_encoder", False),
    ):
        if config.get(key, wanted) != wanted:
            raise LegatoError(f"{folder}: its {key} is {config[key]!r}, and {wanted!r} can be read")
    weights = _linear(read_safetensors(path), path, "encoder", "decoder")
    D = weights["W_enc"].shape[0]
    if config.get("norm_activation") == "dataset-wise":
        norms = as_dict(config.get("dataset_average_activation_norm"))
        scales = [
            norm for norm in (norms.get("in"), norms.get("out", norms.get("in"))) if _is_number(norm) and norm > 0
        ]
        if len(scales) != 2:
            raise LegatoError(f"{folder}: its hyperparams.json does not say dataset_average_activation_norm")
        weights["W_enc"] *= D**0.5 / scales[0]
        weights["W_dec"] *= scales[1] / D**0.5
        weights["b_dec"] *= scales[1] / D**0.5
        unit = scales[0] / D**0.5
    elif config.get("norm_activation", "inference") in ("inference", "none"):
        unit = 1.0
    else:
        raise LegatoError(f"{folder}: its norm_activation {config['norm_activation']!r} cannot be read here")
    threshold = config.get("jump_relu_threshold")
    if not _is_number(threshold) or threshold < 0:
        raise LegatoError(f"{folder}: its jump_relu_threshold is {threshold!r}")
    weights["threshold"] = torch.full_like(weights["b_enc"], threshold)
    if config.get("sparsity_include_decoder_norm", True):
        weights["threshold"] /= weights["W_dec"].norm(dim=1).clamp_min(torch.finfo(torch.float32).tiny)
    else:
        weights["threshold"] /= unit
    is_base = "Llama3_1-8B-Base" in folder.absolute().as_posix()
    details: dict[str, Any] = {"model": "meta-llama/Llama-3.1-8B"} if is_base else {}
    try:
        details["layer"], details["site"] = layer_and_site(hook)
    except UsageError:  # whoever evaluates it says the place
        details["module_path"] = hook
    return _read("jumprelu", weights, folder, "llama-scope", details)


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def read_qwen_scope(path: Path) -> SAEWeights:
    """TopK of `layer<N>.sae.pt`, in a folder whose name tells k: `SAE-Res-<model>-W<width>K-L0_<k>`."""
    place, layer = _QWEN_PLACE.search(path.absolute().as_posix()), QWEN_SCOPE.fullmatch(path.name)
    if place is None or layer is None:
        raise UsageError(f"{path}: k is in the name of Qwen-Scope's folder: keep it, SAE-Res-<model>-W<width>K-L0_<k>")
    weights = read_state_dict(path)
    for name in ("W_enc", "W_dec"):  # stored as (F, D) and (D, F)
        if name in weights and weights[name].ndim == 2:
            weights[name] = weights[name].T.contiguous()
    details = {"model": f"Qwen/{place['model']}", "layer": int(layer["layer"]), "site": "resid_post"}
    return _read("topk", weights, path, "qwen-scope", details, {"k": int(place["k"])}, {"k": int(place["k"])})


def read_goodfire(path: Path, state: Mapping[str, Tensor]) -> SAEWeights:
    """ReLU of one .pt or .pth file; its name tells the model and the layer."""
    place = _GOODFIRE_PLACE.search(path.absolute().as_posix())
    details: dict[str, Any] = {}
    if place is not None:
        details = {"model": f"meta-llama/{place['model']}", "layer": int(place["layer"]), "site": "resid_post"}
    return _read("standard", _linear(state, path, "encoder_linear", "decoder_linear"), path, "goodfire", details)


def _linear(state: Mapping[str, Tensor], path: Path, encoder: str, decoder: str) -> dict[str, Tensor]:
    """Weights of two Linear layers, which store (out, in)."""
    names = {
        f"{encoder}.weight": "W_enc",
        f"{encoder}.bias": "b_enc",
        f"{decoder}.weight": "W_dec",
        f"{decoder}.bias": "b_dec",
    }
    if state.keys() != names.keys():
        raise LegatoError(f"{path} holds {', '.join(sorted(state)[:8])}, not {', '.join(names)}")
    return {
        ours: state[theirs].T.contiguous() if state[theirs].ndim == 2 else state[theirs]
        for theirs, ours in names.items()
    }


def _read(
    architecture: str,
    weights: dict[str, Tensor],
    path: Path,
    format_name: str,
    details: Mapping[str, Any],
    said: Mapping[str, Any] | None = None,
    numbers: Mapping[str, Any] | None = None,
) -> SAEWeights:
    check_weights(architecture, weights, what=str(path))
    F = weights["W_enc"].shape[1]
    return SAEWeights(
        architecture=architecture,
        weights=weights,
        apply_b_dec_to_input=False,
        details={**details, "source": {"format": format_name, **(said or {})}},
        numbers=usable_numbers(architecture, numbers or {}, F, what=str(path)),
    )
