"""The one training loop: a bank of SAEs that learn from the same activation batches.

Shape legend: B rows, L positions, N = B * L flat tokens, D width, F latents, P / Q active pairs by token / by latent.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from legato import kernels
from legato.activations import ActivationBatch, Normaliser
from legato.arm import ArmConfig, TrainConfig
from legato.consistency_losses import collapse, group_diagnostics
from legato.errors import LegatoError
from legato.evaluation.controls import position_shuffled
from legato.guard import StepGuard
from legato.hardware import fast_matmul_dtype
from legato.kernels import LatentOrder
from legato.sae import SparseAutoencoder
from legato.sharing import WHOLE, Share, block_of
from legato.sparsity import Preactivations
from legato.step import PER_LATENT, Parameters, StepResult, TrainBatch, Workspace, forward_backward

__all__ = [
    "ArmConfig",
    "BankResult",
    "BankState",
    "Parameters",
    "SAETrainer",
    "TrainBatch",
    "TrainConfig",
    "Workspace",
    "bank_bytes",
    "train_bank",
    "train_on",
]

_NUMBERS = ("steps_done", "tokens_seen", "seconds", "memory", "final_loss")


class SAETrainer:
    """One SAE of the bank with its optimiser state. Nothing it does depends on the other members.

    share: of several ranks that train it together, all calling the same methods, this one's part of each step. Of the
    moments of W_enc, b_enc and W_dec a rank has only its own latents, until `tensors` brings them together.
    """

    def __init__(
        self, arm: ArmConfig, config: TrainConfig, d_in: int, workspace: Workspace, share: Share = WHOLE
    ) -> None:
        self.arm = arm
        self.share = share
        self.config = config
        self.parameters = Parameters.initial(d_in, arm.d_sae, arm.seed, share)
        self.first_moment = self.parameters.map(torch.zeros_like)
        self.second_moment = self.parameters.map(torch.zeros_like)
        self.dtype = fast_matmul_dtype()
        self.low_W_enc_HD = self.parameters.W_enc_FD.to(self.dtype)
        self.silent_tokens_F = torch.zeros(arm.d_sae, dtype=torch.int64)
        self.steps_done = 0
        self.tokens_seen = 0
        self.seconds = 0.0
        self.memory = 0.0
        self.final_loss = float("nan")
        self.guard = StepGuard(arm.name, config.steps)
        self._at_start: dict[str, float] = {}
        self._workspace = workspace

    @classmethod
    def restored(
        cls,
        arm: ArmConfig,
        config: TrainConfig,
        workspace: Workspace,
        tensors: Mapping[str, Tensor],
        numbers: Mapping[str, Any],
        share: Share = WHOLE,
    ) -> "SAETrainer":
        """The trainer whose `tensors()` and `numbers()` these are: what it does next is the same to the last bit."""
        parts: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            part, _, rest = name.partition(".")
            parts.setdefault(part, {})[rest] = tensor
        trainer = cls(arm, config, parts["parameters"]["b_dec_D"].numel(), workspace, share)
        trainer.parameters = Parameters.of(parts["parameters"])
        trainer.first_moment = Parameters.of(parts["first_moment"])
        trainer.second_moment = Parameters.of(parts["second_moment"])
        trainer.low_W_enc_HD.copy_(trainer.parameters.W_enc_FD)
        trainer.silent_tokens_F = tensors["silent_tokens_F"]
        for name in _NUMBERS:
            setattr(trainer, name, numbers[name])
        trainer.guard = StepGuard(**numbers["guard"])
        trainer._at_start = dict(numbers["at_start"])
        return trainer

    def tensors(self) -> dict[str, Tensor]:
        """All tensors of its state, not copied."""
        parts = {"parameters": self.parameters, "first_moment": self.first_moment, "second_moment": self.second_moment}
        for moment in (self.first_moment, self.second_moment):
            for name in PER_LATENT:
                self.share.unite_rows(getattr(moment, name))
        named = {f"{part}.{name}": tensor for part, each in parts.items() for name, tensor in each.items()}
        return {**named, "silent_tokens_F": self.silent_tokens_F}

    def numbers(self) -> dict[str, Any]:
        """All else of its state, json-able."""
        plain = {name: getattr(self, name) for name in _NUMBERS}
        return {**plain, "guard": asdict(self.guard), "at_start": self._at_start}

    @property
    def dead_F(self) -> Tensor:
        return self.silent_tokens_F >= self.config.dead_after_tokens

    def step(self, batch: TrainBatch) -> dict[str, Any]:
        """One optimiser step, or none where the guard forbids it; returns what the log records.

        Raises LegatoError where training diverged or collapsed; the state is then that of the last good step.
        """
        started = time.perf_counter()
        config, step = self.config, self.steps_done + self.guard.skipped
        if self.steps_done == 0:
            self._add_own_parameters(batch)
        dead_F = self.dead_F
        result = forward_backward(
            self.parameters,
            self.low_W_enc_HD,
            batch,
            self.arm,
            [(term, term.coefficient * self.arm.term_scale_at(step, config.steps)) for term in self.arm.terms],
            workspace=self._workspace,
            memory=self.memory,
            step=step,
            progress=step / config.steps,
            dead_F=dead_F,
            config=config,
            share=self.share,
        )
        record = {"arm": self.arm.name, "step": step + 1}
        if fault := self.guard.fault(result.loss, result.grad_norm):
            self.guard.skip(fault, step)
            return {**record, "tokens": self.tokens_seen, "skipped": self.guard.skipped, "skipped_because": fault}
        if len(result.order.value_Q) == 0:
            raise LegatoError(f"{self.arm.name}: no latent fires at step {step}: training collapsed; lower the penalty")
        self._update(result, config.lr_at(step))
        self.guard.accept(result.grad_norm)
        self.memory = result.memory
        self.silent_tokens_F += batch.n_valid
        self.silent_tokens_F[torch.from_numpy(np.diff(result.order.ptr_F) > 0)] = 0
        self.steps_done += 1
        self.tokens_seen += batch.n_valid
        self.final_loss = result.loss
        diagnostics = self._diagnose(result.order, batch.n_valid) if step % config.log_every == 0 else {}
        seconds = time.perf_counter() - started
        self.seconds += seconds
        return {
            **record,
            "tokens": self.tokens_seen,
            "loss": result.loss,
            "loss_terms": result.loss_terms,
            "l0": len(result.order.value_Q) / batch.n_valid,
            "fvu": result.fvu,
            "dead": int(dead_F.sum()),
            "grad_norm": result.grad_norm,
            "act_norm": batch.act_norm,
            "lr": config.lr_at(step),
            "skipped": self.guard.skipped,
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
            start = self._at_start
            if not self.arm.sparsity.holds_l0:
                start = {**start, "group_l0": found["group_l0"]}
            if reason := collapse(start, found):
                raise LegatoError(f"{self.arm.name}: {reason} at step {self.steps_done}: lower the coefficient")
        return found

    def _update(self, result: StepResult, lr: float) -> None:
        clip = min(1.0, self.config.clip_norm / max(result.grad_norm, 1e-30))
        states = (self.parameters, self.first_moment, self.second_moment, result.gradients)
        for entries in zip(*(state.items() for state in states), strict=True):
            name = entries[0][0]
            if name == "W_dec_FD" and self.arm.freeze_decoder:
                continue
            tensors = [tensor for _, tensor in entries]
            own = self.share.rows(self.arm.d_sae) if name in PER_LATENT else slice(None)
            rows = [np.atleast_2d(tensor[own].numpy()) for tensor in tensors]
            rate = lr * self.arm.sparsity.own_rate if name in self.parameters.own else lr
            kernels.adam(*rows, clip=clip, lr=rate, step=self.steps_done + 1, unit_rows=name == "W_dec_FD")
            if name in PER_LATENT:
                self.share.unite_rows(tensors[0])
        self.low_W_enc_HD.copy_(self.parameters.W_enc_FD)

    def finish(self, normaliser: Normaliser, calibration: Sequence[TrainBatch]) -> SparseAutoencoder:
        """The SAE for raw activations: the normaliser folded in, and what its sparsity leaves open during training
        settled on the calibration batches (a threshold at which k latents per token are active there, for one)."""
        sae = self.finish_on_first(normaliser, calibration)
        assert sae is not None, "of several ranks only the first has it"
        return sae

    def finish_on_first(self, normaliser: Normaliser, calibration: Sequence[TrainBatch]) -> SparseAutoencoder | None:
        """As `finish`, by all ranks that train it together: the first gets the SAE, the others None."""
        if self.steps_done == 0:
            raise LegatoError(f"{self.arm.name}: 0 training steps were taken: there is nothing to save; raise --tokens")
        fields = self.arm.sparsity.frozen([self._preactivations(batch) for batch in calibration])
        p = self.whole_parameters()
        if self.share.rank > 0:
            return None
        sae = SparseAutoencoder(
            W_enc=p.W_enc_FD.T.contiguous(), b_enc=p.b_enc_F, W_dec=p.W_dec_FD.clone(), b_dec=p.b_dec_D, **fields
        )
        return sae.on_raw(normaliser)

    def whole_parameters(self) -> Parameters:
        """On the first of the ranks that train it together, all of which call this: those of all latents."""
        whole = {
            name: self.share.whole(tensor) if name in PER_LATENT else tensor for name, tensor in self.parameters.items()
        }
        return Parameters.of(whole)

    def _preactivations(self, batch: TrainBatch) -> Preactivations:
        out_NH = torch.empty(len(batch.low_ND), len(self.low_W_enc_HD), dtype=self.dtype)
        return self.parameters.preactivations(self.low_W_enc_HD, batch, out_NH, self.share)

    def _add_own_parameters(self, batch: TrainBatch) -> None:
        if self.arm.sparsity.own_parameters:
            own = self.arm.sparsity.initial(self._preactivations(batch))
            self.parameters = replace(self.parameters, own=own)
            self.first_moment = self.parameters.map(torch.zeros_like)
            self.second_moment = self.parameters.map(torch.zeros_like)


@dataclass(frozen=True)
class BankResult:
    """Trainers that finished, and those that failed with the reason (their state is that of the last good step)."""

    finished: list[SAETrainer]
    failed: list[tuple[SAETrainer, str]]


@dataclass
class BankState:
    """A bank between two steps: the members in training, those that failed and why, and the steps it has done.

    Of a bank that is spread over several ranks: this rank's members; elsewhere: how many are in training on others.
    share: of ranks that train every member together, this one's part; its members are then all there are.
    """

    trainers: list[SAETrainer]
    failed: list[tuple[SAETrainer, str]] = field(default_factory=list)
    step: int = 0
    elsewhere: int = 0
    share: Share = WHOLE

    @classmethod
    def new(
        cls, arms: Sequence[ArmConfig], config: TrainConfig, d_in: int, *, elsewhere: int = 0, share: Share = WHOLE
    ) -> "BankState":
        workspace = Workspace()
        trainers = [SAETrainer(arm, config, d_in, workspace, share) for arm in arms]
        return cls(trainers, elsewhere=elsewhere, share=share)

    @property
    def is_kept_here(self) -> bool:
        """Whether this rank writes and tells of its members: of ranks that have the same ones, the first does."""
        return self.share.rank == 0

    @property
    def names(self) -> list[str]:
        return [trainer.arm.name for trainer in (*self.trainers, *(trainer for trainer, _ in self.failed))]

    @property
    def in_training(self) -> list[str]:
        return [trainer.arm.name for trainer in self.trainers]

    def drop(self, trainer: SAETrainer, error: LegatoError) -> None:
        """Take a member out that went wrong."""
        self.trainers.remove(trainer)
        self.failed.append((trainer, str(error)))


class NoMemberLeftError(LegatoError):
    """Every member of a bank failed; `failed` is what BankResult would have held."""

    def __init__(self, message: str, failed: list[tuple[SAETrainer, str]]) -> None:
        super().__init__(message)
        self.failed = failed


def bank_bytes(arms: Sequence[ArmConfig], d_in: int, tokens_per_batch: int, shards: int = 1) -> list[int]:
    """Memory that training each arm takes: weights and Adam's moments in float32, the encoder once more in the matmul's
    dtype, and its part of the shared buffers if it is the widest (pre-activations, gradients). shards: ranks that its
    latents are divided over; it is then what one of them needs."""
    low = torch.finfo(fast_matmul_dtype()).bits // 8
    held = [block_of(arm.d_sae, shards) for arm in arms]
    batch = (3 if shards == 1 else 6) * tokens_per_batch * d_in * 4  # with the parts of the sum over the ranks
    shared = tokens_per_batch * max(held) * low + 2 * max(held) * d_in * 4 + batch
    return [shared // len(arms) + n_latents * d_in * (6 * 4 + low) for n_latents in held]


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
    bank = BankState.new(arms, config, normaliser.mean_D.numel())
    return train_on(bank, batches, normaliser, config, log=log, after_step=lambda state: progress(state.step))


def train_on(
    bank: BankState,
    batches: Iterable[ActivationBatch],
    normaliser: Normaliser,
    config: TrainConfig,
    *,
    log: Callable[[Mapping[str, Any]], None],
    after_step: Callable[[BankState], None],
) -> BankResult:
    """As `train_bank`, from wherever the bank stands: the first of the batches belongs to its step `bank.step`.

    after_step: called whenever all members have done a step or failed; all that the next steps depend on is in the
    bank.
    """
    dtype, stream = fast_matmul_dtype(), iter(batches)
    for step in range(bank.step, config.steps):
        raw = next(stream, None)
        if raw is None:
            raise LegatoError(f"the activations ran out after {step} of {config.steps} steps: harvest more tokens")
        batch = TrainBatch.of(raw, normaliser, dtype)
        if any(trainer.arm.shuffle_positions for trainer in bank.trainers):
            shuffled = TrainBatch.of(next(position_shuffled([raw], seed=step)), normaliser, dtype)
        logged = step % config.log_every == 0 or step == config.steps - 1
        for trainer in list(bank.trainers):
            try:
                record = trainer.step(shuffled if trainer.arm.shuffle_positions else batch)
            except LegatoError as error:
                bank.drop(trainer, error)
                continue
            if logged or "skipped_because" in record:
                log(record)
        bank.step = step + 1
        after_step(bank)
        if not bank.trainers and not bank.elsewhere:
            raise NoMemberLeftError(bank.failed[-1][1] if bank.failed else "all failed on other ranks", bank.failed)
    return BankResult(bank.trainers, bank.failed)
