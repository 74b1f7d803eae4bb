from . import metrics
from .one_pass import evaluate

__all__ = ["evaluate", "metrics"]
