"""Finds the studies, and takes the tiny checkpoint from the package's tests."""

import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "studies"), str(ROOT / "scripts")]

shared = runpy.run_path(str(ROOT / "tests" / "conftest.py"))
process_state, tokenizer, checkpoint = (shared[name] for name in ("process_state", "tokenizer", "checkpoint"))
