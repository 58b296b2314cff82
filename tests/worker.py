"""What `test_processes.py` forks: steps and evaluations of `BLTrainer`, and sharded heads, dumped by the first process."""

import json
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer, DataCollatorWithFlattening

import sharded
from bl_trainer import BLConfig
from bl_trainer.cli import end
from conftest import make_double, make_image_data, make_llama
from multimodal import SHOWN, make_multimodal, processor_of
from ways import Gradients, Ordered, train


def run(case, tokenizer, output):
    """Train two steps of `case`, whose learning rate is 0, and evaluate; returns gradient, log and metrics."""
    seen = Gradients()
    args = BLConfig(
        output_dir=output, max_steps=2, learning_rate=0.0, max_grad_norm=0.0, use_cpu=True, bf16=False, report_to="none",
        save_strategy="no", logging_steps=2, gradient_checkpointing=False, max_length=None, disable_tqdm=True,
        **case["options"],
    )  # fmt: skip
    evaluation = Dataset.from_list(case["eval"])
    if case["name"] == "streamed_evaluation":
        evaluation = evaluation.to_iterable_dataset()
    model = make_llama(tokenizer) if case["name"] == "float32" else make_double(tokenizer)
    if case["name"] == "reference":
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    collator = DataCollatorWithFlattening() if case["name"] == "flattened" else None
    trainer = Ordered(
        model=model, data_collator=collator, args=args, processing_class=tokenizer, callbacks=[seen],
        train_dataset=Dataset.from_list(case["train"]), eval_dataset=evaluation,
    )  # fmt: skip
    trainer.train()
    metrics = trainer.evaluate()
    log = next(entry for entry in trainer.state.log_history if "loss" in entry)
    return trainer, {"gradient": seen.first, "log": log, "eval": metrics}


def shown(name, tokenizer, processes, output):
    """Return the gradient of one step of eight images, of a vision-language model in float64."""
    seen, processor = Gradients(), processor_of(name, tokenizer)
    train(
        Ordered, processor, make_image_data(), Path(output), make_multimodal(name, processor).double(), callbacks=[seen],
        learning_rate=0.0, objective="neg_p", per_device_train_batch_size=2, gradient_accumulation_steps=4 // processes,
    )  # fmt: skip
    return seen.first


def main(folder, cases):
    tokenizer, path = AutoTokenizer.from_pretrained(folder), Path(cases)
    results = {}
    for case in json.loads(path.read_text()):
        trainer, results[case["name"]] = run(case, tokenizer, str(path.parent / "out"))
    results["sharded"] = sharded.errors(tokenizer)
    processes = trainer.accelerator.num_processes
    results["shown"] = {name: shown(name, tokenizer, processes, path.parent / "out") for name in SHOWN}
    if trainer.is_world_process_zero():
        torch.save({**results, "processes": processes}, path.with_suffix(".pt"))
    end(trainer)
