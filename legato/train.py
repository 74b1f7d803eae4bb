"""The one training loop: a bank of SAEs that learn from the same activation batches.

Shape legend: B rows, L positions, N = B * L flat tokens, D width, F latents, P / Q active pairs by token / by latent.
"""

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from legato import kernels
from legato.activations import ActivationBatch, Normaliser
from legato.consistency_losses import TemporalTerm, collapse, group_diagnostics, leading_count
from legato.errors import LegatoError
from legato.hardware import fast_matmul_dtype
from legato.kernels import LatentOrder
from legato.sae import SparseAutoencoder
from legato.sequences import SequenceLayout
from legato.sparsity import Preactivations, Sparsity

Array = NDArray[Any]


@dataclass(frozen=True)
class ArmConfig:
    """One SAE of the bank: its sparsity, its temporal terms (none: a baseline), its width and its seed.

    groups: Matryoshka prefixes (share of the latents, weight of that prefix's reconstruction error), the last share 1
    (Bussmann et al. 2025, arXiv 2503.17547). One group: an ordinary SAE.
    """

    name: str
    sparsity: Sparsity
    d_sae: int
    terms: tuple[TemporalTerm, ...] = ()
    seed: int = 0
    groups: tuple[tuple[float, float], ...] = ((1.0, 1.0),)

    def __post_init__(self) -> None:
        shares = [share for share, _ in self.groups]
        if shares != sorted(set(shares)) or shares[0] <= 0 or shares[-1] != 1:
            raise ValueError(f"groups {self.groups} must be growing shares of the latents that end at 1")

    def nested(self) -> kernels.Groups:
        ends = [leading_count(self.d_sae, share) for share, _ in self.groups]
        return kernels.Groups(np.array(ends), np.array([weight for _, weight in self.groups]))


@dataclass(frozen=True)
class TrainConfig:
    """How every SAE of a bank is trained.

    steps: optimiser steps. lr: Adam's peak learning rate, after a linear warm-up over `warmup` of the steps and before
    a linear decay to 0 over the last `decay` of them. Temporal coefficients grow linearly over `term_warmup` of the
    steps.
    clip_norm: the gradient's global norm is cut to this, after the backward pass and before Adam.
    dead_after_tokens: a latent that fired on none of that many tokens is dead; the `aux_k` dead latents with the
    largest pre-activations then learn the residual of `aux_tokens` tokens, weighted by aux_coefficient (Gao et al.
    2024, 2.4).
    """

    steps: int
    lr: float = 1e-3
    warmup: float = 0.05
    decay: float = 0.3
    term_warmup: float = 0.1
    clip_norm: float = 1.0
    dead_after_tokens: int = 250_000
    aux_k: int = 64
    aux_tokens: int = 1024
    aux_coefficient: float = 1 / 32
    log_every: int = 10

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise LegatoError(f"{self.steps} training steps would leave the SAE untrained: raise --tokens")

    def lr_at(self, step: int) -> float:
        """Learning rate of step 0, 1, ..."""
        up = (step + 1) / max(1.0, self.warmup * self.steps)
        down = (self.steps - step) / max(1.0, self.decay * self.steps)
        return self.lr * min(1.0, up, down)

    def term_scale_at(self, step: int) -> float:
        return min(1.0, (step + 1) / max(1.0, self.term_warmup * self.steps))


@dataclass(frozen=True)
class TrainBatch:
    """A batch as every SAE of the bank reads it: x_ND normalised float32 (zero on invalid tokens), low_ND the same in
    the matmul's dtype, mean_power = the mean over valid tokens of ||x - mean||^2."""

    x_ND: Tensor
    low_ND: Tensor
    layout: SequenceLayout
    n_valid: int
    mean_power: float
    act_norm: float

    @classmethod
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
        layout = SequenceLayout.of(batch.mask_BL, batch.doc_BL)
        act_norm = float(norm_N.sqrt().sum() / n_valid)
        return cls(x_ND, x_ND.to(dtype), layout, n_valid, mean_power, act_norm)


@dataclass(frozen=True)
class Parameters:
    """W_enc_FD, W_dec_FD (unit rows), b_enc_F, b_dec_D, in normalised activation units."""

    W_enc_FD: Tensor
    b_enc_F: Tensor
    W_dec_FD: Tensor
    b_dec_D: Tensor

    @classmethod
    def initial(cls, d_in: int, d_sae: int, seed: int) -> "Parameters":
        """Random unit decoder rows, the encoder their transpose, biases zero (the normalised data's mean)."""
        generator = torch.Generator().manual_seed(seed)
        W_dec_FD = torch.nn.functional.normalize(torch.randn(d_sae, d_in, generator=generator), dim=-1)
        return cls(W_dec_FD.clone(), torch.zeros(d_sae), W_dec_FD, torch.zeros(d_in))

    def items(self) -> list[tuple[str, Tensor]]:
        return list(vars(self).items())

    def map(self, function: Callable[[Tensor], Tensor]) -> "Parameters":
        return Parameters(*(function(tensor) for _, tensor in self.items()))


@dataclass(frozen=True)
class StepResult:
    """What one forward and backward pass gives: named loss terms (each already times its coefficient), the gradients
    (in the workspace, valid until its next use; decoder rows projected), their norm, the active pairs."""

    loss_terms: dict[str, float]
    gradients: Parameters
    grad_norm: float
    order: LatentOrder
    floor: float
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


def forward_backward(
    parameters: Parameters,
    low_W_enc_FD: Tensor,
    batch: TrainBatch,
    arm: ArmConfig,
    terms: Sequence[tuple[TemporalTerm, float]],
    *,
    workspace: Workspace,
    floor: float = 0.0,
    step: int = 0,
    progress: float = 1.0,
    dead_F: Tensor | None = None,
    config: TrainConfig,
) -> StepResult:
    """One exact pass. Loss = mean over valid tokens of ||x - xhat||^2 / D (a weighted sum over nested groups)  +
    sparsity penalty  +  sum of coefficient * temporal term  +  auxiliary loss. With the normaliser's unit power the
    first part of an ordinary SAE is the batch's FVU.

    terms: (term of the arm, coefficient now). dead_F: bool, latents that the auxiliary loss revives (None: none).
    """
    x_ND = batch.x_ND
    N, D = x_ND.shape
    F = parameters.W_enc_FD.shape[0]
    W_dec_FD = parameters.W_dec_FD.numpy()
    pre_NF = workspace.get("pre", (N, F), batch.low_ND.dtype)
    torch.addmm(parameters.b_enc_F.to(pre_NF.dtype), batch.low_ND, low_W_enc_FD.T, out=pre_NF)

    pairs, floor = arm.sparsity.select(
        Preactivations(pre_NF, x_ND.numpy(), parameters.W_enc_FD.numpy(), parameters.b_enc_F.numpy(), batch.layout),
        floor,
        progress,
    )
    order = kernels.by_latent(pairs, F)
    groups = arm.nested()
    pull_GND, squared_GN = kernels.decode(
        pairs, groups, W_dec_FD, parameters.b_dec_D.numpy(), x_ND.numpy(), batch.layout.valid_N
    )
    mean_squared_G = squared_GN.sum(1, dtype=np.float64) / batch.n_valid
    loss_terms = {"reconstruction": float(groups.weights_G @ mean_squared_G) / D}

    penalty, slope = arm.sparsity.penalty(pairs, batch.n_valid, D)
    if slope:
        loss_terms["sparsity"] = penalty
    extra_Q = np.full_like(order.value_Q, slope)
    for term, coefficient in terms:
        value = term.sparse(order, batch.layout, step)
        loss_terms[term.name] = coefficient * value.value
        extra_Q += extra_Q.dtype.type(coefficient) * value.gradient_Q

    gradients = Parameters(
        workspace.get("gW_enc", (F, D), x_ND.dtype),
        workspace.get("gb_enc", (F,), x_ND.dtype),
        workspace.get("gW_dec", (F, D), x_ND.dtype),
        workspace.get("gb_dec", (D,), x_ND.dtype),
    )
    seeded_F = np.zeros(F, np.bool_)
    if dead_F is not None and bool(dead_F.any()):
        residual_ND = torch.from_numpy(pull_GND[-1]) / groups.weights_G[-1]
        loss_terms["auxiliary"] = _revive(parameters, gradients, batch, residual_ND, dead_F, seeded_F, config)
    scale = 2 / (D * batch.n_valid)
    squared = kernels.gradients(
        x_ND.numpy(),
        pull_GND,
        groups,
        scale,
        W_dec_FD,
        order,
        extra_Q,
        seeded_F,
        gradients.W_enc_FD.numpy(),
        gradients.W_dec_FD.numpy(),
        gradients.b_enc_F.numpy(),
    )
    torch.sum(torch.from_numpy(pull_GND[0]), dim=0, out=gradients.b_dec_D).mul_(scale)
    squared += float(gradients.b_dec_D.square().sum())
    return StepResult(
        loss_terms, gradients, math.sqrt(squared), order, floor, float(mean_squared_G[-1]) / batch.mean_power
    )


def auxiliary_loss(x_ND: Tensor, residual_ND: Tensor, dead: Parameters, k: int) -> Tensor:
    """Share of the residual x - xhat that the k largest of the dead latents leave unexplained (Gao et al. 2024, 2.4):
    ||(x - xhat) - z W_dec||^2 / ||x - xhat||^2, the residual taken as a constant. residual_ND holds xhat - x."""
    pre_NM = (x_ND @ dead.W_enc_FD.T + dead.b_enc_F).relu()
    top = pre_NM.topk(min(k, pre_NM.shape[1]), dim=-1)
    codes_NM = torch.zeros_like(pre_NM).scatter(-1, top.indices, top.values)
    power = residual_ND.square().sum()
    return (residual_ND + codes_NM @ dead.W_dec_FD).square().sum() / power.clamp_min(1e-30)


def _revive(
    parameters: Parameters,
    gradients: Parameters,
    batch: TrainBatch,
    residual_ND: Tensor,
    dead_F: Tensor,
    seeded_F: Array,
    config: TrainConfig,
) -> float:
    """Writes the auxiliary loss's gradient for the dead latents and marks them; returns the loss. At most 8 aux_k
    dead latents, the first ones."""
    dead = dead_F.nonzero().flatten()[: 8 * config.aux_k]
    rows = torch.from_numpy(np.flatnonzero(batch.layout.valid_N))
    rows = rows[:: max(1, len(rows) // config.aux_tokens)]
    leaves = Parameters(
        parameters.W_enc_FD[dead].requires_grad_(),
        parameters.b_enc_F[dead].requires_grad_(),
        parameters.W_dec_FD[dead].requires_grad_(),
        parameters.b_dec_D,
    )
    loss = config.aux_coefficient * auxiliary_loss(batch.x_ND[rows], residual_ND[rows], leaves, config.aux_k)
    g_enc, g_bias, g_dec = torch.autograd.grad(loss, [leaves.W_enc_FD, leaves.b_enc_F, leaves.W_dec_FD])
    gradients.W_enc_FD[dead] = g_enc
    gradients.b_enc_F[dead] = g_bias
    gradients.W_dec_FD[dead] = g_dec
    seeded_F[dead.numpy()] = True
    return float(loss.detach())


class SAETrainer:
    """One SAE of the bank with its optimiser state. Nothing it does depends on the other members."""

    def __init__(self, arm: ArmConfig, config: TrainConfig, d_in: int, workspace: Workspace) -> None:
        self.arm = arm
        self.config = config
        self.parameters = Parameters.initial(d_in, arm.d_sae, arm.seed)
        self.first_moment = self.parameters.map(torch.zeros_like)
        self.second_moment = self.parameters.map(torch.zeros_like)
        self.dtype = fast_matmul_dtype()
        self.low_W_enc_FD = self.parameters.W_enc_FD.to(self.dtype)
        self.silent_tokens_F = torch.zeros(arm.d_sae, dtype=torch.int64)
        self.steps_done = 0
        self.tokens_seen = 0
        self.seconds = 0.0
        self.floor = 0.0
        self.final_loss = float("nan")
        self._at_start: dict[str, float] = {}
        self._workspace = workspace

    @property
    def dead_F(self) -> Tensor:
        return self.silent_tokens_F >= self.config.dead_after_tokens

    def step(self, batch: TrainBatch) -> dict[str, Any]:
        """One optimiser step; returns what the log records. Raises LegatoError on a non-finite loss or gradient."""
        started = time.perf_counter()
        config, step = self.config, self.steps_done
        dead_F = self.dead_F
        result = forward_backward(
            self.parameters,
            self.low_W_enc_FD,
            batch,
            self.arm,
            [(term, term.coefficient * config.term_scale_at(step)) for term in self.arm.terms],
            workspace=self._workspace,
            floor=self.floor,
            step=step,
            progress=step / config.steps,
            dead_F=dead_F,
            config=config,
        )
        if not math.isfinite(result.loss) or not math.isfinite(result.grad_norm):
            raise LegatoError(
                f"{self.arm.name}: loss {result.loss:.3g}, gradient norm {result.grad_norm:.3g} at step {step}: "
                "training diverged; lower --lr or the temporal coefficient"
            )
        if len(result.order.value_Q) == 0:
            raise LegatoError(f"{self.arm.name}: no latent fires at step {step}: training collapsed; lower the penalty")
        self._update(result, config.lr_at(step))
        self.floor = result.floor
        self.silent_tokens_F += batch.n_valid
        self.silent_tokens_F[torch.from_numpy(np.diff(result.order.ptr_F) > 0)] = 0
        self.steps_done += 1
        self.tokens_seen += batch.n_valid
        self.final_loss = result.loss
        diagnostics = self._diagnose(result.order, batch.n_valid) if step % config.log_every == 0 else {}
        seconds = time.perf_counter() - started
        self.seconds += seconds
        return {
            "arm": self.arm.name,
            "step": self.steps_done,
            "tokens": self.tokens_seen,
            "loss": result.loss,
            "loss_terms": result.loss_terms,
            "l0": len(result.order.value_Q) / batch.n_valid,
            "fvu": result.fvu,
            "dead": int(dead_F.sum()),
            "grad_norm": result.grad_norm,
            "act_norm": batch.act_norm,
            "lr": config.lr_at(step),
            "tokens_per_second": batch.n_valid / seconds,
            **diagnostics,
        }

    def _diagnose(self, order: LatentOrder, n_valid: int) -> dict[str, float]:
        """State of the group that the temporal terms look at. Raises LegatoError where it has collapsed since the end
        of the warm-up."""
        share = min([1.0, *(term.slow_fraction for term in self.arm.terms)])
        found = group_diagnostics(order, n_valid, share, self.dead_F.numpy())
        if self.steps_done >= self.config.warmup * self.config.steps and self.arm.terms:
            self._at_start = self._at_start or found
            if reason := collapse(self._at_start, found):
                raise LegatoError(f"{self.arm.name}: {reason} at step {self.steps_done}: lower the coefficient")
        return found

    def _update(self, result: StepResult, lr: float) -> None:
        clip = min(1.0, self.config.clip_norm / max(result.grad_norm, 1e-30))
        for (name, weight), m, v, g in zip(
            self.parameters.items(),
            vars(self.first_moment).values(),
            vars(self.second_moment).values(),
            vars(result.gradients).values(),
            strict=True,
        ):
            rows = [tensor.view(-1, tensor.shape[-1]).numpy() for tensor in (weight, m, v, g)]
            kernels.adam(*rows, clip=clip, lr=lr, step=self.steps_done + 1, unit_rows=name == "W_dec_FD")
        self.low_W_enc_FD.copy_(self.parameters.W_enc_FD)

    def finish(self, normaliser: Normaliser, calibration: Sequence[TrainBatch]) -> SparseAutoencoder:
        """The SAE for raw activations: the normaliser folded in, and what its sparsity leaves open during training settled
        on the calibration batches (a threshold at which k latents per token are active there, for one)."""
        if self.steps_done == 0:
            raise LegatoError(f"{self.arm.name}: 0 training steps were taken: there is nothing to save; raise --tokens")
        p = self.parameters
        fields = self.arm.sparsity.frozen([self._preactivations(batch) for batch in calibration])
        sae = SparseAutoencoder(
            W_enc=p.W_enc_FD.T.contiguous(), b_enc=p.b_enc_F, W_dec=p.W_dec_FD.clone(), b_dec=p.b_dec_D, **fields
        )
        return sae.on_raw(normaliser)

    def _preactivations(self, batch: TrainBatch) -> Preactivations:
        p = self.parameters
        pre_NF = torch.addmm(p.b_enc_F.to(self.dtype), batch.low_ND, self.low_W_enc_FD.T)
        return Preactivations(pre_NF, batch.x_ND.numpy(), p.W_enc_FD.numpy(), p.b_enc_F.numpy(), batch.layout)


@dataclass(frozen=True)
class BankResult:
    """Trainers that finished, and those that failed with the reason (their state is that of the last good step)."""

    finished: list[SAETrainer]
    failed: list[tuple[SAETrainer, str]]


class NoMemberLeftError(LegatoError):
    """Every member of a bank failed; `failed` is what BankResult would have held."""

    def __init__(self, message: str, failed: list[tuple[SAETrainer, str]]) -> None:
        super().__init__(message)
        self.failed = failed


def bank_bytes(arms: Sequence[ArmConfig], d_in: int, tokens_per_batch: int) -> list[int]:
    """Memory that training each arm takes: weights and Adam's moments in float32, the encoder once more in the matmul's
    dtype, and its part of the shared buffers if it is the widest (pre-activations, gradients)."""
    low = torch.finfo(fast_matmul_dtype()).bits // 8
    widest = max(arm.d_sae for arm in arms)
    shared = tokens_per_batch * widest * low + 2 * widest * d_in * 4 + 3 * tokens_per_batch * d_in * 4
    own = [arm.d_sae * d_in * (6 * 4 + low) for arm in arms]
    return [shared // len(arms) + each for each in own]


def train_bank(
    arms: Sequence[ArmConfig],
    batches: Iterable[ActivationBatch],
    normaliser: Normaliser,
    config: TrainConfig,
    *,
    log: Callable[[Mapping[str, Any]], None],
    progress: Callable[[int], None] = lambda step: None,
) -> BankResult:
    """Train every arm on the same `config.steps` batches.

    A member whose numbers go wrong is dropped and reported; the others go on. Raises NoMemberLeftError when none is
    left, LegatoError when the batches run out.
    """
    workspace, dtype = Workspace(), fast_matmul_dtype()
    d_in = normaliser.mean_D.numel()
    trainers = [SAETrainer(arm, config, d_in, workspace) for arm in arms]
    failed: list[tuple[SAETrainer, str]] = []
    stream = iter(batches)
    for step in range(config.steps):
        raw = next(stream, None)
        if raw is None:
            raise LegatoError(f"the activations ran out after {step} of {config.steps} steps: harvest more tokens")
        batch = TrainBatch.of(raw, normaliser, dtype)
        last = step == config.steps - 1
        for trainer in list(trainers):
            try:
                record = trainer.step(batch)
            except LegatoError as error:
                trainers.remove(trainer)
                failed.append((trainer, str(error)))
                if not trainers:
                    raise NoMemberLeftError(str(error), failed) from error
                continue
            if step % config.log_every == 0 or last:
                log(record)
        progress(step + 1)
    return BankResult(trainers, failed)
