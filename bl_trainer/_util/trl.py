"""What this package uses from inside TRL, beyond its public names: a release that moves something breaks here.

tests/test_foreign.py says what each is for.
"""

from trl.trainer.sft_trainer import DataCollatorForLanguageModeling, DataCollatorForVisionLanguageModeling
from trl.trainer.utils import add_fused_lm_head, maybe_gather_lm_head_ctx

__all__ = [
    "ATTRIBUTES",
    "METHODS",
    "NAMES",
    "DataCollatorForLanguageModeling",
    "DataCollatorForVisionLanguageModeling",
    "add_fused_lm_head",
    "maybe_gather_lm_head_ctx",
]

# Names -> what breaks without them
NAMES = {
    "DataCollatorForLanguageModeling": "batches with our columns, and packed rows",
    "DataCollatorForVisionLanguageModeling": "labels without the placeholders of images",
    "add_fused_lm_head": "the loss under `loss_head: trl`",
    "maybe_gather_lm_head_ctx": "the loss under ZeRO-3, which shards the LM head",
}

# Methods of `SFTTrainer` that are overridden or called -> what then breaks
METHODS = {
    "_prepare_dataset": "columns of tokens: weights, row numbers, the chat template's tokens, the reference",
    "_set_signature_columns_if_needed": "the same columns, which `remove_unused_columns` would take away",
    "_save_checkpoint": "checkpoints that are complete, or an error",
    "create_model_card": "the objective in the model card",
}

# Attributes of an `SFTTrainer` -> what then breaks
ATTRIBUTES = {
    "aux_loss_enabled": "the auxiliary loss of a mixture of experts, and the choice of the loss head",
    "chat_template": "the tokens that a chat template makes, and the check of what it renders",
    "_metrics": "`num_tokens` and `aux_loss` in the log",
    "completion_only_loss": "the targets of `diagnose --probe`, whose data may be laid out otherwise than the training set's",
    "_is_vision_dataset": "the refusals to diagnose images, and to train on text what sees later tokens",
    "_signature_columns": "columns of tokens",
    "_skip_prepare_dataset": "the preparation of a data set for `predict`",
    "padding_free": "the refusal of models in which packed examples see each other",
}
