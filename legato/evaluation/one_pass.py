"""Judge every SAE of a bank in one pass over held-out activations.

All SAEs share each activation batch, the sums over the activations themselves, and, for the language model's loss, one
clean forward pass and one chunk of clean logits.

Splicing replaces valid positions only: special tokens and outliers keep their activation. Zero ablation replaces every
position. The loss counts at valid positions whose next token is text of the same document. SAEBench's own numbers
(`core.saebench`, only with a model) follow its rules instead: outliers are reconstructed, and every position whose
token is not pad, EOS or BOS counts.

Shape legend: B rows, L positions, D width, F latents.
"""

import math
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch

from legato.common import distributed
from legato.common.distributed import Result, map_over_ranks
from legato.common.errors import LegatoError, UsageError
from legato.data.activations import ActivationBatch, ActivationSource
from legato.data.language_model import LanguageModel
from legato.evaluation.consistency.groups import add_intervals
from legato.evaluation.consistency.persistence import consistency_metrics, raw_stream_metrics
from legato.evaluation.core.reconstruction import InputSums, reconstruction_metrics, sparsity_metrics, splice_metrics
from legato.evaluation.core.saebench import saebench_features, saebench_losses, saebench_metrics, weight_statistics
from legato.evaluation.latents.table import code_features
from legato.evaluation.position.attachment import position_matrix, position_metrics, position_profile
from legato.evaluation.sae_sums import Decoded, Encoded, EvalBatch, SAESums, spliced
from legato.evaluation.sums.accumulators import PairCounts, PairSums, Summed
from legato.evaluation.sums.code_buffer import CodeBuffer, CodedBatch
from legato.evaluation.sums.lag_pairs import DEFAULT_LAGS, check_lags
from legato.sae.protocol import EvaluableSAE

_SINGLE = "the SAE"
_SPLICED_AT_ONCE = 4  # rows, fixed: the last bits of a forward pass depend on how many rows go through it


@torch.no_grad()
def evaluate(
    sae: EvaluableSAE | Mapping[str, EvaluableSAE],
    activations: ActivationSource | Iterable[ActivationBatch],
    *,
    language_model: LanguageModel | None = None,
    layer: int | None = None,
    site: str = "resid_post",
    ce_rows: int = 64,
    lags: Iterable[int] = DEFAULT_LAGS,
    rows_per_batch: int = 32,
    kept_rows: int = 1024,
    bootstrap: int = 0,
    together: bool = False,
    failures: dict[str, str] | None = None,
    progress: Callable[[int], None] = lambda rows: None,
) -> dict[str, Any]:
    """Return the metrics of one SAE, or {name: metrics} of a bank of SAEs, on held-out activations.

    activations: a store or stream (read in order, `rows_per_batch` rows at a time), or batches. A multiple of 16 rows
        keeps to SAEBench's batches, which its numbers depend on.
    language_model, layer, site: also measure the language model's loss with the reconstruction spliced in, on the first
        `ce_rows` rows.
    kept_rows: rows whose codes are kept for the position x position matrix and the bootstrap.
    bootstrap: replicates of a bootstrap over documents: `consistency.interval95` gives the interval of each mean excess
        at lag 1, so do its rows by firing rate and by group of the objective. "arrays" holds the replicates by name,
        paired across SAEs and runs on the same rows.
    together: all ranks of a run (see distributed.py) call this with the same SAEs and activations. They share the rows
        to encode and to splice, and sum in the order of the rows: every rank returns the bits of one process.
    failures: for a bank, receives {name: reason} of SAEs that cannot be judged; without it the first such SAE raises.
    progress: called with the number of rows judged so far, and then with one more for each SAE whose numbers are made.

    Returns per SAE {"core", "consistency", "position"}, plain numbers and lists as in metrics.json, and beside them
    "features" (columns of the feature table, see table.py) and "arrays" ("position_matrix" (L, L), "rate_FL", the
    firing rate by position, NaN where undefined, and "tokens_L", the valid tokens it is a share of), all numpy.
    Raises LegatoError where there is nothing to measure: no valid position, no latent that fires, values not finite.

    >>> from legato.sae.codes import SparseCodes
    >>> class Halving:  # an SAE: weights, encode_sparse, decode_sparse
    ...     W_enc, b_enc, W_dec = torch.eye(2), torch.zeros(2), torch.eye(2) / 2
    ...     encode_sparse = staticmethod(lambda batch: SparseCodes.from_dense(batch.acts_BLD))
    ...     decode_sparse = staticmethod(lambda codes: codes.dense() / 2)
    >>> acts, zero = torch.tensor([[[2.0, 0], [1, 0], [0, 3], [0, 1]]]), torch.zeros(1, 4, dtype=torch.int64)
    >>> found = evaluate(Halving(), [ActivationBatch(acts, mask_BL=zero == 0, doc_BL=zero, tokens_BL=zero)], lags=(1,))
    >>> found["core"]["l0"], round(found["core"]["fvu"], 4)  # FVU is (15 / 4) / (15 - 25 / 4)
    (1.0, 0.4286)
    """
    bank = dict(sae) if isinstance(sae, Mapping) else {_SINGLE: sae}
    if not bank:
        raise UsageError("there is no SAE to evaluate")
    if language_model is not None and layer is None:
        raise UsageError("to measure the language model's loss, say which layer the activations come from")
    lags = check_lags(tuple(lags))
    shared: _Shared | None = None
    judges: dict[str, SAESums] = {}
    kept = {name: CodeBuffer(kept_rows) for name in bank}
    read = activations.batches(rows_per_batch, seed=None) if hasattr(activations, "batches") else activations
    batches = (EvalBatch.of(raw, lags, language_model) for raw in read)
    for batch, encoded in _encoded(bank, failures if failures is not None else {}, batches, together):
        if shared is None:
            _, length, width = batch.raw.acts_BLD.shape
            shared = _Shared.zero(width, length, lags)
            judges = {name: SAESums.zero(one.W_enc.shape[1], length, lags) for name, one in bank.items()}
        n_rows = min(ce_rows - int(shared.rows), len(batch.raw.mask_BL))
        shared.add(batch)
        decoded = _add(batch, encoded, bank, judges, kept, failures)
        if language_model is not None and layer is not None and n_rows > 0:
            losses = partial(spliced, decoded, batch, language_model, layer=layer, site=site)
            for part in map_over_ranks(losses, torch.arange(n_rows).split(_SPLICED_AT_ONCE), together=together):
                part.get().add_to(judges)
            shared.ce_rows += n_rows
        progress(int(shared.rows))
    shared, results = _with_tokens(shared), {}
    made = map_over_ranks(partial(_result, bank, judges, kept, shared, bootstrap), list(judges), together=together)
    for number, (name, outcome) in enumerate(zip(list(judges), made, strict=True), int(shared.rows) + 1):
        with _failing(name, judges, failures):
            results[name] = outcome.get()
        progress(number)
    return results if isinstance(sae, Mapping) else results[_SINGLE]


def _with_tokens(shared: "_Shared | None") -> "_Shared":
    if shared is None:
        raise LegatoError("there are no activations to evaluate on: harvest held-out text first")
    if not shared.inputs.tokens:
        raise LegatoError("no position is valid: every token is special, padding or an outlier")
    return shared


def _add(
    batch: EvalBatch,
    encoded: Mapping[str, Result[Encoded]],
    bank: Mapping[str, EvaluableSAE],
    judges: dict[str, SAESums],
    kept: Mapping[str, CodeBuffer],
    failures: dict[str, str] | None,
) -> dict[str, Decoded]:
    """Add a batch to the sums of every SAE; return the reconstructions."""
    decoded, raw = {}, batch.raw
    for name in list(judges):
        with _failing(name, judges, failures):
            decoded[name] = Decoded.of(bank[name], encoded[name].get())
            judges[name].add(batch, decoded[name])
            kept[name].add(CodedBatch(decoded[name].codes, raw.mask_BL, raw.doc_BL, raw.tokens_BL))
    return decoded


def _encoded(
    bank: Mapping[str, EvaluableSAE], dropped: Container[str], batches: Iterator[EvalBatch], together: bool
) -> Iterator[tuple[EvalBatch, dict[str, Result[Encoded]]]]:
    """Yield every batch with the codes of the SAEs that are not dropped by then. Ranks take several batches at a time,
    enough for each rank to have something to encode."""
    at_once = math.ceil(distributed.world_size() / len(bank)) if together else 1
    while some := list(islice(batches, at_once)):
        names = [name for name in bank if name not in dropped]
        tasks = [(name, batch) for batch in some for name in names]
        codes = iter(map_over_ranks(lambda task: Encoded.of(bank[task[0]], task[1]), tasks, together=together))
        for batch in some:
            yield batch, {name: next(codes) for name in names}


@dataclass
class _Shared(Summed):
    """Sums over the activations, which all SAEs are measured against."""

    inputs: InputSums
    counts: PairCounts
    raw: PairSums
    rows: float = 0.0
    ce_rows: float = 0.0

    @classmethod
    def zero(cls, width: int, n_positions: int, lags: tuple[int, ...]) -> "_Shared":
        return cls(
            InputSums.zero(width), PairCounts.zero(n_positions, lags), PairSums.zero(width, n_positions, len(lags))
        )

    def add(self, batch: EvalBatch) -> None:
        if batch.raw.mask_BL.shape[1] != len(self.counts.tokens_L):
            raise LegatoError(
                f"rows of {batch.raw.mask_BL.shape[1]} positions follow some of {len(self.counts.tokens_L)}"
            )
        self.inputs.add(batch.raw.acts_BLD, batch.raw.mask_BL)
        self.counts.add(batch.layout)
        self.raw.add_dense(batch.raw.acts_BLD, batch.layout)
        self.rows += len(batch.raw.mask_BL)


def _result(
    bank: Mapping[str, EvaluableSAE],
    judges: Mapping[str, SAESums],
    kept: Mapping[str, CodeBuffer],
    shared: _Shared,
    bootstrap: int,
    name: str,
) -> dict[str, Any]:
    sae, judge = bank[name], judges[name]
    tokens = int(shared.inputs.tokens)
    if not judge.codes.firing.total_F.any():
        raise LegatoError(f"no latent fires on any of {tokens} tokens: the SAE is untrained or fits other activations")
    bench_features = saebench_features(judge.bench, weight_statistics(sae))
    core: dict[str, Any] = {
        **reconstruction_metrics(shared.inputs, judge.reconstruction),
        **sparsity_metrics(judge.codes),
        "tokens": tokens,
    }
    if shared.ce_rows:
        n_positions = shared.counts.tokens_L.size
        core |= splice_metrics(judge.splice)
        core["saebench"] = {
            **saebench_losses(splice_metrics(judge.bench_splice)),
            **saebench_metrics(judge.bench, bench_features, shared.inputs.total_D.size),
            "token_stats": {
                "total_tokens_eval_reconstruction": int(shared.ce_rows) * n_positions,
                "total_tokens_eval_sparsity_variance": int(shared.rows) * n_positions,
            },
        }
    layout = kept[name].layout()
    arrays = {
        "position_matrix": position_matrix(layout, kept[name].order(layout)),
        "rate_FL": position_profile(judge.codes)[0].astype(np.float32),
        "tokens_L": shared.counts.tokens_L.astype(np.int64),
    }
    consistency = consistency_metrics(judge.codes)
    consistency["raw_stream"] = raw_stream_metrics(shared.counts, shared.raw)
    if bootstrap:
        objective = getattr(sae, "details", {}).get("objective") or {}
        replicates = add_intervals(consistency, kept[name], judge.codes, objective, replicates=bootstrap)
        arrays |= {f"bootstrap_{name}": values_R for name, values_R in replicates.items()}
    return {
        "core": core,
        "consistency": consistency,
        "position": position_metrics(judge.codes),
        "features": {**code_features(judge.codes, judge.tokens, judge.gaps), **bench_features},
        "arrays": arrays,
    }


@contextmanager
def _failing(name: str, judges: dict[str, SAESums], failures: dict[str, str] | None) -> Iterator[None]:
    """Put the SAE's name in front of its errors. With a record of failures, note the error there and drop the SAE."""
    try:
        yield
    except LegatoError as error:
        if failures is None:
            raise LegatoError(f"{name}: {error}") from error
        failures[name] = f"{name}: {error}"
        del judges[name]
