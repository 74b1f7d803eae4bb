"""Everything in numba that encoding and training need.

gradients.py  The decoder, gradients per pair and per latent, and the optimiser's step.
held_top.py   The k largest of each token where what is held counts more: one pass along every run of a document.
leak.py       A leak along the sequence: h_t = l h_{t-1} + (1 - l) a_t, on active pairs and back.
pairs.py      The active pairs: found, computed exactly, kept and sorted.
"""
