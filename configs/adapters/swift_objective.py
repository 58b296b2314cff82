"""An external plugin of ms-swift: it gives `loss_type: bl_trainer` its objective."""

from bl_trainer.adapters.swift import register

register("neg_p", threshold=0.2)
