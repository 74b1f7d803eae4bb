"""One exact forward and backward pass of an SAE on a batch.

Shape legend: B rows, L positions, N = B * L flat tokens, D width, F latents, H those whose weights are here, P / Q
active pairs by token / by latent, M dead latents, G nested groups.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields

import numpy as np
import torch
from torch import Tensor

from legato.common.errors import LegatoError
from legato.common.hardware import fast_float32, fixed_matmul, fixed_product, rows_a_block, single_threaded
from legato.data.activations import ActivationBatch, Normaliser
from legato.sae.architectures import Preactivations
from legato.sae.architectures.forward import Decoding
from legato.sae.kernels import pairs as kernels
from legato.sae.kernels.pairs import Array, PairsByLatent
from legato.sae.partition import SINGLE, Partition
from legato.sae.segments import Segments
from legato.training.config import SAEConfig, TrainConfig
from legato.training.losses import TemporalLoss

# Initial weights are drawn this many rows at a time, in which a rank keeps its own. A multiple of 16, the numbers that
# torch draws at once: the bits are those of a single draw.
_ROWS_DRAWN = 1024

PER_LATENT = ("W_enc_FD", "b_enc_F", "W_dec_FD")  # the parameters that ranks may divide


@dataclass(frozen=True)
class TrainBatch:
    """A batch as every SAE of the bank reads it: x_ND normalised float32 (zero on invalid tokens), low_ND the same in
    the matmul's dtype, mean_power = the mean over valid tokens of ||x - mean||^2."""

    x_ND: Tensor
    low_ND: Tensor
    layout: Segments
    n_valid: int
    mean_power: float
    act_norm: float

    @classmethod
    @single_threaded()
    def of(cls, batch: ActivationBatch, normaliser: Normaliser, dtype: torch.dtype) -> "TrainBatch":
        """Raises LegatoError where no token is valid or an activation is not finite."""
        mask_N = batch.mask_BL.reshape(-1)
        n_valid = int(mask_N.sum())
        if n_valid == 0:
            raise LegatoError(
                "a batch has no valid token (all special, padding or outliers): check the text and the mask"
            )
        acts_ND = batch.acts_BLD.reshape(-1, batch.acts_BLD.shape[-1])
        x_ND = normaliser.apply(acts_ND.float()) * mask_N[:, None]
        norm_N = x_ND.square().sum(-1)
        total = norm_N.sum(dtype=torch.float64)
        if not torch.isfinite(total):
            raise LegatoError(
                "activations hold values that are not finite; harvest them again, or with --dtype float32"
            )
        mean_D = x_ND.sum(0) / n_valid
        mean_power = float(total / n_valid - mean_D.square().sum())
        layout = Segments.of(batch.mask_BL, batch.doc_BL)
        act_norm = float(norm_N.sqrt().sum() / n_valid)
        return cls(x_ND, x_ND.to(dtype), layout, n_valid, mean_power, act_norm)


@dataclass(frozen=True)
class Parameters:
    """W_enc_FD, W_dec_FD (unit rows), b_enc_F, b_dec_D, in normalised activation units; own: what the architecture
    learns per latent (F), by name. Where ranks divide the latents of an SAE, the first three have this rank's only."""

    W_enc_FD: Tensor
    b_enc_F: Tensor
    W_dec_FD: Tensor
    b_dec_D: Tensor
    own: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    def initial(cls, d_in: int, d_sae: int, seed: int, partition: Partition = SINGLE) -> "Parameters":
        """Random unit decoder rows, the encoder their transpose, biases zero (the normalised data's mean)."""
        generator, held = torch.Generator().manual_seed(seed), partition.local(d_sae)
        W_dec_HD = torch.empty(held.stop - held.start, d_in)
        for first in range(0, max(1, d_sae - _ROWS_DRAWN + 1), _ROWS_DRAWN):
            end = first + _ROWS_DRAWN if first + 2 * _ROWS_DRAWN <= d_sae else d_sae
            rows = torch.randn(end - first, d_in, generator=generator)
            own = range(max(first, held.start), min(end, held.stop))
            if own:
                W_dec_HD[own.start - held.start : own.stop - held.start] = rows[own.start - first : own.stop - first]
        W_dec_HD = torch.nn.functional.normalize(W_dec_HD, dim=-1)
        return cls(W_dec_HD.clone(), torch.zeros(len(W_dec_HD)), W_dec_HD, torch.zeros(d_in))

    @classmethod
    def of(cls, named: Mapping[str, Tensor]) -> "Parameters":
        """From tensors named as in `items`."""
        shared = {f.name for f in fields(cls)} - {"own"}
        own = {name: tensor for name, tensor in named.items() if name not in shared}
        return cls(**{name: named[name] for name in shared}, own=own)

    def items(self) -> list[tuple[str, Tensor]]:
        shared = [(name, tensor) for name, tensor in vars(self).items() if name != "own"]
        return [*shared, *self.own.items()]

    def map(self, function: Callable[[Tensor], Tensor]) -> "Parameters":
        changed = {name: function(tensor) for name, tensor in self.items()}
        own = {name: changed.pop(name) for name in self.own}
        return Parameters(**changed, own=own)

    def preactivations(
        self, low_W_enc_HD: Tensor, batch: TrainBatch, out_NH: Tensor, partition: Partition = SINGLE
    ) -> Preactivations:
        """The encoder's dense output on this rank's share of a batch, in the dtype of low_W_enc_HD, written to
        out_NH."""
        part = partition.tokens(len(out_NH))
        bias_H, block = self.b_enc_F.to(out_NH.dtype), rows_a_block(len(out_NH))
        fixed_matmul(batch.low_ND[part], low_W_enc_HD.T, bias_H, block=block, out_NM=out_NH[part])
        own = {name: tensor.numpy() for name, tensor in self.own.items()}
        b_enc_F = partition.of_latents(self.b_enc_F.numpy())
        return Preactivations(out_NH, batch.x_ND.numpy(), self.W_enc_FD.numpy(), b_enc_F, batch.layout, own, partition)


@dataclass(frozen=True)
class StepResult:
    """Result of one forward and backward pass: named loss terms (each already times its coefficient), the gradients
    (in the workspace, valid until its next use; decoder rows projected; of W_enc, W_dec and b_enc only the rank's own
    latents), their norm, the active pairs."""

    loss_terms: dict[str, float]
    gradients: Parameters
    grad_norm: float
    order: PairsByLatent
    state: float
    fvu: float

    @property
    def loss(self) -> float:
        return sum(self.loss_terms.values())


class Workspace:
    """Buffers that the SAEs of a bank use one after the other."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def get(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """An uninitialised tensor; the storage of a name is reused and grows to its largest request."""
        size = math.prod(shape)
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < size or buffer.dtype != dtype:
            buffer = self._buffers[name] = torch.empty(size, dtype=dtype)
        return buffer[:size].view(*shape)


@single_threaded()
def forward_backward(
    parameters: Parameters,
    low_W_enc_HD: Tensor,
    batch: TrainBatch,
    arm: SAEConfig,
    terms: Sequence[tuple[TemporalLoss, float]],
    *,
    workspace: Workspace,
    state: float = 0.0,
    step: int = 0,
    progress: float = 1.0,
    dead_F: Tensor | None = None,
    config: TrainConfig,
    partition: Partition = SINGLE,
) -> StepResult:
    """One exact pass. Loss = mean over valid tokens of ||x - xhat||^2 / D (a weighted sum over nested groups)  +
    sparsity penalty  +  sum of coefficient * temporal term  +  auxiliary loss. With the normaliser's unit power the
    first part of an ordinary SAE is the batch's FVU.

    terms: (term of the arm, coefficient now). state: what the architecture carried over from the last step, 0 at the
    start. dead_F: bool, latents that the auxiliary loss revives (None: none). A frozen decoder's gradient is zero.
    partition: of several ranks that do this step together, with the same arguments otherwise, this one's.
    """
    x_ND = batch.x_ND
    N, D = x_ND.shape
    F, W_dec_HD, b_dec_D = arm.d_sae, parameters.W_dec_FD.numpy(), parameters.b_dec_D.numpy()
    pre_NH = workspace.get("pre", (N, len(W_dec_HD)), batch.low_ND.dtype)
    pre = parameters.preactivations(low_W_enc_HD, batch, pre_NH, partition)
    forward = arm.architecture.forward(pre, state, progress)
    order = kernels.by_latent(forward.pairs, F)
    groups = arm.nested()
    pull_GND, squared_GN = partition.decode(
        forward.pairs, groups, W_dec_HD, b_dec_D, x_ND.numpy(), batch.layout.valid_N
    )
    mean_squared_G = squared_GN.sum(1, dtype=np.float64) / batch.n_valid
    loss_terms = {"reconstruction": float(groups.weights_G @ mean_squared_G) / D}
    slope_Q = np.zeros_like(order.value_Q)
    for term, coefficient in terms:
        value = term.sparse(order, batch.layout, step)
        loss_terms[term.name] = loss_terms.get(term.name, 0.0) + coefficient * value.value
        slope_Q += slope_Q.dtype.type(coefficient) * value.gradient_Q
    buffers = {name: workspace.get(f"g{name}", tensor.shape, x_ND.dtype) for name, tensor in parameters.items()}
    gradients = Parameters.of(buffers)
    seeded_F = np.zeros(F, np.bool_)
    if dead_F is not None and bool(dead_F.any()):
        residual_ND = torch.from_numpy(pull_GND[-1]) / groups.weights_G[-1]
        loss_terms["auxiliary"] = _revive(
            parameters, gradients, batch, residual_ND, dead_F, seeded_F, config, partition
        )
    scale = 2 / (D * batch.n_valid)
    decoding = Decoding(
        x_ND=x_ND.numpy(),
        W_dec_HD=W_dec_HD,
        b_dec_D=b_dec_D,
        layout=batch.layout,
        n_valid=batch.n_valid,
        groups=groups,
        pull_GND=pull_GND,
        scale=scale,
        order=order,
        slope_Q=slope_Q,
        gradients={name: tensor.numpy() for name, tensor in gradients.items()},
        seeded_F=seeded_F,
        partition=partition,
    )
    own_terms, squared_H = forward.backward(decoding)
    torch.sum(torch.from_numpy(pull_GND[0]), dim=0, out=gradients.b_dec_D).mul_(scale)
    if arm.freeze_decoder:
        squared_H = squared_H - gradients.W_dec_FD[partition.rows(F)].double().square().sum(1).numpy()
        gradients.W_dec_FD.zero_()
    squared = partition.total(squared_H)
    squared += sum(float(tensor.square().sum()) for tensor in (gradients.b_dec_D, *gradients.own.values()))
    return StepResult(
        loss_terms=loss_terms | own_terms,
        gradients=gradients,
        grad_norm=math.sqrt(max(squared, 0.0)) if math.isfinite(squared) else squared,
        order=order,
        state=forward.state,
        fvu=float(mean_squared_G[-1]) / batch.mean_power,
    )


def auxiliary_loss(x_ND: Tensor, residual_ND: Tensor, dead: Parameters, k: int) -> Tensor:
    """Share of the residual x - xhat that the k largest of the dead latents leave unexplained (Gao et al. 2024, 2.4):
    ||(x - xhat) - z W_dec||^2 / ||x - xhat||^2, the residual taken as a constant. residual_ND holds xhat - x."""
    pre_NM = (fixed_product(x_ND, dead.W_enc_FD.T) + dead.b_enc_F).relu()
    top = pre_NM.topk(min(k, pre_NM.shape[1]), dim=-1)
    codes_NM = torch.zeros_like(pre_NM).scatter(-1, top.indices, top.values)
    power = residual_ND.square().sum()
    return (residual_ND + fixed_product(codes_NM, dead.W_dec_FD)).square().sum() / power.clamp_min(1e-30)


@fast_float32()
def _revive(
    parameters: Parameters,
    gradients: Parameters,
    batch: TrainBatch,
    residual_ND: Tensor,
    dead_F: Tensor,
    seeded_F: Array,
    config: TrainConfig,
    partition: Partition,
) -> float:
    """Writes the auxiliary loss's gradient for the dead latents and marks them; returns the loss. At most 8 aux_k
    dead latents, the first ones, whose weights all ranks send each other."""
    dead = dead_F.nonzero().flatten()[: 8 * config.aux_k]
    held = partition.local(len(dead_F))
    here = (dead >= held.start) & (dead < held.stop)
    own = dead[here] - held.start

    def leaf(tensor_H: Tensor) -> Tensor:
        return torch.from_numpy(partition.of_latents(tensor_H[own].numpy())).requires_grad_()

    rows = torch.from_numpy(np.flatnonzero(batch.layout.valid_N))
    rows = rows[:: max(1, len(rows) // config.aux_tokens)]
    leaves = Parameters(
        leaf(parameters.W_enc_FD), leaf(parameters.b_enc_F), leaf(parameters.W_dec_FD), parameters.b_dec_D
    )
    loss = config.aux_coefficient * auxiliary_loss(batch.x_ND[rows], residual_ND[rows], leaves, config.aux_k)
    g_enc, g_bias, g_dec = torch.autograd.grad(loss, [leaves.W_enc_FD, leaves.b_enc_F, leaves.W_dec_FD])
    gradients.W_enc_FD[own] = g_enc[here]
    gradients.b_enc_F[own] = g_bias[here]
    gradients.W_dec_FD[own] = g_dec[here]
    seeded_F[dead.numpy()] = True
    return float(loss.detach())
