"""Time and peak memory of one training step: TRL's losses, our objectives, and the paper's way (full float32 logits).

`python benchmarks/step.py --help`. Every arm runs on the same randomly initialised model and batch, round by round in one
process and in rotating order. Reported are medians, and medians of each round's ratios to TRL's `nll`. A step is forward
and backward, without the optimizer, which is the same for all.
"""

import argparse
import gc
import tempfile
import time
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from trl import SFTConfig, SFTTrainer

from bl_trainer import BLConfig, BLTrainer
from common import Results, add_options, peak_memory, report, set_up

SHAPES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "smollm2-135m": (
        LlamaForCausalLM,
        LlamaConfig,
        {
            "vocab_size": 49152,
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "tie_word_embeddings": True,
        },
    ),
    "qwen2.5-1.5b": (
        Qwen2ForCausalLM,
        Qwen2Config,
        {
            "vocab_size": 151936,
            "hidden_size": 1536,
            "intermediate_size": 8960,
            "num_hidden_layers": 28,
            "num_attention_heads": 12,
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
        },
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


def measure(shape: str, lora: bool, options: argparse.Namespace) -> dict[str, dict[str, list[float]]]:
    """Return {arm: {"seconds": [...], "megabytes": [...]}}, a figure a round, for one model."""
    torch.manual_seed(0)
    model_class, config_class, sizes = SHAPES[shape]
    dtype = getattr(torch, options.dtype)
    model = model_class(config_class(**sizes)).to(options.device, dtype)
    if lora:
        model = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear"))
    vocab_size = sizes["vocab_size"]
    ids = torch.randint(10, vocab_size, (options.batch, options.length), device=options.device)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<pad>")),
        pad_token="<pad>",
        eos_token="<eos>",
    )
    data = Dataset.from_dict({"input_ids": [[1, 2]], "labels": [[1, 2]], "bl_template": [[0, 0]]})
    num_items = torch.tensor(ids[:, 1:].numel(), device=options.device)
    trainers = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, (trainer_class, keys) in ARMS.items():
            args_class = BLConfig if issubclass(trainer_class, BLTrainer) else SFTConfig
            args = args_class(
                output_dir=folder,
                bf16=False,
                use_cpu=options.device == "cpu",
                report_to="none",
                gradient_checkpointing=False,
                **keys,
            )
            trainers[name] = trainer_class(model=model, args=args, train_dataset=data, processing_class=tokenizer)
            trainers[name].current_gradient_accumulation_steps = 1
            trainers[name].state.max_steps, trainers[name].state.global_step = 4, 3  # where schedules have left their start
        times: dict[str, list[float]] = {name: [] for name in trainers}
        peaks: dict[str, list[float]] = {name: [] for name in trainers}
        names = list(trainers)
        for round_ in range(options.rounds + 1):  # the first warms up
            for name in names[round_ % len(names) :] + names[: round_ % len(names)]:
                trainer = trainers[name]
                model.zero_grad(set_to_none=True)
                gc.collect()
                peak_memory(options.device, reset=True)
                start = time.perf_counter()
                trainer.training_step(model, dict(batch), num_items)
                if options.device == "cuda":
                    torch.cuda.synchronize()
                if round_:
                    times[name].append(time.perf_counter() - start)
                    peaks[name].append(peak_memory(options.device))
    return {name: {"seconds": times[name], "megabytes": peaks[name]} for name in trainers}


def main(name: str = "step", base: str = "TRL nll") -> tuple[Results, argparse.Namespace]:
    """Run the benchmark of `ARMS`, the arm `base` being what the others are compared with; return what was measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shape", choices=SHAPES, default="smollm2-135m")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--length", type=int, default=512, help="tokens of a sequence, all of them targets")
    parser.add_argument("--rounds", type=int, default=7)
    add_options(parser, name)
    options = parser.parse_args()
    set_up(options)
    results = {mode: measure(options.shape, mode == "LoRA", options) for mode in ("full", "LoRA")}
    report(name, results, base, base, 3, options)
    return results, options


if __name__ == "__main__":
    main()
