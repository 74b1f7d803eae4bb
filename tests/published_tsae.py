"""The objective of the published T-SAE code, to check the package's term against.

Source: AI4LIFE-GROUP/temporal-saes, trainers/temporal_sequence_top_k.py at 8daecb2 (with --contrastive), behind
Bhalla et al. 2025 (arXiv 2511.05541).

Shape legend: D width, F latents, A token pairs, G the latents of a group.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from legato.training.losses.info_nce import info_nce


def tsae_objective(
    pair_A2D: Tensor,
    W_enc_FD: Tensor,
    b_enc_F: Tensor,
    W_dec_FD: Tensor,
    b_dec_D: Tensor,
    *,
    k: int,
    group_fractions: Sequence[float] = (0.2, 0.8),
    group_weights: Sequence[float] = (0.2, 0.8),
    temporal_alpha: float = 0.1,
    auxiliary_alpha: float = 1 / 32,
    dead_F: Tensor | None = None,
) -> dict[str, Tensor]:
    """The published loss as named terms, each already times its coefficient; their sum is minimised.

    pair_A2D: raw activations of A tokens and, at [:, 1], of an earlier token of each one's context. dead_F: bool,
    latents that did not fire for 10 million tokens. A definition to check other code against: dense, differentiable,
    no state.

    - codes: relu((x - b_dec) W_enc + b_enc), BatchTopK over the A tokens and, apart, over their A partners;
    - reconstruction: mean over groups g (not sum) of w_g mean_a ||x_a - xhat_a,g||^2, xhat_g from groups 0 .. g;
    - contrastive: alpha times symmetric InfoNCE on the raw inner products of group 0;
    - auxiliary: alpha times ||residual - zhat||^2 over the residual's variance, the residual constant, zhat from each
      token's min(D / 2, dead) largest dead latents without bias; 0 where that is NaN.
    """
    sizes = [int(fraction * len(b_enc_F)) for fraction in group_fractions[:-1]]
    sizes.append(len(b_enc_F) - sum(sizes))
    x_AD, before_AD = pair_A2D[:, 0], pair_A2D[:, 1]
    pre_AF, before_pre_AF = (((x - b_dec_D) @ W_enc_FD.T + b_enc_F).relu() for x in (x_AD, before_AD))
    groups = _batch_top_k(pre_AF, k).split(sizes, dim=1)
    before_AG = _batch_top_k(before_pre_AF, k)[:, : sizes[0]]

    xhat_AD = b_dec_D.expand_as(x_AD)
    errors = []
    for codes_AG, W_dec_GD, weight in zip(groups, W_dec_FD.split(sizes), group_weights, strict=True):
        xhat_AD = xhat_AD + codes_AG @ W_dec_GD
        errors.append(weight * (x_AD - xhat_AD).square().sum(-1).mean())
    contrastive = info_nce(groups[0], before_AG, np.arange(len(x_AD)), 1.0)
    auxiliary = torch.zeros(())
    if dead_F is not None and bool(dead_F.any()):
        residual_AD = (x_AD - xhat_AD).detach()
        top = pre_AF[:, dead_F].topk(min(x_AD.shape[1] // 2, int(dead_F.sum())), dim=-1)
        zhat_AD = torch.einsum("ak,akd->ad", top.values, W_dec_FD[dead_F][top.indices])
        power = (residual_AD - residual_AD.mean(0)).square().sum(-1).mean()
        auxiliary = ((residual_AD - zhat_AD).square().sum(-1).mean() / power).nan_to_num(0.0)
    return {
        "reconstruction": torch.stack(errors).mean(),
        "contrastive": temporal_alpha * contrastive,
        "auxiliary": auxiliary_alpha * auxiliary,
    }


def _batch_top_k(pre_AF: Tensor, k: int) -> Tensor:
    """The k * A largest entries, the others 0."""
    top = pre_AF.flatten().topk(k * len(pre_AF))
    return torch.zeros_like(pre_AF.flatten()).scatter(0, top.indices, top.values).view_as(pre_AF)
