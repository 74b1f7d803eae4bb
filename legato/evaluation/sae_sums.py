"""All sums about one SAE, and the adding of a batch to them.

Two sets of positions count: Legato's valid positions, and SAEBench's (outliers included, see core/saebench.py). They
differ in few rows. Only those rows are encoded, and spliced into the language model, a second time.

Shape legend: B rows, L positions, D width, N counted tokens.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from legato.common.errors import LegatoError
from legato.data.activations import ActivationBatch
from legato.data.language_model import LanguageModel
from legato.evaluation.core.reconstruction import ReconstructionSums, SpliceSums, TokenErrors
from legato.evaluation.core.saebench import SaeBenchSums, batch_spread
from legato.evaluation.core.splice import TokenLosses, splice_losses
from legato.evaluation.latents.burstiness import GapSums
from legato.evaluation.latents.tokens import TokenCounts
from legato.evaluation.sums.accumulators import CodeSums, Summed
from legato.evaluation.sums.lag_pairs import Floats, LagPairs, pairs_by_latent, step_norms
from legato.sae.codes import SparseCodes
from legato.sae.protocol import EvaluableSAE

ABLATION = "zero ablation"


@dataclass(frozen=True)
class BenchPositions:
    """Positions that count for SAEBench, the rows where they are not the valid ones, and the spread of its batches."""

    mask_BL: Tensor
    rows: Tensor
    spread_BL: Floats

    @classmethod
    def of(cls, batch: ActivationBatch, language_model: LanguageModel | None) -> "BenchPositions":
        """Take all positions whose token is not pad, EOS or BOS. Without a language model: the valid ones."""
        mask_BL = batch.mask_BL
        if language_model is not None:
            tokenizer = language_model.tokenizer
            special = {tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id} - {None}
            mask_BL = ~torch.isin(batch.tokens_BL.long(), torch.tensor(sorted(special)))
        rows = (mask_BL != batch.mask_BL).any(1).nonzero()[:, 0]
        return cls(mask_BL, rows, batch_spread(batch.acts_BLD, mask_BL))


@dataclass(frozen=True)
class EvalBatch:
    """A batch of activations, and what is computed of it once for all SAEs. step_BL: ||x_t - x_{t-1}||."""

    raw: ActivationBatch
    layout: LagPairs
    bench: BenchPositions
    step_BL: Tensor

    @classmethod
    def of(cls, batch: ActivationBatch, lags: tuple[int, ...], language_model: LanguageModel | None) -> "EvalBatch":
        layout = LagPairs.of(batch.mask_BL, batch.doc_BL, lags)
        return cls(batch, layout, BenchPositions.of(batch, language_model), step_norms(batch.acts_BLD))


@dataclass(frozen=True)
class Encoded:
    """Codes at the valid positions, and again for the rows where SAEBench counts other positions."""

    codes: SparseCodes
    bench: SparseCodes | None

    @classmethod
    def of(cls, sae: EvaluableSAE, batch: EvalBatch) -> "Encoded":
        codes = _finite(sae.encode_sparse(batch.raw))
        if not len(batch.bench.rows):
            return cls(codes, None)
        return cls(codes, _finite(sae.encode_sparse(_take(batch.raw, batch.bench.rows, batch.bench.mask_BL))))


@dataclass(frozen=True)
class Decoded:
    """Codes and their reconstructions."""

    codes: SparseCodes
    out_BLD: Tensor
    bench_codes: SparseCodes | None
    bench_out: Tensor | None

    @classmethod
    def of(cls, sae: EvaluableSAE, encoded: Encoded) -> "Decoded":
        bench_out = None if encoded.bench is None else sae.decode_sparse(encoded.bench)
        return cls(encoded.codes, sae.decode_sparse(encoded.codes), encoded.bench, bench_out)


def _take(batch: ActivationBatch, rows: Tensor, mask_BL: Tensor) -> ActivationBatch:
    """Take some rows of a batch, with another mask."""
    return replace(
        batch,
        acts_BLD=batch.acts_BLD[rows],
        mask_BL=mask_BL[rows],
        doc_BL=batch.doc_BL[rows],
        tokens_BL=batch.tokens_BL[rows],
    )


def _finite(codes: SparseCodes) -> SparseCodes:
    if not bool(torch.isfinite(codes.value_P).all()):
        raise LegatoError("codes hold values that are not finite; the weights are damaged or training diverged")
    return codes


@dataclass
class SAESums(Summed):
    """All sums about one SAE."""

    codes: CodeSums
    reconstruction: ReconstructionSums
    splice: SpliceSums
    bench: SaeBenchSums
    bench_splice: SpliceSums
    tokens: TokenCounts
    gaps: GapSums

    @classmethod
    def zero(cls, n_latents: int, n_positions: int, lags: Iterable[int]) -> "SAESums":
        codes = CodeSums.zero(n_latents, n_positions, tuple(lags))
        return cls(
            codes,
            ReconstructionSums(),
            SpliceSums(),
            SaeBenchSums.zero(n_latents),
            SpliceSums(),
            TokenCounts(n_latents),
            GapSums.zero(n_latents),
        )

    def add(self, batch: EvalBatch, decoded: Decoded) -> None:
        order = pairs_by_latent(decoded.codes, batch.layout)
        self.codes.add(batch.layout, order, batch.step_BL)
        self.tokens.add(batch.raw.tokens_BL, batch.layout, order)
        self.gaps.add(batch.layout, order)
        errors = TokenErrors.of(batch.raw.acts_BLD, decoded.out_BLD)
        self.reconstruction.add(errors, batch.raw.mask_BL)
        codes, keep_B = decoded.codes, torch.ones(decoded.codes.shape[0], dtype=torch.bool)
        keep_B[batch.bench.rows] = False
        keep_P = keep_B[codes.token_P // codes.shape[1]]
        self.bench.add_codes(
            SparseCodes(codes.token_P[keep_P], codes.latent_P[keep_P], codes.value_P[keep_P], codes.shape)
        )
        if decoded.bench_codes is not None and decoded.bench_out is not None:
            self.bench.add_codes(decoded.bench_codes)
            out_BLD = decoded.out_BLD.index_copy(0, batch.bench.rows, decoded.bench_out)
            errors = TokenErrors.of(batch.raw.acts_BLD, out_BLD)
        self.bench.add_reconstruction(errors, batch.bench.spread_BL, batch.bench.mask_BL)


@dataclass(frozen=True)
class SplicedRows:
    """Losses of some rows at the positions that either set counts: of the clean model, and by name of the replacement.

    own_N, bench_loss_N, bench_N: where Legato counts, where SAEBench counts the loss, and where the divergence.
    """

    clean: TokenLosses
    own: dict[str, TokenLosses]
    bench: dict[str, TokenLosses]
    own_N: NDArray[Any]
    bench_loss_N: NDArray[Any]
    bench_N: NDArray[Any]

    def add_to(self, judges: dict[str, SAESums]) -> None:
        for name, judge in judges.items():
            judge.splice.add(self.clean, self.own[name], self.own[ABLATION], self.own_N, self.own_N)
            judge.bench_splice.add(self.clean, self.bench[name], self.own[ABLATION], self.bench_loss_N, self.bench_N)


def spliced(
    decoded: dict[str, Decoded],
    batch: EvalBatch,
    language_model: LanguageModel,
    rows: Tensor,
    *,
    layer: int,
    site: str,
) -> SplicedRows:
    """Measure the losses with every SAE's reconstruction of these rows of the batch spliced into the model."""
    raw = _take(batch.raw, rows, batch.raw.mask_BL)
    bench_BL = batch.bench.mask_BL[rows]
    special = torch.tensor(sorted(language_model.special_token_ids), dtype=torch.long)
    is_text_BL = ~torch.isin(raw.tokens_BL.long(), special)
    own_BL = torch.zeros_like(raw.mask_BL)  # followed by a text token of the same document
    own_BL[:, :-1] = raw.mask_BL[:, :-1] & is_text_BL[:, 1:] & (raw.doc_BL[:, 1:] == raw.doc_BL[:, :-1])
    bench_loss_BL = bench_BL.clone()
    bench_loss_BL[:, -1] = False
    counted_BL = own_BL | bench_BL

    def losses(
        part: ActivationBatch, outs: dict[str, Tensor], counted: Tensor
    ) -> tuple[TokenLosses, dict[str, TokenLosses]]:
        spliced = {
            name: torch.where(part.mask_BL[..., None], out_BLD.to(part.acts_BLD), part.acts_BLD)
            for name, out_BLD in outs.items()
        }
        spliced[ABLATION] = torch.zeros_like(part.acts_BLD)
        return splice_losses(language_model, part.acts_BLD, part.tokens_BL, spliced, counted, layer=layer, site=site)

    clean, own = losses(raw, {name: one.out_BLD[rows] for name, one in decoded.items()}, counted_BL)
    benched = dict(own)
    again_R = torch.isin(batch.bench.rows, rows)
    if bool(again_R.any()):
        again_B = torch.isin(rows, batch.bench.rows)
        outs = {name: one.bench_out[again_R] for name, one in decoded.items() if one.bench_out is not None}
        part = _take(batch.raw, batch.bench.rows[again_R], batch.bench.mask_BL)
        _, again = losses(part, outs, counted_BL[again_B])
        place_N = again_B[counted_BL.nonzero()[:, 0]].numpy()
        benched |= {name: _replaced(own[name], place_N, again[name]) for name in outs}
    counts = (where_BL[counted_BL].numpy() for where_BL in (own_BL, bench_loss_BL, bench_BL))
    return SplicedRows(clean, own, benched, *counts)


def _replaced(losses: TokenLosses, place_N: NDArray[Any], other: TokenLosses) -> TokenLosses:
    ce_N, kl_N = losses.ce_N.copy(), losses.kl_N.copy()
    ce_N[place_N], kl_N[place_N] = other.ce_N, other.kl_N
    return TokenLosses(ce_N, kl_N)
