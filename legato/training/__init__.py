"""Training a bank of SAEs on the same activation batches.

bank.py     The one training loop: a bank of SAEs that learn from the same batches, in passes that fit into memory.
config.py   Configuration of one SAE of a bank, and of the bank's training.
step.py     One exact forward and backward pass of an SAE on a batch.
trainer.py  One SAE of a bank in training: its weights, optimiser, learning rate, guard and files.
losses/     Temporal consistency terms: what makes a latent hold across the tokens of a sequence.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
