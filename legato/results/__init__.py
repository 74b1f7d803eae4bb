"""A run folder: its paths, its checksums, and reading it back.

ablation_table.py  Flat table of a run, one row per SAE: ablation.parquet, and the same as ablation.csv.
final_info.py      final_info.json: means and standard errors over the seeds of each recipe, in the shape AI-Scientist
                   reads.
integrity.py       checksums.json of a finished run: the SHA-256 of its files, written last and checked by whatever
                   reads the run.
older.py           Roles, methods and groups of arms in older runs, which did not save them.
run_dir.py         The folder of one run: all its paths, and the functions that write to it.
saved_run.py       The saved results of a run folder, as the notes, the report and `plot.py` read them.
schema.py          metrics.json of a run as it is read back: what its readers rely on is looked at once.
tolerances.py      Tolerance within which two SAEs count as equal in cost, for all tables, notes and figures.
matched/           Methods at equal L0 and FVU.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
