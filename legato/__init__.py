"""Legato: sparse autoencoders whose features hold across the tokens of a text, and the instrument that judges them."""

from legato.common.errors import LegatoError, UsageError
from legato.evaluation import metrics
from legato.evaluation.evaluate import evaluate
from legato.sae.autoencoder import SparseAutoencoder

__all__ = ["LegatoError", "SparseAutoencoder", "UsageError", "evaluate", "metrics"]
