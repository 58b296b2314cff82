"""What this package uses from inside PEFT, beyond its public names: a release that moves something breaks here.

tests/test_foreign.py says what each is for.
"""

from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import ModulesToSaveWrapper

__all__ = ["NAMES", "LoraLayer", "ModulesToSaveWrapper", "check_target_module_exists"]

# Names -> what breaks without them
NAMES = {
    "LoraLayer": "merging an adapter on one of two tied layers",
    "check_target_module_exists": "the refusal of an adapter on the LM head, which would not train",
    "ModulesToSaveWrapper": "the refusal of tokens that PEFT trains in a copy of a tied LM head",
}
