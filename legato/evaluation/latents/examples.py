"""Passages: the activations of every latent on real text, saved so that a person can look at them.

strips/tokens.parquet, a row per position of the text shown (the first held-out contexts, up to MAX_TOKENS positions),
shared by all arms of the run:
  token, text     input id; that token on its own as a string
  doc, valid      document number, -1 on padding; False for special tokens, padding and outliers, which never count
Its schema's metadata holds `context_length`: position n is position n % context_length of context n // context_length.

strips/<arm>.parquet, a row per latent. Positions are rows of tokens.parquet; activations are codes rescaled by the
decoder norm. Lists are empty, numbers null, where a latent does not fire on the text shown.
  latent, firings             index in the dictionary; positions of the text shown where it fires
  max_activation              its largest activation there
  tokens, values              all of those positions, ascending; activations in 255ths of the largest, at least 1
  top                         centres of its strongest passages, strongest first, at least WINDOW apart
  quantile                    centres where its activation stands at QUANTILES of its firings, at least WINDOW from top
  random                      centres drawn evenly among its firings, at least WINDOW apart
  histogram                   firings in HISTOGRAM_BINS equal bins of activation from 0 to the largest
  similar, similar_cosine     the latents of nearest decoder direction
  together, together_jaccard  the latents that fire with it: share of the positions where either fires (neighbours.py)
  promoted, promoted_z, suppressed, suppressed_z
                              tokens whose logits its direction raises and lowers most (logits.py)
  match/<arm>, match_cosine/<arm>
                              the latent of another arm with the nearest decoder direction, even if it is not near.
                              Every arm is matched with its seed's baseline, and the baseline with every arm

Shape legend: B rows, L positions, F latents, P active pairs ordered by latent, then by position.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from torch import Tensor

from legato.evaluation.latents.logits import TopLogits
from legato.evaluation.latents.neighbours import OtherSAE, coactivation, nearest_directions
from legato.evaluation.sums.code_buffer import CodeBuffer
from legato.sae.kernels.pairs import PairsByLatent

MAX_TOKENS = 65_536
WINDOW = 32  # tokens of a passage
TOP, RANDOM, QUANTILES = 5, 4, (0.75, 0.5, 0.25)
HISTOGRAM_BINS = 16
SIMILAR = 5


@dataclass(frozen=True)
class ShownText:
    """Text shown. tokens_BL: input ids. doc_BL: document numbers, -1 on padding. valid_BL: positions that count."""

    tokens_BL: NDArray[Any]
    doc_BL: NDArray[Any]
    valid_BL: NDArray[np.bool_]


def shown(kept: CodeBuffer, max_tokens: int = MAX_TOKENS) -> tuple[ShownText, PairsByLatent]:
    """Take the first contexts that are kept, up to max_tokens positions, and the codes on them by latent."""
    kept = kept.first(max(1, max_tokens // kept.doc_BL.shape[1]))
    layout = kept.layout()
    valid_BL = layout.stretch_N.reshape(layout.shape) >= 0
    return ShownText(kept.tokens_BL.numpy(), kept.doc_BL.numpy(), valid_BL), kept.order(layout)


def write_text(path: str | Path, text: ShownText, decode: Callable[[Sequence[int]], list[str]]) -> None:
    """Write tokens.parquet. decode: token ids to one string each."""
    ids_V, at_N = np.unique(text.tokens_BL.ravel(), return_inverse=True)
    pieces = pa.array([_storable(piece) for piece in decode(ids_V.tolist())], pa.string())
    table = pa.table(
        {
            "token": pa.array(text.tokens_BL.ravel(), pa.int32()),
            "text": pa.DictionaryArray.from_arrays(pa.array(at_N.ravel(), pa.int32()), pieces).cast(pa.string()),
            "doc": pa.array(text.doc_BL.ravel(), pa.int32()),
            "valid": pa.array(text.valid_BL.ravel()),
        }
    ).replace_schema_metadata({"context_length": str(text.tokens_BL.shape[1])})
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, compression="zstd")


def write_strips(
    path: str | Path,
    order: PairsByLatent,
    text: ShownText,
    W_dec: Tensor,
    *,
    others: Mapping[str, OtherSAE] | None = None,
    logits: TopLogits | None = None,
    seed: int = 0,
) -> None:
    """Write <arm>.parquet with the columns above; without promoted and suppressed tokens where no logits are given.

    order: the SAE's codes on the text. W_dec: [F, D]. seed: of the random passages.
    Cost: O(P log P) and O(F^2 D) for the directions.
    """
    count_F = np.diff(order.ptr_F)
    alive_F = count_F > 0
    centres = choose_passages(order, text.tokens_BL.shape[1], seed)
    largest_F, values_P = quantised(order)
    similar, cosine = nearest_directions(W_dec, alive_F, None, k=SIMILAR)
    together, jaccard = coactivation(order, text.tokens_BL.size, k=SIMILAR)
    columns: dict[str, Any] = {
        "latent": pa.array(np.arange(count_F.size), pa.int32()),
        "firings": pa.array(count_F, pa.int32()),
        "max_activation": pa.array(largest_F, pa.float32(), mask=~alive_F),
        "tokens": _lists(order.ptr_F, order.token_Q),
        "values": _lists(order.ptr_F, values_P),
        **{name: _without_gaps(centre_FK, centre_FK >= 0) for name, centre_FK in centres.items()},
        "histogram": _without_gaps(histograms(order, largest_F), alive_F[:, None]),
        "similar": _without_gaps(similar, similar >= 0),
        "similar_cosine": _without_gaps(cosine, similar >= 0),
        "together": _without_gaps(together, together >= 0),
        "together_jaccard": _without_gaps(jaccard, together >= 0),
    }
    if logits is not None:
        for name, pieces, z_FK in (
            ("promoted", logits.top, logits.top_z_FK),
            ("suppressed", logits.bottom, logits.bottom_z_FK),
        ):
            shown = np.broadcast_to(alive_F[:, None], z_FK.shape)
            chosen = np.array([_storable(piece) for row in pieces for piece in row], object).reshape(z_FK.shape)
            columns[name] = _without_gaps(chosen, shown, pa.string())
            columns[f"{name}_z"] = _without_gaps(z_FK, shown)
    for other, theirs in (others or {}).items():
        nearest, likeness = nearest_directions(W_dec, alive_F, theirs, k=1)
        columns[f"match/{other}"] = pa.array(nearest[:, 0], pa.int32(), mask=nearest[:, 0] < 0)
        columns[f"match_cosine/{other}"] = pa.array(likeness[:, 0], pa.float32(), mask=nearest[:, 0] < 0)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, compression="zstd")


def quantised(order: PairsByLatent) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """Return each latent's largest activation, 0 where it never fires, and activations in 255ths of it, at least 1."""
    count_F = np.diff(order.ptr_F)
    largest_F = np.zeros(count_F.size, np.float32)
    fires_F = count_F > 0
    largest_F[fires_F] = np.maximum.reduceat(order.value_Q, order.ptr_F[:-1][fires_F]) if fires_F.any() else 0
    share_P = order.value_Q / np.repeat(largest_F, count_F)
    return largest_F, np.maximum(np.rint(255 * share_P), 1).astype(np.uint8)


def histograms(order: PairsByLatent, largest_F: NDArray[np.float32]) -> NDArray[np.int32]:
    """Count firings in equal bins of activation from 0 to each latent's largest, [F, HISTOGRAM_BINS]."""
    latent_P = np.repeat(np.arange(largest_F.size), np.diff(order.ptr_F))
    bin_P = (HISTOGRAM_BINS * order.value_Q / largest_F[latent_P]).astype(np.int64).clip(max=HISTOGRAM_BINS - 1)
    counts = np.bincount(latent_P * HISTOGRAM_BINS + bin_P, minlength=largest_F.size * HISTOGRAM_BINS)
    return counts.reshape(-1, HISTOGRAM_BINS).astype(np.int32)


def choose_passages(order: PairsByLatent, context_length: int, seed: int = 0) -> dict[str, NDArray[np.int32]]:
    """Choose the centres of the passages, {top, quantile, random: [F, K]}, -1 where a latent has no more."""
    sizes = {"top": TOP, "quantile": len(QUANTILES), "random": RANDOM}
    F = order.n_latents
    chosen = {name: np.full((F, size), -1, np.int32) for name, size in sizes.items()}
    draws_FR = np.random.default_rng(seed).random((F, 4 * RANDOM))
    quantiles_Q = np.array(QUANTILES)
    _choose(order.ptr_F, order.token_Q, order.value_Q, context_length, quantiles_Q, draws_FR, *chosen.values())
    return chosen


@numba.njit(cache=True)
def _is_near(token, centres_K, context_length):  # type: ignore[no-untyped-def]
    for centre in centres_K:
        if centre >= 0 and token // context_length == centre // context_length and abs(token - centre) < WINDOW:
            return True
    return False


@numba.njit(cache=True, parallel=True)
def _choose(start_F, token_P, value_P, L, quantiles_Q, draws_FR, top_FK, quantile_FQ, random_FK):  # type: ignore[no-untyped-def]
    for i in numba.prange(start_F.size - 1):
        tokens = token_P[start_F[i] : start_F[i + 1]]
        if tokens.size == 0:
            continue
        ranked = tokens[np.argsort(-value_P[start_F[i] : start_F[i + 1]], kind="mergesort")]
        n_top = 0
        for token in ranked:
            if n_top == top_FK.shape[1]:
                break
            if not _is_near(token, top_FK[i], L):
                top_FK[i, n_top] = token
                n_top += 1
        n_quantile = 0
        for q in quantiles_Q:
            token = ranked[int((1.0 - q) * (tokens.size - 1) + 0.5)]
            if not _is_near(token, top_FK[i], L) and not _is_near(token, quantile_FQ[i], L):
                quantile_FQ[i, n_quantile] = token
                n_quantile += 1
        n_random = 0
        for draw in draws_FR[i]:
            token = tokens[int(draw * tokens.size)]
            if n_random < random_FK.shape[1] and not _is_near(token, random_FK[i], L):
                random_FK[i, n_random] = token
                n_random += 1


def _storable(piece: str) -> str:
    """Replace lone surrogates: some tokenizers give them for half a character, and no file format takes them."""
    return piece.encode("utf-8", "replace").decode()


def _lists(start_F: NDArray[Any], values_P: NDArray[Any]) -> Any:
    return pa.ListArray.from_arrays(pa.array(start_F, pa.int32()), pa.array(values_P))


def _without_gaps(values_FK: NDArray[Any], shown: NDArray[np.bool_], type: Any = None) -> Any:
    """Make a list per latent of the values that are shown."""
    shown_FK = np.broadcast_to(shown, values_FK.shape)
    start_F = np.concatenate([[0], np.cumsum(shown_FK.sum(1))])
    return pa.ListArray.from_arrays(pa.array(start_F, pa.int32()), pa.array(values_FK[shown_FK], type))
