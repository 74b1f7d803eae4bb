"""The pipeline: configuration, arms, training, evaluation, checkpoints.

arms.py            The arms of an experiment: the SAEs to train.
checkpoint.py      Saved state of a run, to go on where it was cut off: <out_dir>/checkpoint/.
config.py          The configuration of an experiment: one small frozen record per stage.
estimate.py        The time that the stages of an experiment will take on this machine, from rates measured in the first
                   seconds.
evaluate.py        Evaluation stage of experiment.py, and the bank of trained arms that it takes.
evaluate_saved.py  `legato evaluate`: saved SAEs, whoever trained them, through the whole evaluation of experiment.py.
inputs.py          Inputs of an experiment: model, text, activations and their origin.
presets.py         Presets of the experiment: by name, the options that differ from the demo's.
recipes.py         The recipes of --temporal by name: changes to the baseline.
run.py             The whole experiment, one call per stage: `legato run`, and experiment.py.
run_log.py         Logs of a running stage for people and trackers.
train.py           Training stage of experiment.py: train the bank in passes, save it, continue after a stop.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
