"""The names of all columns that this package reads or adds."""

ROW = "bl_row"  # number of the training set's row that an example, or with packing a token, comes from

REFERENCE = "ref_logprobs"  # log p of each token under a reference model

NOT_FOR_THE_MODEL = (ROW, REFERENCE, "example_lengths", "objective_weight", "bl_template")  # what our collators add to a batch

WEIGHT = "objective_weight"  # of an example: what the costs of its tokens are multiplied by

TEMPLATE = "bl_template"  # 1 for a token that the chat template made

FILLS = {WEIGHT: 1.0, TEMPLATE: 0, REFERENCE: 0.0}
