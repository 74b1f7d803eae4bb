"""An SAE as a run of dictionary_learning 0.1, which `dictionary_learning.utils.load_dictionary` opens.

Shape legend: D activation width, F latents.
"""

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from legato.errors import LegatoError
from legato.interop.dictionary_learning import (
    ARCHITECTURES,
    BUFFERS,
    CONFIG_FILENAME,
    LEGATO_KEY,
    NAMES,
    TAKES_RAW_INPUT,
    WEIGHTS_FILENAME,
)
from legato.interop.placing import new_folder
from legato.interop.stored import StoredSAE, has_unit_rows, with_input_bias
from legato.interop.untrusted import as_dict, write_json

_TRAINER_CLASSES = {
    "AutoEncoder": "StandardTrainer",
    "AutoEncoderNew": "StandardTrainerAprilUpdate",
    "AutoEncoderTopK": "TopKTrainer",
    "BatchTopKSAE": "BatchTopKTrainer",
    "MatryoshkaBatchTopKSAE": "MatryoshkaBatchTopKTrainer",
    "JumpReluAutoEncoder": "JumpReluTrainer",
    "GatedAutoEncoder": "GatedSAETrainer",
}


def write_dictionary_learning(folder: Path, stored: StoredSAE) -> None:
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
    with new_folder(folder, WEIGHTS_FILENAME) as new:
        torch.save(state, new / WEIGHTS_FILENAME)
        write_json(new / CONFIG_FILENAME, config)


def _class_for(stored: StoredSAE, budget: Mapping[str, Tensor]) -> str:
    architecture = stored.architecture
    if architecture == "standard":
        return "AutoEncoder" if has_unit_rows(stored.weights["W_dec"]) else "AutoEncoderNew"
    if architecture == "jumprelu" and "k" in budget:
        return "MatryoshkaBatchTopKSAE" if "group_sizes" in budget else "BatchTopKSAE"
    plain = {"topk": "AutoEncoderTopK", "jumprelu": "JumpReluAutoEncoder", "gated": "GatedAutoEncoder"}
    if architecture not in plain:
        raise LegatoError(
            f"dictionary_learning has no class for a {architecture} SAE, whose state follows the order of tokens: "
            "export to saelens, or a stateless copy of it (SparseAutoencoder.stateless)"
        )
    assert ARCHITECTURES[plain[architecture]] == architecture
    return plain[architecture]


def _budget(stored: StoredSAE) -> dict[str, Tensor]:
    """k, threshold and group_sizes as the library's buffers; empty where the SAE did not come with a budget."""
    source = as_dict(stored.details.get("source"))
    threshold_F, F = stored.weights.get("threshold"), stored.weights["W_enc"].shape[1]
    k = source.get("k") if stored.k is None else stored.k
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
