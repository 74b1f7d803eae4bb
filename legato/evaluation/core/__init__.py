"""Section `core`: reconstruction, sparsity, and the loss of the language model.

reconstruction.py  Core metrics: how well the reconstruction stands for the activation, and how sparse the codes
                   are.
saebench.py        The numbers of SAEBench 0.6.0's `core` evaluation, by its formulas, right or wrong.
splice.py          What the language model loses when a site's output is replaced: next-token loss and KL
                   divergence, per token.
"""
