"""The whole experiment:  python experiment.py --out_dir=run_1

The same as `legato run`. Its stages, one call each, are read top to bottom in legato/experiment/run.py.
"""

import sys

from legato.experiment.command import main

if __name__ == "__main__":
    sys.exit(main())
