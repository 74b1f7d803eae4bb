"""Section `specialisation`: kinds of latents.

clustering.py   Clusters of latents by their standardised descriptors, with k chosen by a stated rule, and measures of
                trust.
descriptors.py  Descriptors of a latent for its kind, and the rule that names kinds.
kinds.py        Kinds of latents of an SAE: named clusters of their descriptors, and a map.
"""
