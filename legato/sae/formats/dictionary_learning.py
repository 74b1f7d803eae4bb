"""Runs of dictionary_learning 0.1: `trainer_<i>/{config.json, ae.pt, checkpoints/ae_<step>.pt}`, plain state dicts.

An activation normaliser is folded into the biases of what is saved, the checkpoints included. temporal-saes (T-SAE,
arXiv 2511.05541) is a fork that writes the same layout; of its objective config.json says `temporal` and the groups,
but neither the coefficient nor whether the term was contrastive.

What is written, `dictionary_learning.utils.load_dictionary` opens.

Shape legend: D activation width, F latents.
"""

import re
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from legato.common.errors import LegatoError, UsageError
from legato.common.safe_read import as_dict, read_json_object, read_state_dict, write_json
from legato.sae.architectures import architecture_named
from legato.sae.formats.hook_names import layer_and_site
from legato.sae.formats.weights import (
    SAEWeights,
    check_weights,
    fold_decoder_norm,
    has_unit_rows,
    known,
    new_sae,
    usable_numbers,
    with_input_bias,
)

WEIGHTS_FILENAME = "ae.pt"
CONFIG_FILENAME = "config.json"
LEGATO_KEY = "legato"  # in config.json: what the SAE knows of itself, where Legato wrote it

# By dict_class, the state dict's names for SAELens' names; a T marks the transpose that a Linear layer stores.
LINEAR = {"W_enc": "encoder.weight.T", "b_enc": "encoder.bias", "W_dec": "decoder.weight.T"}
PLAIN = {name: name for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
NAMES: dict[str, dict[str, str]] = {
    "AutoEncoder": {**LINEAR, "b_dec": "bias"},
    "AutoEncoderNew": {**LINEAR, "b_dec": "decoder.bias"},
    "AutoEncoderTopK": {**LINEAR, "b_dec": "b_dec"},
    "BatchTopKSAE": {**LINEAR, "b_dec": "b_dec"},
    "MatryoshkaBatchTopKSAE": PLAIN,
    "TemporalMatryoshkaBatchTopKSAE": PLAIN,  # of temporal-saes
    "JumpReluAutoEncoder": {**PLAIN, "threshold": "threshold"},
    "GatedAutoEncoder": {
        "W_enc": "encoder.weight.T",
        "b_gate": "gate_bias",
        "b_mag": "mag_bias",
        "r_mag": "r_mag",
        "W_dec": "decoder.weight.T",
        "b_dec": "decoder_bias",
    },
}

# Buffers beside the weights.
BUFFERS: dict[str, tuple[str, ...]] = {
    "AutoEncoderTopK": ("k", "threshold"),
    "BatchTopKSAE": ("k", "threshold"),
    "MatryoshkaBatchTopKSAE": ("k", "threshold", "group_sizes"),
    "TemporalMatryoshkaBatchTopKSAE": ("k", "threshold", "group_sizes"),
}

ARCHITECTURES = {
    "AutoEncoder": "standard",
    "AutoEncoderNew": "standard",
    "AutoEncoderTopK": "topk",
    "BatchTopKSAE": "jumprelu",
    "MatryoshkaBatchTopKSAE": "jumprelu",
    "TemporalMatryoshkaBatchTopKSAE": "jumprelu",
    "JumpReluAutoEncoder": "jumprelu",
    "GatedAutoEncoder": "gated",
}

# The two whose encode takes the activation as it is.
TAKES_RAW_INPUT = ("AutoEncoderNew", "JumpReluAutoEncoder")


def read_run(folder: Path) -> SAEWeights:
    """The final save of a trainer's folder."""
    return read_dictionary_learning(folder / WEIGHTS_FILENAME, read_state_dict(folder / WEIGHTS_FILENAME))


def read_dictionary_learning(path: Path, state: Mapping[str, Tensor]) -> SAEWeights:
    """path: a state dict (ae.pt, checkpoints/ae_<step>.pt), with its run's config.json beside or above it.

    Names that torch.compile or DataParallel put a prefix before are read without it. A TopK of before December 2024 has
    no buffers: its k is the one of config.json.

    An AutoEncoder whose decoder rows are not of unit norm is returned with the norms folded into the encoder, as the
    library's own loader does. Raises LegatoError where config.json and the tensors do not fit together, and for a
    BatchTopK whose threshold was never set: its codes would be every positive pre-activation.
    """
    state = {re.sub(r"^((_orig_mod|module)\.)+", "", name): tensor for name, tensor in state.items()}
    config = read_config(path)
    trainer = as_dict(config.get("trainer"))
    dict_class = str(trainer.get("dict_class") or _class_of(state, path))
    if dict_class not in NAMES:
        raise LegatoError(f"{path} holds a {dict_class}; can be read: {', '.join(NAMES)}")
    names, buffers = NAMES[dict_class], BUFFERS.get(dict_class, ())
    if dict_class == "AutoEncoderTopK" and not state.keys() & set(buffers) and isinstance(trainer.get("k"), int):
        state |= {"k": torch.tensor(trainer["k"]), "threshold": torch.tensor(-1.0)}
    expected = {name.removesuffix(".T") for name in names.values()} | set(buffers)
    if missing := sorted(expected - state.keys()):
        raise LegatoError(f"{path} is not the {dict_class} its config.json names: it has no {', '.join(missing)}")
    if surplus := sorted(state.keys() - expected):
        raise LegatoError(f"{path} is not the {dict_class} its config.json names: it also has {', '.join(surplus)}")

    architecture = ARCHITECTURES[dict_class]
    weights = {ours: _of(state, theirs) for ours, theirs in names.items()}
    k = _whole(state["k"], f"{path}: k") if "k" in buffers else None
    if k is not None and trainer.get("k", k) != k:
        raise LegatoError(f"{path} has k = {k}, its config.json k = {trainer['k']}: they are not of one run")
    threshold = _number(state["threshold"], f"{path}: threshold") if "threshold" in buffers else None
    if architecture == "jumprelu" and threshold is not None:
        if threshold < 0:
            raise LegatoError(
                f"{path}: its threshold was never set (training ended before threshold_start_step); train it longer, "
                "or store one in the state dict's `threshold`"
            )
        weights["threshold"] = torch.full_like(weights["b_enc"], threshold)
    groups = [int(size) for size in state["group_sizes"].flatten()] if "group_sizes" in buffers else None
    check_weights(architecture, weights, what=str(path))
    F = weights["W_enc"].shape[1]
    if groups is not None and (sum(groups) != F or min(groups) < 1):
        raise LegatoError(f"{path}: group_sizes {groups} do not add up to its {F} latents")
    numbers = usable_numbers(architecture, {"k": k}, F, what=str(path))
    if dict_class == "AutoEncoder" and not has_unit_rows(weights["W_dec"]):
        weights = fold_decoder_norm(weights)
    return SAEWeights(
        architecture=architecture,
        weights=weights,
        apply_b_dec_to_input=dict_class not in TAKES_RAW_INPUT,
        details=as_dict(config.get(LEGATO_KEY))
        or _details(config, trainer, dict_class, k=k, threshold=threshold, group_sizes=groups),
        numbers=numbers,
    )


def read_config(path: Path) -> dict[str, Any]:
    """config.json of a state dict: beside it, or above its folder `checkpoints`; {} where there is none."""
    folders = [path.parent, *([path.parent.parent] if path.parent.name == "checkpoints" else [])]
    return next((read_json_object(f / CONFIG_FILENAME) for f in folders if (f / CONFIG_FILENAME).is_file()), {})


def _class_of(state: Mapping[str, Tensor], path: Path) -> str:
    fitting = [
        dict_class
        for dict_class, names in NAMES.items()
        if {name.removesuffix(".T") for name in names.values()} | set(BUFFERS.get(dict_class, ())) == state.keys()
    ]
    if not fitting:
        tensors = ", ".join(sorted(state)[:8])
        raise LegatoError(f"{path} is no SAE of dictionary_learning (it has {tensors}): cannot be read")
    if "AutoEncoderTopK" in fitting:
        raise UsageError(f"{path} may be a TopK or a BatchTopK SAE: put the run's config.json beside it")
    return fitting[0]


def _details(
    config: Mapping[str, Any],
    trainer: Mapping[str, Any],
    dict_class: str,
    *,
    k: int | None,
    threshold: float | None,
    group_sizes: list[int] | None,
) -> dict[str, Any]:
    submodule = trainer.get("submodule_name")
    layer, site = trainer.get("layer"), None
    if submodule is not None:
        try:
            layer, site = layer_and_site(str(submodule))
        except UsageError:  # a name of the user's own: whoever evaluates it says the place
            layer = None
    is_fork = dict_class.startswith("Temporal") or "temporal" in trainer
    return known(
        model=trainer.get("lm_name"),
        layer=layer if isinstance(layer, int) else None,
        site=site,
        module_path=submodule,
        context_length=as_dict(config.get("buffer")).get("ctx_len"),
        source=known(
            format="temporal-saes" if is_fork else "dictionary_learning",
            dict_class=dict_class,
            trainer_class=trainer.get("trainer_class"),
            k=k,
            threshold=threshold,
            group_sizes=group_sizes,
            trainer={name: value for name, value in trainer.items() if name not in ("dict_class", "trainer_class")},
        ),
    )


def _of(state: Mapping[str, Tensor], name: str) -> Tensor:
    tensor = state[name.removesuffix(".T")].float()
    return tensor.T.contiguous() if name.endswith(".T") and tensor.ndim == 2 else tensor


def _number(tensor: Tensor, what: str) -> float:
    if tensor.numel() != 1 or not torch.isfinite(tensor).all():
        raise LegatoError(f"{what} is not one finite number")
    return float(tensor)


def _whole(tensor: Tensor, what: str) -> int:
    value = _number(tensor, what)
    if value != int(value):
        raise LegatoError(f"{what} = {value} is not a whole number")
    return int(value)


_TRAINER_CLASSES = {
    "AutoEncoder": "StandardTrainer",
    "AutoEncoderNew": "StandardTrainerAprilUpdate",
    "AutoEncoderTopK": "TopKTrainer",
    "BatchTopKSAE": "BatchTopKTrainer",
    "MatryoshkaBatchTopKSAE": "MatryoshkaBatchTopKTrainer",
    "JumpReluAutoEncoder": "JumpReluTrainer",
    "GatedAutoEncoder": "GatedSAETrainer",
}


def write_dictionary_learning(folder: Path, stored: SAEWeights) -> None:
    """ReLU as AutoEncoder (AutoEncoderNew where decoder rows are not of unit norm, since the library's loader rescales
    those of an AutoEncoder), topk as AutoEncoderTopK, gated as GatedAutoEncoder, jumprelu as JumpReluAutoEncoder, or as
    the BatchTopK class it came in. Exact where the class takes its input as it is, else a bias is rounded once.

    Raises LegatoError for SAEs with state along the sequence, for which the library has no class.
    """
    budget = _budget(stored)
    dict_class = _class_for(stored, budget)
    weights = stored.weights if dict_class in TAKES_RAW_INPUT else with_input_bias(stored.weights)
    state = {
        theirs.removesuffix(".T"): (weights[ours].T if theirs.endswith(".T") else weights[ours]).contiguous().clone()
        for ours, theirs in NAMES[dict_class].items()
    }
    D, F = weights["W_enc"].shape
    state |= {name: tensor for name, tensor in budget.items() if name in BUFFERS.get(dict_class, ())}
    details = stored.details
    trainer = {
        "steps": as_dict(details.get("training")).get("steps"),
        "lr": as_dict(details.get("training")).get("lr"),
        "seed": as_dict(details.get("objective")).get("seed"),
        "layer": details.get("layer"),
        "lm_name": details.get("model"),
        "submodule_name": details.get("module_path"),
        "device": "cpu",
        **as_dict(as_dict(details.get("source")).get("trainer")),
        "dict_class": dict_class,
        "trainer_class": _TRAINER_CLASSES[dict_class],
        "activation_dim": D,
        "dict_size": F,
        **({"k": int(budget["k"])} if "k" in state else {}),
        **({"group_sizes": budget["group_sizes"].tolist()} if "group_sizes" in state else {}),
    }
    config = {"trainer": trainer, "buffer": {"ctx_len": details.get("context_length")}, LEGATO_KEY: details}
    with new_sae(folder, WEIGHTS_FILENAME) as new:
        torch.save(state, new / WEIGHTS_FILENAME)
        write_json(new / CONFIG_FILENAME, config)


def _class_for(stored: SAEWeights, budget: Mapping[str, Tensor]) -> str:
    architecture = stored.architecture
    if architecture == "standard":
        return "AutoEncoder" if has_unit_rows(stored.weights["W_dec"]) else "AutoEncoderNew"
    if architecture == "jumprelu" and "k" in budget:
        return "MatryoshkaBatchTopKSAE" if "group_sizes" in budget else "BatchTopKSAE"
    plain = {"topk": "AutoEncoderTopK", "jumprelu": "JumpReluAutoEncoder", "gated": "GatedAutoEncoder"}
    if architecture not in plain:
        stateful = architecture_named(architecture).stateful
        copy = ", or a copy of it without state (SparseAutoencoder.stateless)" if stateful else ""
        raise LegatoError(f"dictionary_learning has no class for a {architecture} SAE: export to saelens{copy}")
    assert ARCHITECTURES[plain[architecture]] == architecture
    return plain[architecture]


def _budget(stored: SAEWeights) -> dict[str, Tensor]:
    """k, threshold and group_sizes as the library's buffers; empty where the SAE did not come with a budget."""
    source = as_dict(stored.details.get("source"))
    threshold_F, F = stored.weights.get("threshold"), stored.weights["W_enc"].shape[1]
    k = stored.numbers.get("k", source.get("k"))
    if not (isinstance(k, int | float) and k in range(1, F + 1)):
        return {}
    if threshold_F is None:
        threshold = source.get("threshold")
        threshold = float(threshold) if isinstance(threshold, int | float) else -1.0
    elif bool((threshold_F == threshold_F[0]).all()) and float(threshold_F[0]) >= 0:
        threshold = float(threshold_F[0])
    else:
        return {}
    budget = {"k": torch.tensor(int(k), dtype=torch.int), "threshold": torch.tensor(threshold, dtype=torch.float32)}
    if (group_sizes := _group_sizes(source, F)) is not None:
        budget["group_sizes"] = torch.tensor(group_sizes)
    return budget


def _group_sizes(source: Mapping[str, Any], F: int) -> list[int] | None:
    """From dictionary_learning's sizes or SAELens' ends, where they are those of F latents."""
    sizes, ends = source.get("group_sizes"), source.get("group_ends")
    given = ends if sizes is None else sizes
    if not isinstance(given, list) or not given or not all(isinstance(number, int) for number in given):
        return None
    sizes = [end - start for start, end in pairwise([0, *given])] if sizes is None else given
    return sizes if min(sizes) > 0 and sum(sizes) == F else None
