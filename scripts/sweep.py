"""Sweep a recipe: `python scripts/sweep.py --config recipe.yaml --sweep sweep.yaml [--any_key value ...]`."""

import sys

from bl_trainer.cli import main

if __name__ == "__main__":
    main(["sweep", *sys.argv[1:]])
