"""Sums that all sections share.

accumulators.py  Streaming sums from which every consistency and position metric is computed.
code_buffer.py   Codes of a limited number of rows, kept for a second pass: position matrix, bootstrap, redundancy,
                 examples.
lag_pairs.py     Valid positions and pairs of a batch, and its codes by latent: the input of every metric along the
                 sequence.
"""
