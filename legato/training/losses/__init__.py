"""Temporal consistency terms: what makes a latent hold across the tokens of a sequence.

A term has two faces. `loss` is the definition: a pure, differentiable function of dense codes. `sparse` is the same
value with its gradient by the active codes: by autograd, unless the term has a form of its own whose cost does not
depend on the window. Tests hold the two equal. Codes are always rescaled by their decoder norm, so neither can be moved
by trading encoder scale for decoder scale. Each term looks at the leading `slow_fraction` of the latents; windows and
lags never leave a run (`Segments`). Every module here is imported, so that a term is known by its name once its file
lies here.

    base.py                The base of every temporal term, the register of them, and the parts they share.
    collapse.py            Checks that a temporal term improves its latents and does not only switch them off.
    contrastive.py         The contrastive term as the paper states it.
    fused_lasso.py         Fused lasso: the total variation of a latent's codes along the sequence.
    info_nce.py            InfoNCE between matched tokens, dense and from the active pairs alone.
    position_penalty.py    The term against codes that depend on the position in the row.
    slowness.py            Slowness: differences between tokens of one run.
    tsae.py                The objective of the published T-SAE code, for parity runs.
    window_group_lasso.py  Group lasso over windows: a latent's whole window is on or off.
    window_variance.py     Variance inside sliding windows.
"""

import importlib
import pkgutil

from legato.sae.groups import leading_count
from legato.training.losses.base import TemporalLoss, TermValue, losses
from legato.training.losses.collapse import collapse, group_diagnostics
from legato.training.losses.contrastive import Contrastive
from legato.training.losses.fused_lasso import FusedLasso
from legato.training.losses.position_penalty import PositionPenalty
from legato.training.losses.slowness import Slowness
from legato.training.losses.tsae import TsaeContrastive
from legato.training.losses.window_group_lasso import WindowGroupLasso
from legato.training.losses.window_variance import WindowVariance

__all__ = [
    "Contrastive",
    "FusedLasso",
    "PositionPenalty",
    "Slowness",
    "TemporalLoss",
    "TermValue",
    "TsaeContrastive",
    "WindowGroupLasso",
    "WindowVariance",
    "collapse",
    "group_diagnostics",
    "leading_count",
    "losses",
]

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
