"""The measuring instrument: judge any SAE in one pass over held-out activations.

controls.py      Controls: trained SAEs whose codes are changed afterwards, without training.
one_pass.py      Judge every SAE of a bank in one pass over held-out activations.
metrics.py       Metrics as pure functions on dense codes, by the same code that judges SAEs in `legato.evaluate`.
sae_sums.py      All sums about one SAE, and the adding of a batch to them.
consistency/     Section `consistency`: how long latents stay on, with intervals.
core/            Section `core`: reconstruction, sparsity, and the loss of the language model.
latents/         Records of single latents: the table, passages, tokens, neighbours.
position/        Section `position`: dependence of latents on the position in the context.
redundancy/      Section `redundancy`: latents that stand for the same thing.
specialisation/  Section `specialisation`: kinds of latents.
sums/            Sums that all sections share.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
