"""Controls: trained SAEs whose codes are changed afterwards, without training.

A control has a row of its own in the results. It shows how much consistency the change gives by itself, and at what
cost.

Shape legend: B rows, L positions, D width, F latents.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from legato.common.errors import UsageError
from legato.data.activations import ActivationBatch
from legato.sae.architectures import Hysteresis, HysteresisTopK, TopK
from legato.sae.architectures.preactivations import Encoder
from legato.sae.autoencoder import SparseAutoencoder
from legato.sae.codes import SparseCodes
from legato.sae.protocol import EvaluableSAE
from legato.sae.segments import Segments

# (codes_LF of one row, its runs of consecutive valid tokens of one document) -> codes_LF smoothed inside each run
Smoother = Callable[[Tensor, Sequence[slice]], Tensor]


@dataclass(frozen=True)
class MovingAverage:
    """Moving average h_t = alpha h_{t-1} + (1 - alpha) f_t, h = f at the first token of a run.

    Codes stay sparse: a latent that last fired n tokens ago is dropped once alpha^n < cutoff. With the defaults it
    lasts 6 tokens longer than it fired.
    """

    alpha: float = 0.5
    cutoff: float = 0.01

    def __post_init__(self) -> None:
        if not 0 < self.alpha < 1 or not 0 < self.cutoff < 1:
            raise UsageError(f"alpha {self.alpha} and cutoff {self.cutoff} must lie between 0 and 1")

    def __call__(self, codes_LF: Tensor, runs: Sequence[slice]) -> Tensor:
        lasts = math.floor(math.log(self.cutoff) / math.log(self.alpha) + 1e-9)
        smooth_LF = torch.zeros_like(codes_LF)
        for run in runs:
            held_F = codes_LF[run.start]
            silent_F = torch.where(held_F > 0, 0, lasts + 1)
            smooth_LF[run.start] = held_F
            for t in range(run.start + 1, run.stop):
                code_F = codes_LF[t]
                silent_F = torch.where(code_F > 0, 0, silent_F + 1)
                held_F = (self.alpha * held_F + (1 - self.alpha) * code_F) * (silent_F <= lasts)
                smooth_LF[t] = held_F
        return smooth_LF


@dataclass(frozen=True)
class ChunkMean:
    """Mean code over chunks of `window` tokens, counted from the start of each run; a run's last chunk may be
    shorter."""

    window: int = 8

    def __post_init__(self) -> None:
        if self.window < 2:
            raise UsageError(f"window {self.window} averages nothing: use 2 or more")

    def __call__(self, codes_LF: Tensor, runs: Sequence[slice]) -> Tensor:
        smooth_LF = torch.zeros_like(codes_LF)
        for run in runs:
            for start in range(run.start, run.stop, self.window):
                chunk = slice(start, min(start + self.window, run.stop))
                smooth_LF[chunk] = codes_LF[chunk].mean(0)
        return smooth_LF


@dataclass(frozen=True)
class Smoothed:
    """A trained SAE whose codes are smoothed along each document's tokens before they are decoded."""

    sae: EvaluableSAE
    smoother: Smoother

    @property
    def W_enc(self) -> Tensor:
        return self.sae.W_enc

    @property
    def b_enc(self) -> Tensor:
        return self.sae.b_enc

    @property
    def W_dec(self) -> Tensor:
        return self.sae.W_dec

    def encode_sparse(self, batch: ActivationBatch) -> SparseCodes:
        return smoothed(self.sae.encode_sparse(batch), batch.mask_BL, batch.doc_BL, self.smoother)

    def decode_sparse(self, codes: SparseCodes) -> Tensor:
        return self.sae.decode_sparse(codes)


def smoothed(codes: SparseCodes, mask_BL: Tensor, doc_BL: Tensor, smoother: Smoother) -> SparseCodes:
    """Smooth the codes, one row at a time so that no more than [L, F] is dense."""
    B, L, F = codes.shape
    layout = Segments.of(mask_BL, doc_BL)
    ends = torch.searchsorted(codes.token_P, torch.arange(0, (B + 1) * L, L)).tolist()
    parts = []
    for row in range(B):
        pairs = slice(ends[row], ends[row + 1])
        codes_LF = torch.zeros(L, F, dtype=codes.value_P.dtype)
        codes_LF[codes.token_P[pairs] - row * L, codes.latent_P[pairs]] = codes.value_P[pairs]
        tokens = range(row * L, (row + 1) * L)
        runs = sorted({(int(layout.start_N[n]), int(layout.end_N[n])) for n in tokens if layout.valid_N[n]})
        smooth_LF = smoother(codes_LF, [slice(start - row * L, end - row * L) for start, end in runs])
        token_P, latent_P = smooth_LF.nonzero(as_tuple=True)
        parts.append((token_P + row * L, latent_P, smooth_LF[token_P, latent_P]))
    token_P, latent_P, value_P = (torch.cat(column) for column in zip(*parts, strict=True))
    return SparseCodes(token_P, latent_P, value_P, codes.shape)


def with_hysteresis(
    sae: SparseAutoencoder, batches: Iterable[ActivationBatch], *, k: int, release: float
) -> SparseAutoencoder:
    """A SAE with one threshold per latent as a hysteresis SAE of the same weights, never trained as one: its latents
    share the threshold that gives k active latents per token on the batches."""
    encoder = Encoder(sae.W_enc, sae.b_enc, sae.b_dec)
    calibration = [encoder.centred(batch.acts_BLD.float(), batch.mask_BL, batch.doc_BL) for batch in batches]
    return replace(sae, architecture=Hysteresis(k, release=release).inference(calibration))


@dataclass(frozen=True)
class Control:
    """A row of the results that was not trained: the SAE to judge, and its section "training" of metrics.json."""

    judged: EvaluableSAE
    training: dict[str, Any]


def post_hoc_control(
    kind: str, sae: SparseAutoencoder, calibration: Sequence[ActivationBatch], *, k: int, release: float
) -> Control | None:
    """Make one of CONTROLS of a trained SAE; None where the SAE has no thresholds and the control needs them.

    A TopK SAE can only be given hysteresis, inside each token's budget. calibration: activations on which the threshold
    of post-hoc hysteresis is set, so that its L0 is k.
    """
    settings: dict[str, Any]
    if kind == "hysteresis":
        settings = {"k": k, "release": release}
        if isinstance(sae.architecture, TopK):
            judged: EvaluableSAE = replace(sae, architecture=HysteresisTopK(sae.architecture.k, release))
        else:
            judged = with_hysteresis(sae, calibration, k=k, release=release)
    elif isinstance(sae.architecture, TopK):
        return None
    else:
        smoother = _SMOOTHERS[kind]
        judged, settings = Smoothed(sae, smoother), asdict(smoother)
    return Control(judged, {"post_hoc": {"control": kind, **settings}})


_SMOOTHERS: dict[str, MovingAverage | ChunkMean] = {"ema": MovingAverage(), "chunk_mean": ChunkMean()}
CONTROLS = (*_SMOOTHERS, "hysteresis")
