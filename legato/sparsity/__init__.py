"""Which latents of a token may be active: a sparsity turns pre-activations into active pairs."""

from legato.sparsity.base import Sparsity
from legato.sparsity.batchtopk import BatchTopK
from legato.sparsity.hysteresis import Hysteresis
from legato.sparsity.preactivations import Preactivations
from legato.sparsity.relu import ReLU
from legato.sparsity.topk import TopK

__all__ = ["BatchTopK", "Hysteresis", "Preactivations", "ReLU", "Sparsity", "TopK"]
