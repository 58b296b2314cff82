"""Prepare a data set of the paper: `python scripts/prepare_data.py NAME --output DIR [--model PATH]`."""

import sys

from bl_trainer.cli import main

if __name__ == "__main__":
    main(["prepare-data", *sys.argv[1:]])
