"""Tables, figures, notes and pages, drawn from saved results only.

build.py     Everything that is drawn and written from a run's saved results.
registry.py  Every static figure of a run, drawn from what the run folder holds and nothing else.
run_page.py  report.html: one self-contained page per run, rebuilt from the saved results alone.
browser/     The feature browser of report.html.
figures/     The figures, drawn by matplotlib, and the data of each.
page/        The page: its templates, tables, and what it carries inside itself.
plots/       The same plots for the page, drawn by plotly.
runs/        Runs beside each other: comparison.html and its figures.
text/        The report's words: notes, verdicts, and tables as text.
"""
