"""The feature browser of report.html.

columns.py   Which columns of the feature table the browser has, under which heading, and what they mean in a
             line.
data.py      What the feature browser's page carries of a run: text, feature tables, firings, all in a few
             compact islands.
pack.py      Arrays as bytes that a browser unpacks: one gzip of planes of bytes, and a table of what lies
             where.
section.py   The feature browser of report.html: every latent with the passages it fires on, searched and sorted
             in the page.
showcase.py  Which passages the browser shows first: some picked by a stated rule, some drawn at random, each
             kind called so.
tables.py    The saved passages (evaluation/latents/examples.py) as arrays, as the feature browser reads them.
"""
