"""Every plot of a run, defined once with Altair: for the PNG files and for the page.

ablation.py     The window x coefficient ablation as heat maps.
chart.py        Pieces of charts: rows of data, axes, and marks in the styles of arms.
consistency.py  How features hold across tokens: over lag with both nulls, over latents, over firing rate.
labels.py       Where the names beside points stand, so that they cover as little as possible.
latent_data.py  What plots read of the feature tables: latents with all of some columns, clusters with their style.
latents.py      What latents are like: the map of kinds, the share of each kind, the map of redundant latents.
matched.py      The matched comparison: ratios to the baseline with their intervals, at its L0 and at its FVU.
missing.py      What a plot raises when the run did not save what it shows.
plot.py         A plot: panels of charts with views, steps and legend, as a PNG and as what plots.js draws.
position.py     The position x position matrix, profiles, eta² against mutual information, the offset test.
style.py        How every figure looks: one palette, one set of sizes, one way to tell arms apart without colour.
tradeoff.py     Where the arms of a run lie between a cost and a gain, and which of them would stretch the view.
training.py     How the arms trained: what was logged over the tokens they read.
"""
