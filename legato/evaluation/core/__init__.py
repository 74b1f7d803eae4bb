"""Section `core`: reconstruction, sparsity, and the loss of the language model.

reconstruction.py  Core metrics: quality of the reconstruction, sparsity of the codes, loss of the language model.
saebench.py        The numbers of SAEBench 0.6.0's `core` evaluation, by its own formulas, even where they are wrong.
splice.py          Loss of the language model when a site's output is replaced: next-token loss and KL divergence, per
                   token.
"""
