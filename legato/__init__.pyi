from .common.errors import LegatoError, UsageError
from .evaluation import metrics
from .evaluation.one_pass import evaluate
from .sae.autoencoder import SparseAutoencoder

__all__ = ["LegatoError", "SparseAutoencoder", "UsageError", "evaluate", "metrics"]
