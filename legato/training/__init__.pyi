from .bank import train_bank
from .config import SAEConfig, TrainConfig

__all__ = ["SAEConfig", "TrainConfig", "train_bank"]
