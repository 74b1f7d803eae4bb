"""What is recorded latent by latent: the table, passages, tokens, neighbours.

burstiness.py  Whether a latent fires in bursts: the gaps between its firings, against shuffled firings.
examples.py    Passages: what every latent does on real text, saved so that a person can look at it.
logits.py      The tokens whose logits a latent's direction raises and lowers most.
neighbours.py  Latents that are like a latent: by the direction they write, and by where they fire.
table.py       The feature table: one row per latent, written as features/<arm>.parquet.
tokens.py      How much the current token says about a latent: sparse counts of (latent, token), and what
               follows from them.
"""
