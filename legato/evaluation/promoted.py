"""The tokens whose logits a latent's direction raises and lowers most.

The direct path only: a decoder row d, alone in the residual stream, goes through the model's final norm and its
unembedding, z = W_U (norm(d) - norm(0)). Layers between the SAE and the end are left out, the norm's scale is that of d
itself and not of the stream it would be added to (a positive factor per token that changes no order, exact for RMSNorm
and LayerNorm), and a soft cap on logits is left out, which changes no order either. Logits are then centred and divided
by their standard deviation over the tokens considered: they have no unit, and a softmax does not see the mean.
Only tokens of a given vocabulary are considered, the run's text by default: the matrix product is what this costs.

Shape legend: F latents, D width, V tokens considered, K kept.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from legato.language_model import LanguageModel

PROMOTED, SUPPRESSED = 5, 3
ROWS_AT_ONCE = 512


@dataclass(frozen=True)
class Promoted:
    """Per latent the strings of the tokens, most extreme first, and their standardised logits, [F, K]."""

    promoted: list[list[str]]
    promoted_z_FK: NDArray[np.float32]
    suppressed: list[list[str]]
    suppressed_z_FK: NDArray[np.float32]


@torch.no_grad()
def promoted_tokens(
    model: LanguageModel, W_dec: Tensor, vocabulary_V: Tensor, decode: Callable[[Sequence[int]], list[str]]
) -> Promoted:
    """W_dec: [F, D], rows in the model's residual stream. vocabulary_V: distinct token ids.

    Memory: O(V D + ROWS_AT_ONCE V).
    """
    unembedding_DV = model.model.get_output_embeddings().weight[vocabulary_V.to(model.device)].float().T.contiguous()
    normed_FD = _final_norm(model, W_dec) - _final_norm(model, torch.zeros_like(W_dec[:1]))
    highest, lowest = [], []
    for rows_RD in normed_FD.split(ROWS_AT_ONCE):
        logits_RV = rows_RD @ unembedding_DV
        deviation_RV = logits_RV - logits_RV.mean(1, keepdim=True)
        z_RV = deviation_RV / deviation_RV.std(1, keepdim=True, correction=0).clamp_min(1e-30)
        highest.append(z_RV.topk(min(PROMOTED, len(vocabulary_V)), dim=1))
        lowest.append(z_RV.topk(min(SUPPRESSED, len(vocabulary_V)), dim=1, largest=False))
    piece_V = np.array(decode(vocabulary_V.tolist()), object)
    (raised, raised_z), (lowered, lowered_z) = (
        (piece_V[torch.cat([top.indices for top in tops]).cpu().numpy()].tolist(), torch.cat([t.values for t in tops]))
        for tops in (highest, lowest)
    )
    return Promoted(raised, raised_z.cpu().numpy(), lowered, lowered_z.cpu().numpy())


def _final_norm(model: LanguageModel, directions_FD: Tensor) -> Tensor:
    """What the unembedding reads, float32, where the last layer puts out these directions."""
    length = min(model.max_context, 64)
    missing = -len(directions_FD) % length
    rows_BLD = torch.nn.functional.pad(directions_FD.float(), (0, 0, 0, missing)).view(-1, length, model.d_model)
    tokens_BL = torch.ones(rows_BLD.shape[:2], dtype=torch.long)
    hidden_BLD = model.resume(rows_BLD, tokens_BL, model.n_layers - 1)
    return hidden_BLD.flatten(0, 1)[: len(directions_FD)].float()
