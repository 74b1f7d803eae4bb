from .config import ExperimentConfig
from .evaluate import evaluate_arms
from .train import train_arms

__all__ = ["ExperimentConfig", "evaluate_arms", "train_arms"]
