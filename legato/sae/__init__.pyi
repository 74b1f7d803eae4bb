from .autoencoder import SparseAutoencoder
from .codes import SparseCodes
from .protocol import EvaluableSAE
from .segments import Segments

__all__ = ["EvaluableSAE", "Segments", "SparseAutoencoder", "SparseCodes"]
