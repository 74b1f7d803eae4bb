"""Tables, figures, notes and pages, drawn from saved results only.

build.py     Everything that is drawn and written from a run's saved results.
registry.py  Every figure of a run, drawn from what the run folder holds and nothing else.
run_page.py  report.html: one self-contained page per run, rebuilt from the saved results alone.
browser/     The feature browser of report.html.
figures/     Every plot, defined once with Altair: for the PNG files and for the page.
page/        The page: its templates, tables, and what it carries inside itself.
runs/        Runs beside each other: comparison.html and its figures.
text/        The report's words: notes, verdicts, and tables as text.
"""
