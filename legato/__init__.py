"""Legato: sparse autoencoders whose features hold across the tokens of a text, and the instrument that judges them."""

from legato import metrics
from legato.errors import LegatoError, UsageError
from legato.evaluation.evaluate import evaluate
from legato.sae import SparseAutoencoder

__all__ = ["LegatoError", "SparseAutoencoder", "UsageError", "evaluate", "metrics"]
