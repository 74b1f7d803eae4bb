"""The same plots for the page, drawn by plotly.

curves.py    Interactive plots of curves: training, and how codes hold over lag against both nulls.
latents.py   Interactive plots of latents, a view per arm: half-life against firing rate, position measures, the
             map of kinds.
maps.py      Interactive heat maps: position by position, and the clustered lagged correlation of redundant
             latents.
spec.py      What an interactive plot of the page is made of; plots.js draws it with plotly.js.
tradeoff.py  Interactive plots of what each arm costs: FVU against L0, consistency against FVU with the Pareto
             front.
"""
