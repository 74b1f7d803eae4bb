"""The feature browser of report.html.

columns.py   Columns of the feature table in the browser, their headings, and their meaning in a line.
data.py      Data of a run in the feature browser's page: text, feature tables, firings, in a few compact islands.
pack.py      Arrays as bytes that a browser unpacks: one gzip of planes of bytes, and a table of what lies where.
showcase.py  Passages that the browser shows first: some picked by a stated rule, some drawn at random, and marked so.
tables.py    The saved passages (evaluation/latents/examples.py) as arrays, as the feature browser reads them.
"""
