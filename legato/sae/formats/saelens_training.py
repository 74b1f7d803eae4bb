"""SAELens training saves: they have a threshold still to come, and a normaliser that is not folded in yet.

Read off SAELens 6.54: `TrainingSAE.save_model`, `save_inference_model`, `training/activation_scaler.py`.

Shape legend: D activation width, F latents.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from legato.common.errors import LegatoError
from legato.common.safe_read import read_json_object, read_safetensors
from legato.sae.formats.weights import encoded

# Trained with a budget over the batch, used with the threshold that training kept track of.
THRESHOLD_AT_THE_END = ("batchtopk", "matryoshka_batchtopk")
SCALER_FILENAME = "activation_scaler.json"
WHITENING_FILENAME = "activation_whitening.safetensors"


def with_threshold(weights: dict[str, Tensor], *, what: str) -> dict[str, Tensor]:
    """`topk_threshold`, one number, as the threshold (F) of the inference save.

    It is compared with codes in units of the reconstruction where `rescale_acts_by_decoder_norm` is set.
    """
    topk_threshold, b_enc = weights.get("topk_threshold"), weights.get("b_enc")
    if topk_threshold is None or topk_threshold.numel() != 1 or b_enc is None:
        raise LegatoError(f"{what}: a batchtopk training save needs b_enc and topk_threshold (one number)")
    if float(topk_threshold) <= 0:
        raise LegatoError(f"{what}: its threshold was never set, so it was not trained; train it before using it")
    others = {name: tensor for name, tensor in weights.items() if name != "topk_threshold"}
    return others | {"threshold": torch.full_like(b_enc, float(topk_threshold))}


@dataclass(frozen=True)
class TrainingNormaliser:
    """Normaliser of training: z = (scale * x - mean_D) @ matrix_DD, undone on the reconstruction."""

    scale: float = 1.0
    mean_D: Tensor | None = None
    matrix_DD: Tensor | None = None
    inverse_DD: Tensor | None = None

    def folded_into(self, weights: Mapping[str, Tensor], subtracts_b_dec: bool) -> dict[str, Tensor]:
        """Weights for raw activations with the same codes."""
        W_enc, W_dec, b_dec = (weights[name].double() for name in ("W_enc", "W_dec", "b_dec"))
        biases = {name: weights[name].double() for name in ("b_enc", "b_gate", "b_mag") if name in weights}
        if self.mean_D is not None and self.matrix_DD is not None and self.inverse_DD is not None:
            W_enc = self.matrix_DD.double() @ W_enc
            W_dec = W_dec @ self.inverse_DD.double()
            b_dec = b_dec @ self.inverse_DD.double() + self.mean_D.double()
            if not subtracts_b_dec:
                shift_F = encoded(self.mean_D, W_enc)
                gain_F = weights["r_mag"].double().exp() if "r_mag" in weights else 1.0
                biases = {name: bias - (gain_F if name == "b_mag" else 1) * shift_F for name, bias in biases.items()}
        folded = {"W_enc": W_enc * self.scale, "W_dec": W_dec / self.scale, "b_dec": b_dec / self.scale, **biases}
        return {**weights, **{name: tensor.float() for name, tensor in folded.items()}}


def training_normaliser(path: Path, cfg: Mapping[str, Any]) -> TrainingNormaliser | None:
    """The normaliser that a checkpoint of a run has beside its weights; None where there is nothing to fold.

    LegatoError where cfg asks for one that is not there, or for one that differs from token to token.
    """
    wanted = cfg.get("normalize_activations", "none")
    if wanted == "none":
        return None
    if wanted not in ("expected_average_only_in", "covariance_whitening"):
        raise LegatoError(f"{path} asks for normalize_activations={wanted!r}, which no weights can hold: not readable")
    is_whitening = wanted == "covariance_whitening"
    if not (path / (WHITENING_FILENAME if is_whitening else SCALER_FILENAME)).is_file():
        raise LegatoError(
            f"{path} asks for normalize_activations={wanted!r} and its {SCALER_FILENAME} is not beside it, so it is "
            "not folded into its weights: use the final save of the run"
        )
    scale = (
        read_json_object(path / SCALER_FILENAME).get("scaling_factor") if (path / SCALER_FILENAME).is_file() else None
    )
    if scale is None and is_whitening:
        scale = 1.0
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not 0 < scale < float("inf"):
        raise LegatoError(f"{path / SCALER_FILENAME} has no usable scaling_factor: use the run's final save")
    if not is_whitening:
        return TrainingNormaliser(float(scale))
    tensors, D = read_safetensors(path / WHITENING_FILENAME), cfg.get("d_in")
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if shapes != {"mean": (D,), "matrix": (D, D), "inverse_matrix": (D, D)}:
        raise LegatoError(f"{path / WHITENING_FILENAME} does not hold the whitening of {D} dimensions")
    return TrainingNormaliser(float(scale), tensors["mean"], tensors["matrix"], tensors["inverse_matrix"])
