"""The protocol of SAEs that can be evaluated."""

from typing import Protocol

from torch import Tensor

from legato.data.activations import ActivationBatch
from legato.sae.codes import SparseCodes


class Weights(Protocol):
    """The weights SAEBench looks at: W_enc (D, F), b_enc (F), W_dec (F, D)."""

    @property
    def W_enc(self) -> Tensor: ...
    @property
    def b_enc(self) -> Tensor: ...
    @property
    def W_dec(self) -> Tensor: ...


class EvaluableSAE(Weights, Protocol):
    """An SAE that can be evaluated: its weights, and raw activations in and out."""

    def encode_sparse(self, batch: ActivationBatch) -> SparseCodes: ...
    def decode_sparse(self, codes: SparseCodes) -> Tensor: ...
