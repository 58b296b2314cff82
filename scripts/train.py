"""Train a recipe: `accelerate launch scripts/train.py --config recipe.yaml [--any_key value ...]`."""

import sys

from bl_trainer.cli import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
