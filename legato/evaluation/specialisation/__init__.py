"""Section `specialisation`: which kinds of latents there are.

clustering.py   Clusters of latents by their descriptors: standardised, k chosen by a stated rule, and how far
                to trust them.
descriptors.py  What a latent is described by when its kind is asked for, and the rule that names kinds.
kinds.py        What kinds of latents an SAE has: clusters of their descriptors, named, with a map of them.
"""
