"""Runs beside each other: comparison.html and its figures.

figures.py  Figures that set several runs side by side, a colour per run, drawn from their saved results.
page.py     comparison.html: several runs side by side in one self-contained page, with its figures, from saved
            results alone.
recipes.py  A recipe of a run with its seeds: one row, line or mark in a comparison of runs.
"""
