"""The numbers of SAEBench 0.6.0's `core` evaluation, by its own formulas, even where they are wrong.

People compare against its leaderboard, so its file (interop/saebench_file.py) is filled from here; Legato's own tables
use reconstruction.py. Differences from the correct definitions, on purpose:
- batches of ROWS_PER_BATCH rows matter: several quantities are means over batches, and `mse` is divided twice by the
  number of tokens in the batch;
- `explained_variance` = 1 - E||e||^2 / (S - (S / D)^2) with S = E||x||^2, which is not a variance (units do not match);
- `explained_variance_legacy` = mean over tokens of 1 - ||e||^2 / ||x - batch mean||^2;
- `l1` is a signed sum; undefined values are written as -1;
- tokens count unless their id is pad, EOS or BOS: outliers, which Legato masks, count.

Shape legend: B rows, L positions, N tokens, D width, F latents.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from legato.common.hardware import fast_float32
from legato.evaluation.core.reconstruction import TokenErrors
from legato.evaluation.sums.accumulators import Summed
from legato.evaluation.sums.lag_pairs import Floats
from legato.sae.codes import SparseCodes
from legato.sae.protocol import Weights

ROWS_PER_BATCH = 16  # sae-bench's default --batch_size_prompts
UNDEFINED = -1.0
_SMALL_NORM = 1e-4
_COLUMNS_AT_ONCE = 1024


@dataclass
class SaeBenchSums(Summed):
    """Sums over tokens, and over batches where SAEBench averages over batches."""

    firing_F: Floats
    rows_F: Floats
    tokens: float = 0.0
    batches: float = 0.0
    l2_norm_in: float = 0.0
    l2_norm_out: float = 0.0
    l2_ratio: float = 0.0
    l1: float = 0.0
    mse: float = 0.0
    cossim: float = 0.0
    explained_variance_legacy: float = 0.0
    batch_bias: float = 0.0
    batch_square: float = 0.0
    batch_error: float = 0.0

    @classmethod
    def zero(cls, n_latents: int) -> "SaeBenchSums":
        return cls(np.zeros(n_latents), np.zeros(n_latents))

    def add_reconstruction(self, errors: TokenErrors, spread_BL: Floats, mask_BL: Tensor) -> None:
        """Add rows. spread_BL: ||x - batch mean||^2 (see `batch_spread`). mask_BL: positions that count."""
        mask = mask_BL.cpu().numpy()
        for start in range(0, len(mask), ROWS_PER_BATCH):
            rows = slice(start, start + ROWS_PER_BATCH)
            where = mask[rows]
            if not where.any():
                continue
            sums = (errors.square_in_BL, errors.square_out_BL, errors.dot_BL, errors.error_BL, spread_BL)
            square_in_N, square_out_N, dot_N, error_N, spread_N = (sum_BL[rows][where] for sum_BL in sums)
            norm_in_N, norm_out_N = np.sqrt(square_in_N), np.sqrt(square_out_N)
            self.tokens += error_N.size
            self.batches += 1
            self.l2_norm_in += float(norm_in_N.sum())
            self.l2_norm_out += float(norm_out_N.sum())
            self.l2_ratio += float((norm_out_N / np.where(norm_in_N < _SMALL_NORM, 1.0, norm_in_N)).sum())
            self.mse += float(error_N.mean())
            with np.errstate(invalid="ignore", divide="ignore"):  # undefined values are written as -1 in the end
                self.cossim += float((dot_N / (norm_in_N * norm_out_N)).sum())
                self.explained_variance_legacy += float((1.0 - error_N / spread_N).sum())
                self.batch_bias += float(square_out_N.sum() / dot_N.sum())
            self.batch_square += float(square_in_N.mean())
            self.batch_error += float(error_N.mean())

    def add_codes(self, codes: SparseCodes) -> None:
        """Add codes at the positions that count; equal to the SAE's own scale where decoder rows have unit norm."""
        B, L, F = codes.shape
        row_P, latent_P = (codes.token_P // L).cpu().numpy(), codes.latent_P.cpu().numpy()
        self.firing_F += np.bincount(latent_P, minlength=F)
        fires_BF = np.zeros((B, F), bool)
        fires_BF[row_P, latent_P] = True
        self.rows_F += fires_BF.sum(0)
        self.l1 += float(codes.value_P.double().sum())


def batch_spread(acts_BLD: Tensor, mask_BL: Tensor) -> Floats:
    """Compute ||x - mean||^2, mean over the counted tokens of each batch of ROWS_PER_BATCH rows, [B, L]."""
    spread_BL = np.zeros(mask_BL.shape)
    for start in range(0, len(mask_BL), ROWS_PER_BATCH):
        rows = slice(start, start + ROWS_PER_BATCH)
        if mask_BL[rows].any():
            x_BLD = acts_BLD[rows].float()
            spread_BL[rows] = (x_BLD - x_BLD[mask_BL[rows]].mean(0)).square().sum(-1).cpu().numpy()
    return spread_BL


def weight_statistics(sae: Weights) -> dict[str, np.ndarray]:
    """Compute per-latent bias, norm, and cosines within and between encoder and decoder. Cost O(F^2 D).

    Decoder rows are scaled to unit norm first, the norms folded into the encoder, as sae-bench does when it loads an
    SAE (`load_and_format_sae`).
    """
    W_enc_DF, W_dec_DF = sae.W_enc.detach().float(), sae.W_dec.detach().float().T
    norm_F = W_dec_DF.norm(dim=0)
    return {
        "encoder_bias": (sae.b_enc.detach().float() * norm_F).cpu().numpy(),
        "encoder_norm": (W_enc_DF.norm(dim=0) * norm_F).cpu().numpy(),
        "encoder_decoder_cosine_sim": torch.cosine_similarity(W_enc_DF, W_dec_DF, dim=0).cpu().numpy(),
        "max_decoder_cosine_sim": _max_cosine(W_dec_DF),
        "max_encoder_cosine_sim": _max_cosine(W_enc_DF),
    }


@fast_float32()
def _max_cosine(vectors_DF: Tensor) -> np.ndarray:
    """Find the largest cosine of each column with any other."""
    unit_DF = torch.nn.functional.normalize(vectors_DF, dim=0)
    F = unit_DF.shape[1]
    largest_F = torch.empty(F)
    for start in range(0, F, _COLUMNS_AT_ONCE):
        cosine_CF = unit_DF[:, start : start + _COLUMNS_AT_ONCE].T @ unit_DF
        own = torch.arange(cosine_CF.shape[0])
        cosine_CF[own, own + start] = -torch.inf
        largest_F[start : start + _COLUMNS_AT_ONCE] = cosine_CF.amax(1)
    return largest_F.cpu().numpy()


def saebench_features(sums: SaeBenchSums, weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return per-latent columns by SAEBench's names; -1 where it writes -1 (a latent that never fires has no rows)."""
    fires_F = sums.rows_F > 0
    heuristic_F = np.divide(sums.firing_F, sums.rows_F, out=np.full(fires_F.size, UNDEFINED), where=fires_F)
    density_F = sums.firing_F / sums.tokens
    return {"feature_density": density_F, "consistent_activation_heuristic": heuristic_F, **weights}


def saebench_metrics(sums: SaeBenchSums, features: dict[str, np.ndarray], width: int) -> dict[str, dict[str, Any]]:
    """The categories of `eval_result_metrics` that need no language model, in SAEBench's order."""
    n, batches = sums.tokens, sums.batches
    square = sums.batch_square / batches
    scalars = {
        "explained_variance": 1.0 - sums.batch_error / batches / (square - (square / width) ** 2),
        "explained_variance_legacy": sums.explained_variance_legacy / n,
        "mse": sums.mse / n,
        "cossim": sums.cossim / n,
        "l2_norm_in": sums.l2_norm_in / n,
        "l2_norm_out": sums.l2_norm_out / n,
        "l2_ratio": sums.l2_ratio / n,
        "relative_reconstruction_bias": sums.batch_bias / batches,
        "l0": float(sums.firing_F.sum() / n),
        "l1": sums.l1 / n,
    }
    scalars = {name: float(value) if np.isfinite(value) else UNDEFINED for name, value in scalars.items()}

    def pick(*names: str) -> dict[str, float]:
        return {name: scalars[name] for name in names}

    return {
        "reconstruction_quality": pick("explained_variance", "explained_variance_legacy", "mse", "cossim"),
        "shrinkage": pick("l2_norm_in", "l2_norm_out", "l2_ratio", "relative_reconstruction_bias"),
        "sparsity": pick("l0", "l1"),
        "misc_metrics": _misc_metrics(features),
    }


def _misc_metrics(features: dict[str, np.ndarray]) -> dict[str, float]:
    density_F = features["feature_density"]
    total = density_F.sum()

    def share(threshold: float) -> float:
        return float(density_F[density_F > threshold].sum() / total) if total > 0 else 0.0

    return {
        "freq_over_1_percent": float((density_F > 0.01).mean()),
        "freq_over_10_percent": float((density_F > 0.1).mean()),
        "normalized_freq_over_1_percent": share(0.01),
        "normalized_freq_over_10_percent": share(0.1),
        "average_max_encoder_cosine_sim": float(features["max_encoder_cosine_sim"].mean()),
        "average_max_decoder_cosine_sim": float(features["max_decoder_cosine_sim"].mean()),
        "frac_alive": float((density_F > 0).mean()),
    }


def saebench_losses(losses: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Arrange `splice_metrics` in the two categories about the language model, in SAEBench's order.

    Where SAEBench's float32 softmax underflows it writes -1 for all KL values; these are the true ones.
    """

    def pick(*names: str) -> dict[str, float]:
        return {name: UNDEFINED if losses[name] is None else losses[name] for name in names}

    return {
        "model_behavior_preservation": pick("kl_div_score", "kl_div_with_ablation", "kl_div_with_sae"),
        "model_performance_preservation": pick(
            "ce_loss_score", "ce_loss_with_ablation", "ce_loss_with_sae", "ce_loss_without_sae"
        ),
    }
