"""Temporal consistency terms: what makes a latent hold across the tokens of a sequence.

A term has two faces. `loss` is the definition: a pure, differentiable function of dense codes. `sparse` is the same
value with its gradient by the active codes alone, at a cost that does not depend on the window. Tests hold the two
equal. Codes are always rescaled by their decoder norm, so neither can be moved by trading encoder scale for decoder
scale. Each term looks at the leading `slow_fraction` of the latents; windows and lags never leave a run
(`SequenceLayout`).
"""

from legato.consistency_losses.contrastive import Contrastive
from legato.consistency_losses.diagnostics import collapse, group_diagnostics
from legato.consistency_losses.differences import FusedLasso, Slowness
from legato.consistency_losses.position import PositionPenalty
from legato.consistency_losses.term import TemporalTerm, TermValue, leading_count
from legato.consistency_losses.tsae import TsaeContrastive, tsae_objective
from legato.consistency_losses.windows import WindowGroupLasso, WindowVariance

__all__ = [
    "Contrastive",
    "FusedLasso",
    "PositionPenalty",
    "Slowness",
    "TemporalTerm",
    "TermValue",
    "TsaeContrastive",
    "WindowGroupLasso",
    "WindowVariance",
    "collapse",
    "group_diagnostics",
    "leading_count",
    "tsae_objective",
]
