"""Architectures turn pre-activations into codes: one class each, in a file of its own.

base.py             The base of every architecture: its training, dense and sparse codes, and part of a file.
batchtopk.py        BatchTopK: one budget for all tokens of a batch.
forward.py          One forward pass of an SAE in training, and the way back.
gated.py            Gated: one path decides whether a latent is active, another how much.
hysteresis.py       Hysteresis: a Schmitt trigger along the sequence.
hysteresis_topk.py  Hysteresis inside each token's own budget.
jumprelu.py         JumpReLU: a learned threshold per latent.
persistent.py       Persistent: every latent leaks its past into its present.
preactivations.py   Pre-activations: the encoder's dense output, and exact values where they are asked for.
relu.py             ReLU with an L1 penalty.
topk.py             TopK: a budget for each token.
window_topk.py      The budget is spent on stretches: a latent is chosen for a whole window of tokens.

Every module here is imported, so that an architecture is known by its name once its file lies here.
"""

import importlib
import pkgutil

from legato.sae.architectures.base import Architecture, all_architectures, architecture_named, architectures
from legato.sae.architectures.batchtopk import BatchTopK
from legato.sae.architectures.gated import Gated
from legato.sae.architectures.hysteresis import Hysteresis
from legato.sae.architectures.hysteresis_topk import HysteresisTopK
from legato.sae.architectures.jumprelu import JumpReLU
from legato.sae.architectures.persistent import Persistent
from legato.sae.architectures.preactivations import Preactivations
from legato.sae.architectures.relu import ReLU
from legato.sae.architectures.topk import TopK
from legato.sae.architectures.window_topk import WindowTopK

__all__ = [
    "Architecture",
    "BatchTopK",
    "Gated",
    "Hysteresis",
    "HysteresisTopK",
    "JumpReLU",
    "Persistent",
    "Preactivations",
    "ReLU",
    "TopK",
    "WindowTopK",
    "all_architectures",
    "architecture_named",
    "architectures",
]

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
