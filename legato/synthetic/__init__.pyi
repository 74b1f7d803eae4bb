from .bed import Bed, BedConfig
from .command import Synthetic
from .recovery import Match, code_correlation, decoder_cosine
from .sources import FAMILIES, Family, Sources
from .study import Judgement, StudyConfig, study, train_on

__all__ = [
    "FAMILIES",
    "Bed",
    "BedConfig",
    "Family",
    "Judgement",
    "Match",
    "Sources",
    "StudyConfig",
    "Synthetic",
    "code_correlation",
    "decoder_cosine",
    "study",
    "train_on",
]
