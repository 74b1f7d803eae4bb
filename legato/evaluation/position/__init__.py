"""Section `position`: what latents know of the place in the context.

attachment.py  How far codes depend on the position in the context: variance explained, mutual information,
               profiles, the matrix.
shift_test.py  Causal offset test: do the codes of the same tokens stay when the text stands at another offset?
"""
