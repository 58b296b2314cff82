"""What `test_diagnosis.py` launches: several verbs, one after the other, in the same processes, which start slowly."""

import json
import os
import sys
from contextlib import redirect_stdout
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import torch

import bl_trainer.cli


def main(path):
    torch.set_num_threads(int(os.environ.get("BL_TEST_THREADS", 1)))
    bl_trainer.cli.end = lambda trainer: trainer.accelerator.wait_for_everyone()  # the processes go on
    for name, argv in json.loads(Path(path).read_text()).items():
        with open(Path(path).with_name(f"{name}.{os.environ['RANK']}.txt"), "w") as file, redirect_stdout(file):
            bl_trainer.cli.main(argv)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
