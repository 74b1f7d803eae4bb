"""Compare the run_* folders beside this file:  python plot.py

Reads saved results only; writes figures/comparison.html, one page with everything, and its figures as
figures/compare_*.png. `python plot.py RUN [RUN...]` compares the folders named.
"""

import argparse
import sys
from pathlib import Path
from typing import NoReturn

from legato.common.errors import LegatoError, UsageError
from legato.report.runs.page import write_comparison
from legato.results.integrity import blame_unverified_files
from legato.results.saved_run import SavedRun

# Which runs to compare and what to call them; empty: every finished run_* folder found, by its name.
labels: dict[str, str] = {}


def main(arguments: list[str]) -> int:
    try:
        compare(arguments)
    except LegatoError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    return 0


def compare(arguments: list[str]) -> None:
    here = Path(__file__).resolve().parent
    parser = _Parser(description="Compare runs of experiment.py by their saved results.")
    parser.add_argument("runs", nargs="*", type=Path, help="run folders (default: the run_* folders beside plot.py)")
    parser.add_argument(
        "--out", type=Path, default=here / "figures", help="folder for the page and the figures (default: %(default)s)"
    )
    options = parser.parse_args(arguments)
    runs = {labels.get(path.name, path.name): SavedRun.open(path) for path in options.runs or _found(here)}
    try:
        with blame_unverified_files([run.path for run in runs.values()]):
            for path in write_comparison(runs, options.out).values():
                print(path)
    except OSError as error:
        raise UsageError(f"{options.out} cannot be written ({error.strerror}): choose another --out") from error


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}: see --help")


def _found(here: Path) -> list[Path]:
    """The folders in `labels`, or every run_* folder with results, in the order of their numbers."""
    if labels:
        return [here / name for name in labels]
    folders = sorted((p for p in here.glob("run_*") if p.is_dir()), key=lambda p: (len(p.name), p.name))
    finished = [path for path in folders if (path / "metrics.json").is_file()]
    for path in folders:
        if path not in finished:
            print(f"{path.name} has no metrics.json yet: left out")
    if not finished:
        raise UsageError(f"no finished run_* folder in {here}: first run  python experiment.py --out_dir=run_1")
    return finished


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
