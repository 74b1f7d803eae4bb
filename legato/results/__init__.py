"""A run folder: its paths, its checksums, and reading it back.

ablation_table.py  The run as one flat table, a row per SAE: ablation.parquet, and the same as ablation.csv.
final_info.py      final_info.json: means and standard errors over the seeds of each recipe, in the shape
                   AI-Scientist reads.
integrity.py       checksums.json of a finished run: the SHA-256 of its files, written last and checked by
                   whatever reads the run.
older.py           What the arms of runs are that were saved before each arm said so itself.
run_dir.py         The folder of one run: every path in it, and what may be written where.
saved_run.py       The saved results of a run folder, as the notes, the report and `plot.py` read them.
schema.py          metrics.json of a run as it is read back: what its readers rely on is looked at once.
tolerances.py      When two SAEs count as equal in what they cost.
matched/           Methods at equal L0 and FVU.
"""

from legato.results.run_dir import RunDir
from legato.results.saved_run import SavedRun

__all__ = ["RunDir", "SavedRun"]
