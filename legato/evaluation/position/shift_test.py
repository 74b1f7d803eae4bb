"""Causal offset test: compare the codes of the same tokens when the text stands at another offset.

The same text is read again at other offsets, in two ways. `position_ids`: all position ids are shifted and nothing else
changes; a model with learned positions gives other activations, one with rotary positions must give the same, up to
rounding (a check of the pipeline). `prefix`: neutral tokens stand between BOS and the text, so positions shift in any
model and the context grows by the prefix; a feature that does not depend on position must survive this. Codes are
compared token by token on the text alone. An SAE with state along the sequence starts at the text in every reading.

Shape legend: B rows, L positions, D width, N = B * L flat tokens, F latents, P / Q active pairs of two readings.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from legato.common.errors import LegatoError, UsageError
from legato.data.activations import OUTLIER_FACTOR, ActivationBatch
from legato.data.language_model import LanguageModel
from legato.data.tokens import TokenSet
from legato.evaluation.consistency.persistence import mean
from legato.evaluation.sums.lag_pairs import Floats, LagPairs
from legato.sae.codes import SparseCodes
from legato.sae.protocol import EvaluableSAE

SHIFTS = (1, 8, 32)
MODES = ("position_ids", "prefix")
SHORTEST_TEXT = 8

# Rotating by other angles rounds differently: by 4e-7 of the norm in float32 on small models, .006 in bfloat16 on the
# demo model. Learned positions move the activation by tens of per cent.
ROUNDING = {torch.float32: 1e-4}
COARSE_ROUNDING = 0.03


@dataclass(frozen=True)
class OffsetResult:
    """Result. section: as in metrics.json. jaccard_F: column `offset_jaccard` of the feature table, NaN where a latent
    fires in neither reading."""

    section: dict[str, Any]
    jaccard_F: Floats


@dataclass(frozen=True)
class Agreement:
    """Agreement of two readings of the same tokens, NaN where undefined.

    jaccard_N: |A and B| / |A or B| of a token's two supports. cosine_N: of its two codes. jaccard_F: |A and B| /
    |A or B| of the tokens on which a latent fires.
    """

    jaccard_N: Floats
    cosine_N: Floats
    jaccard_F: Floats

    @classmethod
    def of(cls, first: SparseCodes, second: SparseCodes) -> "Agreement":
        B, L, F = first.shape
        assert second.shape == first.shape
        (token_P, latent_P, f_P), (token_Q, latent_Q, f_Q) = (
            (codes.token_P.numpy(), codes.latent_P.numpy(), codes.value_P.double().numpy()) for codes in (first, second)
        )
        _, at_P, at_Q = np.intersect1d(
            token_P * F + latent_P, token_Q * F + latent_Q, assume_unique=True, return_indices=True
        )

        def jaccard(index_P: NDArray[np.int64], index_Q: NDArray[np.int64], size: int) -> Floats:
            both = np.bincount(index_P[at_P], minlength=size).astype(np.float64)
            either = np.bincount(index_P, minlength=size) + np.bincount(index_Q, minlength=size) - both
            return np.divide(both, either, out=np.full(size, np.nan), where=either > 0)

        dot_N = np.bincount(token_P[at_P], f_P[at_P] * f_Q[at_Q], B * L)
        power_N = np.bincount(token_P, f_P**2, B * L) * np.bincount(token_Q, f_Q**2, B * L)
        cosine_N = np.divide(dot_N, np.sqrt(power_N), out=np.full(B * L, np.nan), where=power_N > 0)
        return cls(jaccard(token_P, token_Q, B * L), cosine_N, jaccard(latent_P, latent_Q, F))


def _read(
    model: LanguageModel,
    tokens: TokenSet,
    layer: int,
    site: str,
    shifts: tuple[int, ...],
    rows: int,
    length: int,
) -> tuple[ActivationBatch, dict[tuple[str, int], ActivationBatch]]:
    """Read the text as it is, and by (mode, shift); the same positions are valid in all of them."""
    tokens_BL, doc_BL = tokens.tokens_BL[:rows, :length].long(), tokens.doc_BL[:rows, :length].int()
    acts = {("", 0): model.activations(tokens_BL, layer, site)}
    for shift in shifts if model.positions != "fixed" else ():
        acts["position_ids", shift] = model.activations(tokens_BL, layer, site, first_position=shift)
    n_bos = int(tokens.bos)
    # The line break; the most frequent token of the text where the tokenizer has none.
    ids = model.tokenizer("\n", add_special_tokens=False)["input_ids"]
    has_break = bool(ids) and ids[-1] not in model.special_token_ids
    neutral = int(ids[-1] if has_break else tokens.tokens_BL[tokens.mask_BL].mode().values)
    for shift in shifts:
        prefix_BS = tokens_BL.new_full((len(tokens_BL), shift), neutral)
        longer_BL = torch.cat([tokens_BL[:, :n_bos], prefix_BS, tokens_BL[:, n_bos:]], 1)
        acts_BLD = model.activations(longer_BL, layer, site)
        acts["prefix", shift] = torch.cat([acts_BLD[:, :n_bos], acts_BLD[:, n_bos + shift :]], 1)
    mask_BL = tokens.mask_BL[:rows, :length]
    if not bool(mask_BL.any()):
        raise LegatoError("the rows of the offset test hold no text: every token is special")
    acts = {key: acts_BLD.cpu() for key, acts_BLD in acts.items()}
    norms = {key: acts_BLD.float().norm(dim=-1) for key, acts_BLD in acts.items()}
    limit = OUTLIER_FACTOR * norms["", 0][mask_BL].median()
    for norm_BL in norms.values():
        mask_BL = mask_BL & (norm_BL <= limit)
    batches = {key: ActivationBatch(acts_BLD, mask_BL, doc_BL, tokens_BL) for key, acts_BLD in acts.items()}
    return batches.pop(("", 0)), batches


def _movement(own: ActivationBatch, other: ActivationBatch) -> dict[str, float | None]:
    x_ND, moved_ND = (batch.acts_BLD[own.mask_BL].double() for batch in (own, other))
    step_N = (moved_ND - x_ND).norm(dim=-1)
    variance = float((x_ND - x_ND.mean(0)).square().sum())
    return {
        "movement": float((step_N / x_ND.norm(dim=-1)).mean()),
        "variance_moved": float(step_N.square().sum()) / variance if variance > 0 else None,
    }


def _other_token(batch: ActivationBatch, seed: int = 0) -> NDArray[np.int64]:
    """Draw for each flat token another valid token of its document in its row, each once; -1 where there is none."""
    stretch_N = LagPairs.of(batch.mask_BL, batch.doc_BL, (1,)).stretch_N
    rng = np.random.default_rng(seed)
    other_N = np.full(stretch_N.size, -1, np.int64)
    valid = np.flatnonzero(stretch_N >= 0)
    for members in np.split(valid, np.flatnonzero(np.diff(stretch_N[valid])) + 1):
        if len(members) > 1:
            other_N[members] = np.roll(members, rng.integers(1, len(members)))
    return other_N


@torch.no_grad()
def offset_test(
    saes: Mapping[str, EvaluableSAE],
    model: LanguageModel,
    tokens: TokenSet,
    *,
    layer: int,
    site: str = "resid_post",
    shifts: Sequence[int] = SHIFTS,
    rows: int = 32,
) -> dict[str, OffsetResult]:
    """Compare each SAE's codes of the first `rows` rows with those of the same text at offsets `shifts`.

    Rows are cut where the largest shift would leave the model's context. Per mode and shift: `jaccard` and `cosine`
    (means over valid tokens where they are defined), `jaccard_null` (against another token of the same document in the
    other reading: the value from persistence alone), `unchanged` (share of the firing latents that fire on exactly the
    same tokens), and the yardsticks `movement` = mean ||x' - x|| / ||x|| and `variance_moved` = sum ||x' - x||^2 / sum
    ||x - mean||^2, an FVU.
    jaccard_F is that of the largest shift, by position ids where positions are learned, else by prefix.
    Raises UsageError for shifts that the context has no room for, LegatoError where no position is valid.
    """
    shifts = tuple(shifts)
    if not shifts or min(shifts) < 0:
        raise UsageError(f"shifts must be 0 or more, not {list(shifts)}")
    length = min(tokens.context_length, model.max_context - max(shifts))
    if length < min(SHORTEST_TEXT, tokens.context_length):
        raise UsageError(
            f"{model.name} has {model.max_context} positions, too few for text shifted by {max(shifts)}: shift less"
        )
    own, readings = _read(model, tokens, layer, site, shifts, rows, length)
    column = ("position_ids" if model.positions == "absolute" else "prefix", max(shifts))
    stands_still = None
    if model.positions == "relative":  # then shifted position ids must not change the activations
        shifted = [batch for (mode, _), batch in readings.items() if mode == "position_ids"]
        movement = max(_movement(own, batch)["movement"] or 0.0 for batch in shifted)
        tolerance = ROUNDING.get(model.dtype, COARSE_ROUNDING)
        stands_still = {"movement": movement, "tolerance": tolerance, "holds": movement <= tolerance}
    shared = {
        "rows": len(own.mask_BL),
        "positions": length,
        "tokens": int(own.mask_BL.sum()),
        "model_positions": model.positions,
        "stands_still": stands_still,
    }
    partner_N = _other_token(own)
    results = {}
    for name, sae in saes.items():
        before = sae.encode_sparse(own)
        modes: dict[str, Any] = {mode: None for mode in MODES}
        jaccard_F = np.full(before.shape[2], np.nan)
        for (mode, shift), batch in readings.items():
            after = sae.encode_sparse(batch)
            agreement = Agreement.of(before, after)
            token_P = torch.from_numpy(partner_N)[after.token_P]
            kept_P = token_P >= 0
            moved = SparseCodes(token_P[kept_P], after.latent_P[kept_P], after.value_P[kept_P], after.shape)
            null = Agreement.of(before, moved)
            finite_F = agreement.jaccard_F[np.isfinite(agreement.jaccard_F)]
            entry = {
                "shift": shift,
                "jaccard": mean(agreement.jaccard_N),
                "jaccard_null": mean(null.jaccard_N),
                "cosine": mean(agreement.cosine_N),
                "unchanged": mean((finite_F == 1.0).astype(np.float64)),
                **_movement(own, batch),
            }
            modes[mode] = [*(modes[mode] or []), entry]
            if (mode, shift) == column:
                jaccard_F = agreement.jaccard_F
        results[name] = OffsetResult({**shared, **modes}, jaccard_F)
    return results
