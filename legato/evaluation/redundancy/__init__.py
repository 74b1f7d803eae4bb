"""Section `redundancy`: latents that stand for the same thing.

classes.py   Which pairs of latents are worth measuring, and what class each belongs to (redundancy.py says what
             they mean).
examples.py  What a person looks at: contexts with the firing tokens of a pair marked, and the clustered heat
             map.
kernels.py   Loops over sparse codes behind sums.py; what each array means is said there.
pairs.py     Redundancy across positions: pairs of latents that do each other's work, at the same token,
             elsewhere, or later.
sums.py      Sums over pairs of latents at every lag, and the tests on them.
table.py     What redundancy leaves on disk and in notes.txt.
"""
