"""The report's words: notes, verdicts, and tables as text.

arm_table.py       The overview of a run: a row per arm, the quantities that every table of it shows, and how
                   they are written.
latents.py         What the latents of a run's main SAEs are like, in words: their kinds, their redundancy, the
                   offset test.
matched_tables.py  The matched comparison as tables and sentences, for the terminal and for notes.txt.
notes.py           What a run's numbers say in words, with what they do not say: notes.txt.
summary.py         What a reader asks of a run first, each answered in a sentence or two from the saved results.
verdict.py         Each method of a run against the baseline: does it hold its features longer, at what cost,
                   and what makes the gain.
"""
