"""The page: its templates, tables, and what it carries inside itself.

latent_tables.py  Cards and tables of latents on the page: redundant pairs with their contexts, clusters with their
                  share.
plots.js          Draws the plots with Vega-Lite, each once it comes near the window.
render.py         The frame of every page: colours that follow the light or dark scheme, figures, navigation, sortable
                  tables.
tables.py         The tables of a run's page: arms side by side with intervals, and the matched comparison with its
                  targets.
"""
