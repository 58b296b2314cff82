"""Cells of fine-tuning whose right answers are known, many small models at a time."""
