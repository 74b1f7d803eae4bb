"""Which latents of a token may be active: a sparsity turns pre-activations into active pairs."""

from legato.sparsity.base import Sparsity
from legato.sparsity.batchtopk import BatchTopK
from legato.sparsity.gated import Gated
from legato.sparsity.hysteresis import Hysteresis
from legato.sparsity.hysteresis_topk import HysteresisTopK
from legato.sparsity.jumprelu import JumpReLU
from legato.sparsity.persistent import Persistent
from legato.sparsity.preactivations import Preactivations
from legato.sparsity.relu import ReLU
from legato.sparsity.topk import TopK
from legato.sparsity.window_topk import WindowTopK

__all__ = [
    "BatchTopK",
    "Gated",
    "Hysteresis",
    "HysteresisTopK",
    "JumpReLU",
    "Persistent",
    "Preactivations",
    "ReLU",
    "Sparsity",
    "TopK",
    "WindowTopK",
]
