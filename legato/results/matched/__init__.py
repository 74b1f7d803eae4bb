"""Methods at equal L0 and FVU.

comparability.py  Which runs compare number by number, and in what they differ: read from the configurations
                  they saved.
compare.py        The matched comparison: how consistent each method is at the baseline's L0, and at the
                  baseline's FVU.
points.py         What saved SAEs contribute to a matched comparison, and interpolation along a sweep.
statistics.py     Means, ratios and their intervals over the seeds of two methods, paired seed by seed.
"""
