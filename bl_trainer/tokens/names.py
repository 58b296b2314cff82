"""The names of all columns that this package reads or adds, of data sets and of batches."""

WEIGHT = "objective_weight"  # of an example: what the costs of its tokens are multiplied by

TOKEN_WEIGHT = "token_weight"  # of each token beside `input_ids`: multiplies the above; 0 is no target

MESSAGE_WEIGHT = "weight"  # key of a message: the same for all of its tokens

REFERENCE = "ref_logprobs"  # log p of each token under a reference model

ROW = "bl_row"  # number of the training set's row that an example, or with packing a token, comes from

TEMPLATE = "bl_template"  # 1 for a token that the chat template made

EXAMPLE_LENGTHS = (
    "example_lengths"  # of a batch with more or fewer rows than examples: tokens of each in its one row; else none
)

JOINED = "bl_joined"  # of a batch: there where a row of it may hold several examples

# What diagnosis adds
INDEX = "bl_index"  # of a stream's row: its place in the stream

GROUP = "bl_group"  # of the row: its value in the column that figures are broken down by

POSITION = "bl_position"  # of a token in its example's answer

LENGTH = "bl_length"  # of that answer

OWNER = "bl_owner"  # of a batch: the example that each token belongs to

EXAMPLES = "bl_examples"  # of a batch: what there is to know of each example

FILLS = {WEIGHT: 1.0, TEMPLATE: 0, REFERENCE: 0.0}  # of the columns that our collators lay out, where there is no token

NOT_FOR_THE_MODEL = (ROW, REFERENCE, EXAMPLE_LENGTHS, WEIGHT, TEMPLATE)  # what our collators add to a batch
