"""The pipeline: configuration, arms, training, evaluation, checkpoints.

arms.py            The arms of an experiment: which SAEs the bank trains, and what each is in the results.
checkpoint.py      What a run needs to go on where it was cut off: <out_dir>/checkpoint/.
config.py          The configuration of an experiment: one small frozen record per stage.
evaluate.py        The stages of experiment.py, each from its config and what the stage before it gives.
evaluate_saved.py  `legato evaluate`: saved SAEs, whoever trained them, through the whole evaluation of
                   experiment.py.
inputs.py          What an experiment reads: model, text, activations and where they came from.
presets.py         Presets of the experiment: by name, the options in which each differs from the demo's.
recipes.py         The recipes of --temporal by name: what each changes about the baseline.
run.py             The whole experiment, one call per stage: `legato run`, and experiment.py.
run_log.py         What a person and a tracker see of a running stage.
train.py           The training stage of experiment.py: the bank in one or several passes, saved, and gone on
                   with after a cut.
"""

from legato.experiment.config import ExperimentConfig
from legato.experiment.evaluate import evaluate_arms
from legato.experiment.train import train_arms

__all__ = ["ExperimentConfig", "evaluate_arms", "train_arms"]
