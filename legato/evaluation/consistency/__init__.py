"""Section `consistency`: how long latents stay on, with intervals.

bootstrap.py    Intervals for consistency metrics by a bootstrap over documents.
groups.py       Parts of a dictionary with consistency numbers of their own: bins of the firing rate, groups of the
                objective.
persistence.py  Temporal consistency metrics: autocorrelation, kappa, their closed-form nulls, and numbers derived from
                them.
"""
