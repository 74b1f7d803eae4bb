"""The instrument: one pass over held-out activations judges any SAE.

controls.py      Controls: what is left of a result when what it claims to measure is taken away, or bought
                 without training.
evaluate.py      One pass over held-out activations that judges every SAE of a bank.
metrics.py       Each metric as a pure function on dense codes, by the same code that judges SAEs in
                 `legato.evaluate`.
sae_sums.py      All sums about one SAE, and how a batch adds to them.
consistency/     Section `consistency`: how long latents stay on, with intervals.
core/            Section `core`: reconstruction, sparsity, and the loss of the language model.
latents/         What is recorded latent by latent: the table, passages, tokens, neighbours.
position/        Section `position`: what latents know of the place in the context.
redundancy/      Section `redundancy`: latents that stand for the same thing.
specialisation/  Section `specialisation`: which kinds of latents there are.
sums/            What all sections add up.
"""

from legato.evaluation import metrics
from legato.evaluation.evaluate import evaluate

__all__ = ["evaluate", "metrics"]
