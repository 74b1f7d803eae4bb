"""Synthetic activations with known sources, to test SAEs and metrics.

    legato synthetic --out_dir synth_1
    legato synthetic --out_dir synth_2 --arms hysteresis,hysteresis:shuffled --sources persistent:128,iid:128 --seeds 5

A bed holds sources with a planted rate, persistence (correlation of on/off between adjacent tokens), position profile,
topic and magnitude, more of them than dimensions, under dense noise. Arms of `--arms` are those of `experiment.py`;
NAME:shuffled trains NAME on the same activations with each document's tokens in another order: an advantage that is
left does not come from time.

To test an idea of your own, give `study` any sparsity or temporal term as an arm beside the baseline:

    from legato.sae.architectures import BatchTopK
    from legato.synthetic import FAMILIES, BedConfig, StudyConfig, study
    from legato.training.config import SAEConfig

    bed = BedConfig(families=((FAMILIES["persistent"], 256),), noise=0.35)
    arms = [SAEConfig("baseline", BatchTopK(6), 256), SAEConfig("mine", MySparsity(6), 256)]
    results = study(bed, arms, StudyConfig(seeds=(0, 1, 2)))
    results["arms"]["mine"]["advantage"]["decoder"]["persistent"]   # MCC over the baseline's, with its 95 % interval

A new source is a `Family` of ranges. A new metric: `Bed.build(bed).held_out` holds the true codes (`codes.dense()`), to
be compared with `.sources.planted(length)`. An SAE from elsewhere: `Judgement.of(sae, bed)`. Each side of a bed is an
activation source like a store, so `train_bank` and `legato.evaluate` take it directly.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
