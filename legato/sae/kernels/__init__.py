"""Everything in numba that encoding and training need.

gradients.py  Kernels for architectures whose code is not just the pre-activation: thresholds per latent, gradients
              per pair.
held_top.py   The k largest of each token where what is held counts more: one pass along every run of a
              document.
leak.py       A leak along the sequence: h_t = l h_{t-1} + (1 - l) a_t, on active pairs and back, and on dense
              codes.
pairs.py      The exact sparse training step on a CPU: dense work only in the encoder's matmul, everything else
              on active latents.
"""
