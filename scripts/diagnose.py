"""Diagnose a recipe: `accelerate launch scripts/diagnose.py --config recipe.yaml --report DIR [--any_key value ...]`."""

import sys

from bl_trainer.cli import main

if __name__ == "__main__":
    main(["diagnose", *sys.argv[1:]])
