"""Section `redundancy`: latents that stand for the same thing.

classes.py   Candidate pairs of latents, and the class of each (pairs.py defines the classes).
examples.py  Examples for a person to look at: contexts with the firing tokens of a pair marked, and the clustered heat
             map.
kernels.py   Loops over sparse codes for sums.py, which explains the arrays.
pairs.py     Redundancy across positions: pairs of latents with one meaning, at the same token, at other positions, or
             later.
sums.py      Sums over pairs of latents at every lag, and the tests on them.
table.py     Files of the section redundancy.
"""
