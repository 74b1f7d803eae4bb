"""The tokens whose logits a latent's direction raises and lowers most.

The direct path only: a decoder row d, alone in the residual stream, goes through the model's final norm and its
unembedding, z = W_U (norm(d) - norm(0)). Three things are left out: the layers between the SAE and the end; the norm's
scale, which is that of d itself and not of the stream (a positive factor per token, so the order of tokens is exact for
RMSNorm and LayerNorm); and a soft cap on logits, which does not change the order either. Logits are then centred and
divided by their standard deviation over the tokens considered: they have no unit, and a softmax ignores the mean.
Only tokens of a given vocabulary are considered, the run's text by default: the matrix product is the main cost.

Shape legend: F latents, D width, V tokens considered, K kept.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from legato.data.language_model import LanguageModel

PROMOTED, SUPPRESSED = 5, 3
ROWS_AT_ONCE = 512


@dataclass(frozen=True)
class TopLogits:
    """Strings of the tokens of each latent, most extreme first, and their standardised logits, [F, K]."""

    top: list[list[str]]
    top_z_FK: NDArray[np.float32]
    bottom: list[list[str]]
    bottom_z_FK: NDArray[np.float32]


@torch.no_grad()
def top_and_bottom_logits(
    model: LanguageModel, W_dec: Tensor, vocabulary_V: Tensor, decode: Callable[[Sequence[int]], list[str]]
) -> TopLogits:
    """Find the tokens. W_dec: [F, D], rows in the model's residual stream. vocabulary_V: distinct token ids.

    Memory: O(V D + ROWS_AT_ONCE V).
    """
    rows_VD = model.model.get_output_embeddings().weight[vocabulary_V.to(model.device)].float()
    centred_DV = (rows_VD - rows_VD.mean(0)).T.contiguous()  # so that logits come out centred
    normed_FD = _final_norm(model, W_dec) - _final_norm(model, torch.zeros_like(W_dec[:1]))
    highest: list[tuple[Tensor, Tensor]] = []
    lowest: list[tuple[Tensor, Tensor]] = []
    for rows_RD in normed_FD.split(ROWS_AT_ONCE):
        logits_RV = rows_RD @ centred_DV
        spread_R1 = (logits_RV.norm(dim=1, keepdim=True) / len(vocabulary_V) ** 0.5).clamp_min(1e-30)
        for found, count, is_largest in ((highest, PROMOTED, True), (lowest, SUPPRESSED, False)):
            top = logits_RV.topk(min(count, len(vocabulary_V)), dim=1, largest=is_largest)
            found.append((top.indices, top.values / spread_R1))
    piece_V = np.array(decode(vocabulary_V.tolist()), object)
    (raised, raised_z), (lowered, lowered_z) = (
        [torch.cat(part).cpu().numpy() for part in zip(*found, strict=True)] for found in (highest, lowest)
    )
    return TopLogits(piece_V[raised].tolist(), raised_z, piece_V[lowered].tolist(), lowered_z)


def _final_norm(model: LanguageModel, directions_FD: Tensor) -> Tensor:
    """Compute the input of the unembedding, float32, for these outputs of the last layer."""
    length = min(model.max_context, 64)
    missing = -len(directions_FD) % length
    rows_BLD = torch.nn.functional.pad(directions_FD.float(), (0, 0, 0, missing)).view(-1, length, model.d_model)
    tokens_BL = torch.ones(rows_BLD.shape[:2], dtype=torch.long)
    hidden_BLD = model.resume(rows_BLD, tokens_BL, model.n_layers - 1)
    return hidden_BLD.flatten(0, 1)[: len(directions_FD)].float()
