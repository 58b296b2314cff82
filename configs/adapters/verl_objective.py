"""A module for verl's `model.external_lib`: it gives verl's SFT trainer its objective."""

from bl_trainer.adapters.verl import install

install("neg_p", threshold=0.2)
