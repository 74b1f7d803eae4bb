"""The report's words: notes, verdicts, and tables as text. The sentences stand in *.txt.j2, the numbers come from here.

arm_table.py       The overview of a run: a row per arm, the quantities that every table of it shows, and how
                   they are written.
latents.py         Tell what the latents of a run's main SAEs are like: their kinds, their redundancy, the offset
                   test.
matched_tables.py  The matched comparison as tables and sentences, for the terminal and for notes.txt.
notes.py           Write notes.txt: what a run's numbers say in words, with what they do not say.
summary.py         Answer what a reader asks of a run first, each in a sentence or two from the saved results.
verdict.py         Compare each method of a run with the baseline: is its kappa excess higher, at what cost, and
                   what makes the gain.
words.py           Fill in the templates.
"""
