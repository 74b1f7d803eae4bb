"""Methods at equal L0 and FVU.

comparability.py  Comparability of runs, and their differences, from the configurations they saved.
compare.py        Matched comparison: consistency of each method at the baseline's L0, and at the baseline's FVU.
points.py         Points of a matched comparison, read from saved SAEs, and interpolation along a sweep.
statistics.py     Means, ratios and their intervals over the seeds of two methods, paired seed by seed.
"""
