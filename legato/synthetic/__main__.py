"""`python -m legato.synthetic`: the same as `legato synthetic`."""

import argparse
import sys

from legato.errors import LegatoError, UsageError
from legato.synthetic.command import add_arguments, main

if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="legato synthetic", allow_abbrev=False)
    add_arguments(parser)
    try:
        main(parser.parse_args())
    except LegatoError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, UsageError) else 1)
