"""One SAE of a bank in training: its weights, optimiser, learning rate, guard, and its tensors on the disk.

On the disk they are a folder that one rank writes, or several in blocks of latents, and that any number of ranks opens.
The format is the safetensors one of torch.distributed.checkpoint: a block carries its place in the whole in its file's
header. Nothing is unpickled: the index of that package's own format is a pickle, and neither written nor read.
"""

import math
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from legato.common import distributed
from legato.common.checksummed import write_tensors
from legato.common.errors import LegatoError
from legato.common.hardware import fast_matmul_dtype
from legato.data.activations import Normaliser
from legato.sae.architectures import Preactivations
from legato.sae.autoencoder import SparseAutoencoder
from legato.sae.kernels import gradients
from legato.sae.kernels.pairs import PairsByLatent
from legato.sae.partition import SINGLE, Partition, Sharded
from legato.training.config import SAEConfig, TrainConfig
from legato.training.losses import collapse, group_diagnostics
from legato.training.step import PER_LATENT, Parameters, StepResult, TrainBatch, Workspace, forward_backward

# Gradient norms of good runs (30 recipes on three models) stay within 13 times their recent median.
EXPLODED = 100.0
SETTLING_STEPS = 20
AVERAGED_STEPS = 50
IN_A_ROW = 5
OF_ALL_STEPS = 0.05


@dataclass
class DivergenceGuard:
    """Leaves out a step whose loss or gradient is not finite, or whose gradient norm is EXPLODED times the running mean
    of the good steps'; gives up after IN_A_ROW such steps in a row or OF_ALL_STEPS of the run's.

    A step left out changes nothing about the SAE, so what is left is always its last good state.
    """

    name: str
    steps: int
    good: int = 0
    skipped: int = 0
    in_a_row: int = 0
    typical_norm: float = 0.0

    def fault(self, loss: float, grad_norm: float) -> str | None:
        """Return the fault of a step, or None."""
        if not math.isfinite(loss) or not math.isfinite(grad_norm):
            return f"loss {loss:.3g}, gradient norm {grad_norm:.3g}"
        if self.good >= SETTLING_STEPS and grad_norm > EXPLODED * self.typical_norm:
            return f"gradient norm {grad_norm:.3g} where {self.typical_norm:.3g} is usual"
        return None

    def accept(self, grad_norm: float) -> None:
        self.good += 1
        self.in_a_row = 0
        self.typical_norm += (grad_norm - self.typical_norm) / min(self.good, AVERAGED_STEPS)

    def skip(self, fault: str, step: int) -> None:
        """Raises LegatoError where this is one too many."""
        self.skipped += 1
        self.in_a_row += 1
        limit = min(IN_A_ROW, self.steps)
        if self.in_a_row >= limit or self.skipped > max(limit, OF_ALL_STEPS * self.steps):
            raise LegatoError(
                f"{self.name}: training diverged: {fault} at step {step}, {self.in_a_row} bad steps in a row and "
                f"{self.skipped} in all; lower --lr or the temporal coefficient"
            )


_PARTS = ("parameters", "first_moment", "second_moment")
_NUMBERS = ("steps_done", "tokens_seen", "seconds", "final_loss")


class SAETrainer:
    """One SAE of the bank with its optimiser state. Nothing it does depends on the other members.

    partition: of several ranks that train it together, all calling the same methods, this one's part of each step. Of
    the moments of W_enc, b_enc and W_dec a rank has only its own latents, until `tensors` brings them together.
    """

    def __init__(
        self, arm: SAEConfig, config: TrainConfig, d_in: int, workspace: Workspace, partition: Partition = SINGLE
    ) -> None:
        self.arm = arm
        self.partition = partition
        self.config = config
        self.parameters = Parameters.initial(d_in, arm.d_sae, arm.seed, partition)
        self.first_moment = self.parameters.map(torch.zeros_like)
        self.second_moment = self.parameters.map(torch.zeros_like)
        self.dtype = fast_matmul_dtype()
        self.low_W_enc_HD = self.parameters.W_enc_FD.to(self.dtype)
        self.silent_tokens_F = torch.zeros(arm.d_sae, dtype=torch.int64)
        self.steps_done = 0
        self.tokens_seen = 0
        self.seconds = 0.0
        self.state = 0.0
        self.final_loss = float("nan")
        self.guard = DivergenceGuard(arm.name, config.steps)
        self._at_start: dict[str, float] = {}
        self._workspace = workspace

    def restore(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        """Take up the state of the trainer whose `tensors()` and `numbers()` these are: what it does next is the same
        to the last bit."""
        parts: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            part, _, rest = name.partition(".")
            parts.setdefault(part, {})[rest] = tensor
        for part in _PARTS:
            setattr(self, part, Parameters.of(parts[part]))
        self.low_W_enc_HD.copy_(self.parameters.W_enc_FD)
        self.silent_tokens_F = tensors["silent_tokens_F"]
        for name in _NUMBERS:
            setattr(self, name, numbers[name])
        self.state, self.guard = numbers["memory"], DivergenceGuard(**numbers["guard"])
        self._at_start = dict(numbers["at_start"])

    def tensors(self) -> dict[str, Tensor]:
        """All tensors of its state, not copied."""
        parts = {part: getattr(self, part) for part in _PARTS}
        for moment in (self.first_moment, self.second_moment):
            for name in PER_LATENT:
                self.partition.unite_rows(getattr(moment, name))
        named = {f"{part}.{name}": tensor for part, each in parts.items() for name, tensor in each.items()}
        return {**named, "silent_tokens_F": self.silent_tokens_F}

    def numbers(self) -> dict[str, Any]:
        """All else of its state, json-able."""
        plain = {name: getattr(self, name) for name in _NUMBERS}
        return {**plain, "memory": self.state, "guard": asdict(self.guard), "at_start": self._at_start}

    @property
    def dead_F(self) -> Tensor:
        return self.silent_tokens_F >= self.config.dead_after_tokens

    def step(self, batch: TrainBatch) -> dict[str, Any]:
        """One optimiser step, or none where the guard forbids it; returns what the log records.

        Raises LegatoError where training diverged or collapsed; the state is then that of the last good step.
        """
        started = time.perf_counter()
        config, step = self.config, self.steps_done + self.guard.skipped
        if self.steps_done == 0 and self.arm.architecture.own_parameters:
            own = self.arm.architecture.initial(self._preactivations(batch))
            self.parameters = replace(self.parameters, own=own)
            self.first_moment = self.parameters.map(torch.zeros_like)
            self.second_moment = self.parameters.map(torch.zeros_like)
        dead_F = self.dead_F
        result = forward_backward(
            self.parameters,
            self.low_W_enc_HD,
            batch,
            self.arm,
            [(term, term.coefficient * self.arm.term_scale_at(step, config.steps)) for term in self.arm.terms],
            workspace=self._workspace,
            state=self.state,
            step=step,
            progress=step / config.steps,
            dead_F=dead_F,
            config=config,
            partition=self.partition,
        )
        record = {"arm": self.arm.name, "step": step + 1}
        if fault := self.guard.fault(result.loss, result.grad_norm):
            self.guard.skip(fault, step)
            return {**record, "tokens": self.tokens_seen, "skipped": self.guard.skipped, "skipped_because": fault}
        if len(result.order.value_Q) == 0:
            raise LegatoError(f"{self.arm.name}: no latent fires at step {step}: training collapsed; lower the penalty")
        self._update(result, config.lr_at(step))
        self.guard.accept(result.grad_norm)
        self.state = result.state
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

    def _diagnose(self, order: PairsByLatent, n_valid: int) -> dict[str, float]:
        """State of the group that the temporal terms look at. Raises LegatoError where it has collapsed since the end
        of the warm-up."""
        partition = min([1.0, *(term.slow_fraction for term in self.arm.terms)])
        found = group_diagnostics(order, n_valid, partition, self.dead_F.numpy())
        if self.steps_done >= self.config.warmup * self.config.steps and self.arm.terms:
            self._at_start = self._at_start or found
            start = self._at_start
            if not self.arm.architecture.holds_l0:
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
            own = self.partition.rows(self.arm.d_sae) if name in PER_LATENT else slice(None)
            rows = [np.atleast_2d(tensor[own].numpy()) for tensor in tensors]
            rate = lr * self.arm.architecture.own_rate if name in self.parameters.own else lr
            gradients.adam(*rows, clip=clip, lr=rate, step=self.steps_done + 1, unit_rows=name == "W_dec_FD")
            if name in PER_LATENT:
                self.partition.unite_rows(tensors[0])
        self.low_W_enc_HD.copy_(self.parameters.W_enc_FD)

    def finish(self, normaliser: Normaliser, calibration: Sequence[TrainBatch]) -> SparseAutoencoder:
        """The SAE for raw activations: the normaliser folded in, and what its architecture leaves open during training
        settled on the calibration batches (a threshold at which k latents per token are active there, for one)."""
        sae = self.finish_on_first(normaliser, calibration)
        assert sae is not None, "of several ranks only the first has it"
        return sae

    def finish_on_first(self, normaliser: Normaliser, calibration: Sequence[TrainBatch]) -> SparseAutoencoder | None:
        """Like `finish`, by all ranks that train it together: the first gets the SAE, the others None."""
        if self.steps_done == 0:
            raise LegatoError(f"{self.arm.name}: 0 training steps were taken: there is nothing to save; raise --tokens")
        architecture = self.arm.architecture.inference([self._preactivations(batch) for batch in calibration])
        p = self.whole_parameters()
        if self.partition.rank > 0:
            return None
        sae = SparseAutoencoder(p.W_enc_FD.T.contiguous(), p.b_enc_F, p.W_dec_FD.clone(), p.b_dec_D, architecture)
        return sae.on_raw(normaliser)

    def whole_parameters(self) -> Parameters:
        """On the first of the ranks that train it together, all of which call this: those of all latents."""
        whole = {
            name: self.partition.whole(tensor) if name in PER_LATENT else tensor
            for name, tensor in self.parameters.items()
        }
        return Parameters.of(whole)

    def _preactivations(self, batch: TrainBatch) -> Preactivations:
        out_NH = torch.empty(len(batch.low_ND), len(self.low_W_enc_HD), dtype=self.dtype)
        return self.parameters.preactivations(self.low_W_enc_HD, batch, out_NH, self.partition)


def write_trainer_state(
    folder: Path, tensors: Mapping[str, Tensor], partition: Partition, n_latents: int
) -> list[Path]:
    """Write what `SAETrainer.tensors` gives; the files that this rank wrote.

    All ranks that have a share call it. Raises OSError and SafetensorError.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(partition, Sharded):
        return _write_blocks(folder, tensors, partition, n_latents)
    if partition.rank > 0:
        return []
    return [write_tensors(folder / "whole.safetensors", tensors)]


def _write_blocks(folder: Path, tensors: Mapping[str, Tensor], partition: Sharded, n_latents: int) -> list[Path]:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

    blocks = {name: _block(tensor, n_latents) if _divided(name) else tensor for name, tensor in tensors.items()}
    files = {name: number for number, name in enumerate(blocks, start=1)}  # a file each: one at a time is in memory
    writer = HuggingFaceStorageWriter(str(folder), files, save_distributed=True)
    try:
        with distributed.rank_errors():
            dcp.save(blocks, storage_writer=writer)
    except dcp.CheckpointException as error:
        raise next(iter(error.failures.values()))[0] from error
    return sorted(folder.glob(f"shard-{partition.rank + 1:05d}-*.safetensors"))


def read_trainer_state(folder: Path, partition: Partition, n_latents: int) -> dict[str, Tensor]:
    """Read what `write_trainer_state` was given, or this rank's share of it; the files are known to be sound."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    reader, held = HuggingFaceStorageReader(str(folder)), partition.local(n_latents)
    tensors: dict[str, Tensor] = {}
    into: dict[str, Tensor] = {}
    for name, stored in sorted(reader.read_metadata().state_dict_metadata.items()):
        assert isinstance(stored, TensorStorageMetadata), name
        in_blocks = isinstance(partition, Sharded) and _divided(name)
        size = (held.stop - held.start, *stored.size[1:]) if in_blocks else stored.size
        tensors[name] = torch.empty(size, dtype=stored.properties.dtype)
        into[name] = _block(tensors[name], n_latents) if in_blocks else tensors[name]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # every rank reads for itself
        dcp.load(into, storage_reader=reader, no_dist=True)
    return tensors


def _divided(name: str) -> bool:
    """Tell if a tensor named as in `SAETrainer.tensors` is divided over the ranks."""
    return name.rpartition(".")[2] in PER_LATENT


def _block(rows: Tensor, n_latents: int) -> Tensor:
    """A tensor with a row per latent, of which each rank has its own."""
    from torch.distributed.tensor import DTensor, Shard, init_device_mesh

    whole = torch.empty(n_latents, *rows.shape[1:], device="meta")
    mesh = init_device_mesh("cpu", (distributed.world_size(),))
    return DTensor.from_local(rows, mesh, [Shard(0)], run_check=False, shape=whole.shape, stride=whole.stride())
