"""What all sections add up.

accumulators.py  Streaming sums from which every consistency and position metric is computed.
code_buffer.py   Codes of a capped number of rows, kept for what needs a second look: the position matrix and
                 the bootstrap.
lag_pairs.py     Which positions and pairs of a batch count, and its codes by latent: what every metric along
                 the sequence reads.
"""
