"""Time and peak memory of one training step: TRL's losses, our objectives, and the paper's way (full float32 logits).

`python benchmarks/step.py --help`. Every arm runs on the same randomly initialised model and batch, round by round in one
process and in rotating order. Reported are medians, and medians of each round's ratios to TRL's `nll`. A step is forward
and backward, without the optimizer, which is the same for all.
"""

import argparse
import tempfile
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast, Qwen2Config
from trl import SFTConfig, SFTTrainer

from bl_trainer import BLConfig, BLTrainer
from common import Figures, Results, add_options, interleave, report, set_up

SHAPES: dict[str, Any] = {
    "smollm2-135m": LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    ),
    "qwen2.5-1.5b": Qwen2Config(
        vocab_size=151936,
        hidden_size=1536,
        intermediate_size=8960,
        num_hidden_layers=28,
        num_attention_heads=12,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    ),
    "tiny": LlamaConfig(
        vocab_size=1003,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    ),
}


class FullLogits(SFTTrainer):
    """1 - p as the paper's code computes it: all logits in float32, log_softmax, gather."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs["labels"][:, 1:]
        logits = model(**{key: value for key, value in inputs.items() if key != "labels"}, use_cache=False).logits
        logp = logits[:, :-1].float().log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
        return ((1 - logp.exp()) * (labels != -100)).sum() / num_items_in_batch


ARMS: dict[str, tuple[type[SFTTrainer], dict[str, Any]]] = {
    "TRL nll": (SFTTrainer, {}),
    "TRL dft": (SFTTrainer, {"loss_type": "dft"}),
    "nll": (BLTrainer, {"objective": "nll"}),
    "neg_p": (BLTrainer, {"objective": "neg_p"}),
    "power 10": (BLTrainer, {"objective": {"name": "power", "alpha": 10}}),
    "log_one_minus_p": (BLTrainer, {"objective": "log_one_minus_p"}),
    "nll, p >= 0.2": (BLTrainer, {"objective": "nll", "threshold": 0.2}),
    "full logits, 1 - p": (FullLogits, {}),
}


def make_model(shape: str, device: str, dtype: str) -> Any:
    """Return a randomly initialised model."""
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(SHAPES[shape], dtype=getattr(torch, dtype))


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer that no text is given to."""
    backend = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")


def make_trainer(
    trainer_class: type[SFTTrainer],
    model: Any,
    data: Dataset,
    folder: str,
    device: str,
    keys: Mapping[str, Any],
    lora: LoraConfig | None = None,
) -> Any:
    """Return a trainer with the settings `keys`."""
    defaults = {"bf16": False, "use_cpu": device == "cpu", "report_to": "none", "gradient_checkpointing": False}
    args_class = BLConfig if issubclass(trainer_class, BLTrainer) else SFTConfig
    args = args_class(output_dir=folder, **{**defaults, **keys})
    return trainer_class(model=model, args=args, train_dataset=data, processing_class=make_tokenizer(), peft_config=lora)


def measure(shape: str, lora: bool, options: argparse.Namespace, arms: Iterable[str] = ()) -> Figures:
    """Return the figures of `arms`, by default of all, for one model."""
    model = make_model(shape, options.device, options.dtype)
    if lora:
        model = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear"))
    ids = torch.randint(10, SHAPES[shape].vocab_size, (options.batch, options.length), device=options.device)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    data = Dataset.from_dict({"input_ids": [[1, 2]], "labels": [[1, 2]], "bl_template": [[0, 0]]})
    num_items = torch.tensor(ids[:, 1:].numel(), device=options.device)
    runs = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in arms or ARMS:
            trainer_class, keys = ARMS[name]
            trainer = make_trainer(trainer_class, model, data, folder, options.device, keys)
            trainer.current_gradient_accumulation_steps = 1
            trainer.state.max_steps, trainer.state.global_step = 4, 3  # where schedules have left their start
            runs[name] = partial(lambda trainer: trainer.training_step(model, dict(batch), num_items), trainer)
        return interleave(runs, options.rounds, options.device, lambda arm: model.zero_grad(set_to_none=True))


def main(name: str = "step", base: str = "TRL nll") -> tuple[Results, argparse.Namespace]:
    """Run the benchmark of `ARMS`, the arm `base` being what the others are compared with; return what was measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shape", choices=SHAPES, default="smollm2-135m")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--length", type=int, default=512, help="tokens of a sequence, all of them targets")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--modes", nargs="+", choices=["full", "LoRA"], default=["full", "LoRA"])
    add_options(parser, name)
    options = parser.parse_args()
    if base not in options.arms:
        parser.error(f"the arms need {base!r}, which the others are compared with")
    set_up(options)
    results = {mode: measure(options.shape, mode == "LoRA", options, options.arms) for mode in options.modes}
    report(name, results, base, base, 3, options)
    return results, options


if __name__ == "__main__":
    main()
