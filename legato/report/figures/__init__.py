"""The figures, drawn by matplotlib, and the data of each.

ablation.py     Figures of the window x coefficient ablation and of what consistency costs in reconstruction.
consistency.py  Figures of how features hold across tokens: over lag with both nulls, over latents, over firing
                rate.
latent_data.py  What figures and plots read of the feature tables: latents with all of some columns, clusters
                with their style.
latents.py      Figures of what latents are like: the map of kinds, the share of each kind, the map of redundant
                latents.
matched.py      The matched comparison as a figure: ratios to the baseline with their intervals, at its L0 and
                at its FVU.
missing.py      What a figure raises when the run did not save what it shows.
position.py     Figures of position: the position x position matrix, profiles, eta² against mutual information,
                the offset test.
style.py        How every figure looks: one palette, one set of sizes, one way to tell arms apart without
                colour.
tradeoff.py     Where the arms of a run lie between a cost and a gain, and which of them would stretch the view.
training.py     Figures of how the arms trained and what they reconstruct at which sparsity.
"""
