"""`legato check`: whether every file of a finished run is still as the run wrote it."""

import argparse
from pathlib import Path

from legato.checksums import check_all
from legato.tracking import say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN", type=Path, help="folders of finished runs")


def main(options: argparse.Namespace) -> None:
    """Raises LegatoError, naming the first file that is not."""
    for path in options.runs:
        say(f"{path}: {check_all(path)} files are as the run wrote them")
