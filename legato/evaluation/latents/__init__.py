"""Records of single latents: the table, passages, tokens, neighbours.

burstiness.py  Burstiness of latents: the gaps between firings, compared with shuffled firings.
examples.py    Passages: the activations of every latent on real text, saved so that a person can look at them.
logits.py      The tokens whose logits a latent's direction raises and lowers most.
neighbours.py  Neighbours of a latent: latents of similar decoder direction, and latents that fire with it.
table.py       The feature table: one row per latent, written as features/<arm>.parquet.
tokens.py      Information of a latent about the current token, from sparse counts of (latent, token).
"""
