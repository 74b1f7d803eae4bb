"""The autoencoder: encode, decode, load, save.

autoencoder.py  The trained SAE: raw activations in, raw activations out.
codes.py        Sparse codes: the active (token, latent, value) triples of a batch of sequences.
groups.py       Nested groups of latents, by their share of the dictionary.
partition.py    One SAE trained by several ranks: what each of them computes and holds.
protocol.py     The protocol of SAEs that can be evaluated.
segments.py     Segments of a batch: tokens that may be compared with each other.
architectures/  What turns pre-activations into codes: one class per architecture.
formats/        Saved SAEs of other tools and of Legato, read and written.
kernels/        Everything in numba that encoding and training need.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
