"""Evaluate checkpoints: `python scripts/evaluate.py --model PATH [PATH ...] --tasks NAME[,NAME] --output DIR`."""

import sys

from bl_trainer.cli import main

if __name__ == "__main__":
    main(["evaluate", *sys.argv[1:]])
