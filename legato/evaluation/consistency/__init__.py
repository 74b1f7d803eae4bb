"""Section `consistency`: how long latents stay on, with intervals.

bootstrap.py    Intervals for consistency metrics by a bootstrap over documents.
groups.py       The parts of a dictionary that consistency is reported for apart: bins of the firing rate,
                groups of the objective.
persistence.py  Temporal consistency metrics: autocorrelation, kappa, their closed-form nulls, and what follows
                from them.
"""
