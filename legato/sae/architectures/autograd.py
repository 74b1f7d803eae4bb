"""The forward pass of an architecture that has only a dense form: its codes and their way back by torch's autograd.

Shape legend: B rows, L positions, N = B * L flat tokens, F latents, P active pairs by token.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from legato.sae.architectures.forward import Decoding, Forward
from legato.sae.architectures.preactivations import Preactivations, positive
from legato.sae.kernels import pairs as kernels
from legato.sae.kernels.pairs import Array, Pairs

if TYPE_CHECKING:
    from legato.sae.architectures.base import Architecture


def by_autograd(architecture: "Architecture", pre: Preactivations) -> Forward:
    """Every pre-activation exactly, `encode` with what the architecture has learned so far, and the positive codes.

    The gradient reaches the encoder, its bias and the architecture's own parameters through the active codes. Costs
    what a dense step does: N x F x D multiplications more than with a selection of its own.
    """
    B = len(pre.x_ND) // pre.layout.length
    leaves = {"product": pre.products(), "b_enc": torch.from_numpy(pre.b_enc_F)}
    leaves |= {name: torch.from_numpy(value) for name, value in pre.own.items()}
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in leaves.items()}
    trained: Any = replace(architecture, **{name: leaves[name] for name in pre.own})  # type: ignore[type-var]
    with torch.enable_grad():
        codes_BLF = trained.encode(
            leaves["product"].view(B, pre.layout.length, -1), leaves["b_enc"], *pre.layout.rows()
        )
    token, latent, value = (column.numpy() for column in positive(codes_BLF.detach().flatten(0, 1)))
    pairs = kernels.keep(len(pre.x_ND), token.astype(np.int32), latent.astype(np.int32), value, value > 0)
    return _Traced(pairs, 0.0, codes_BLF.flatten(0, 1), leaves, architecture.penalty)


@dataclass(frozen=True)
class _Traced(Forward):
    """leaves: what the codes were computed from, by name: product, b_enc, and the architecture's own parameters."""

    codes_NF: Tensor
    leaves: dict[str, Tensor]
    penalty: Callable[[Pairs, int, int], tuple[float, float]]

    def backward(self, decoding: Decoding) -> tuple[dict[str, float], Array]:
        token_P, latent_P = self.pairs.token_P, self.pairs.latent_P
        loss, slope = self.penalty(self.pairs, decoding.n_valid, decoding.x_ND.shape[1])
        by_code_P = np.empty_like(decoding.slope_Q)
        by_code_P[decoding.order.source_Q] = decoding.slope_Q
        by_code_P += decoding.code_gradient(token_P, latent_P) + by_code_P.dtype.type(slope)
        by_code_NF = torch.zeros_like(self.codes_NF)
        by_code_NF[torch.from_numpy(token_P).long(), torch.from_numpy(latent_P).long()] = torch.from_numpy(by_code_P)
        slopes = torch.autograd.grad(self.codes_NF, list(self.leaves.values()), by_code_NF, materialize_grads=True)
        by_leaf = dict(zip(self.leaves, slopes, strict=True))
        by_product_NF, bias_F = by_leaf.pop("product"), by_leaf.pop("b_enc")
        for name, gradient_F in by_leaf.items():
            decoding.gradients[name][:] = gradient_F.numpy()
        token, latent = by_product_NF.nonzero(as_tuple=True)
        columns = (token.int().numpy(), latent.int().numpy(), by_product_NF[token, latent].numpy())
        encoder = kernels.keep(len(by_product_NF), *columns, np.ones(len(token), np.bool_))
        return {"sparsity": loss} if slope else {}, decoding.apart(encoder, bias_F.numpy())
