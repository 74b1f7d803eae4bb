"""Section `position`: dependence of latents on the position in the context.

attachment.py  Dependence of codes on the position in the context: variance explained, mutual information, profiles, the
               matrix.
shift_test.py  Causal offset test: compare the codes of the same tokens when the text stands at another offset.
"""
