"""Every plot of a run, defined once with Altair: for the PNG files and for the page.

ablation.py     The window x coefficient ablation as heat maps.
chart.py        Pieces of charts: rows of data, axes, and marks in the styles of arms.
consistency.py  Figures of features across tokens: over lag with both nulls, over latents, over firing rate.
drawn.py        Figures by name: what a page says of each (figures.yaml), what draws it, and what came of that.
labels.py       Places for the names beside the points of a chart, so that they cover as little as possible.
latent_data.py  Data of figures from the feature tables: latents with all of some columns, clusters with their style.
latents.py      Figures of what latents are like: the map of kinds, the share of each kind, the map of redundant
                latents.
matched.py      The matched comparison: ratios to the baseline with their intervals, at its L0 and at its FVU.
plot.py         A plot: panels of charts with views, steps and legend, as a PNG and as what plots.js draws.
position.py     The position x position matrix, profiles, eta² against mutual information, the offset test.
style.py        The look of every figure: one palette, one set of sizes, one way to tell arms apart without colour.
tradeoff.py     Arms of a run between a cost and a gain, and those that would stretch the view.
training.py     Training curves: logged values over the tokens that the arms read.
"""
