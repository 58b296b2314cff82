"""What other trainers' recipes call the keys of ours: of older TRL and the alignment handbook, axolotl, and LLaMA-Factory."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .fields import recipe_fields
from .keys import RENAMED, REPLACED


@dataclass
class Draft:
    """
    A recipe that is being converted.

    `old`: the keys as they were; `new`: ours, each with a comment in `notes` if it changed. `dropped`: what has no effect.
    `changed`: what changes training and has no counterpart. `files`: the texts to write beside, such as the chat template.
    """

    old: dict[str, Any]
    output: Path
    new: dict[str, Any] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    dropped: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    files: dict[Path, str] = field(default_factory=dict)

    def put(self, key: str, value: Any, note: str = "") -> None:
        """Give a key its value, with a comment; a mapping joins what the key has. `changed` names a value that is replaced."""
        both = isinstance(value, dict) and isinstance(self.new.get(key), dict)
        if key in self.new and not both and self.new[key] != value:
            self.lose(key, f"two keys gave it values, {self.new[key]} and {value}; the latter is kept")
        self.new[key] = {**self.new[key], **value} if both else value
        if note:
            self.notes[key] = "; ".join(filter(None, [self.notes.get(key), note]))

    def drop(self, key: str, why: str) -> None:
        self.dropped.append(f"`{key}`: {why}")

    def lose(self, key: str, why: str) -> None:
        self.changed.append(f"`{key}`: {why}")


Handler = Callable[[Draft, Any], None]


@dataclass(frozen=True)
class Dialect:
    """
    The keys of a trainer's recipes, where they are not ours.

    `renamed`: key -> ours of the same meaning. `values`: (our key, a value) -> ours. `flags`: a key that is true or false ->
    our key with the value that true means. `idle`: key -> why it has no effect on training. `handlers`: key -> what takes
    it. `defaults`: takes the keys that a recipe gives, and returns the trainer's own values of the keys on which the recipe
    is silent, where ours are others.
    """

    name: str
    renamed: Mapping[str, str] = field(default_factory=dict)
    values: Mapping[tuple[str, Any], Any] = field(default_factory=dict)
    flags: Mapping[str, tuple[str, Any]] = field(default_factory=dict)
    idle: Mapping[str, str] = field(default_factory=dict)
    handlers: Mapping[str, Handler] = field(default_factory=dict)
    defaults: Callable[[Mapping[str, Any]], Mapping[str, Any]] = lambda given: {}

    def translate(self, draft: Draft) -> None:
        """Give `draft.new` what `draft.old` says."""
        given = {key: value for key, value in draft.old.items() if value is not None}
        for key, value in given.items():
            self._take(draft, key, value)
        if empty := [key for key in draft.old if key not in given]:
            draft.dropped.append(f"without a value: {', '.join(empty)}")
        for key, value in self.defaults(given).items():
            before = dict(draft.new)
            self._take(draft, key, value)
            taken = [ours for ours in draft.new if ours not in before]
            draft.notes.update(dict.fromkeys(taken, f"{self.name}'s default, `{key}: {value}`"))

    def _take(self, draft: Draft, key: str, value: Any) -> None:
        if key in self.handlers:
            self.handlers[key](draft, value)
        elif key in self.flags:
            ours, meant = self.flags[key]
            if value:
                draft.put(ours, meant, f"was `{key}`")
            else:
                draft.drop(key, "it is false, which is the default")
        elif key in self.renamed:
            self._put(draft, self.renamed[key], value, f"was `{key}`")
        elif key in self.idle:
            draft.drop(key, self.idle[key])
        elif key in recipe_fields() or key == "env":
            self._put(draft, key, value, "")
        else:
            draft.lose(key, "bl_trainer has no such key")

    def _put(self, draft: Draft, key: str, value: Any, note: str) -> None:
        ours = self.values.get((key, value), value) if isinstance(value, str) else value
        draft.put(key, ours, "; ".join(filter(None, [note, f"was {value}" if ours != value else ""])))


def nested(key: str, part: str) -> Handler:
    """Return what puts a value into a mapping: `split_batches` into `accelerator_config`."""
    return lambda draft, value: draft.put(key, {part: value}, f"has `{part}` from a key of its own")


def to_environment(variable: str) -> Handler:
    """Return what puts a value into the environment."""
    return lambda draft, value: draft.put("env", {variable: str(value)}, "for the tracker")


def losing(key: str, why: str) -> Handler:
    """Return what notes a key that changes training, unless it is switched off."""

    def handle(draft: Draft, value: Any) -> None:
        if value:
            draft.lose(key, why)
        else:
            draft.drop(key, "it is switched off")

    return handle


def evaluates(draft: Draft, size: Any, key: str) -> None:
    """Split off an evaluation set, unless its size is 0."""
    if size:
        draft.put("test_split_size", size, f"was `{key}`")
        draft.new.setdefault("eval_strategy", "steps")
    else:
        draft.drop(key, "it is 0")


# Older TRL and transformers, the alignment handbook, open-r1


def _chat_template(draft: Draft, value: Any) -> None:
    if "{" not in str(value):
        draft.lose("chat_template", f"the template {value!r} is named, not given; the model's own is used")
        return
    path = draft.output.with_suffix(".jinja")
    draft.files[path] = str(value)
    draft.put("chat_template_path", str(path), "the text of `chat_template`")


def _mixture(draft: Draft, value: Any) -> None:
    """Take `dataset_mixture` of the alignment handbook and open-r1: every data set, or the share `weight` of its rows."""
    entries = []
    for each in value["datasets"]:
        entry = {"path": each["id"], "name": each.get("config"), "split": each.get("split", "train")}
        entry["columns"] = each.get("columns")
        _share(draft, entry, each.get("weight"))
        entries.append({key: part for key, part in entry.items() if part is not None})
    draft.put("datasets", entries, "was `dataset_mixture`")
    if value.get("test_split_size") is not None:
        draft.put("test_split_size", value["test_split_size"], "was part of `dataset_mixture`")
    if value.get("seed") is not None and draft.old.get("packing"):
        draft.put("shuffle_dataset", True, "`dataset_mixture` shuffled by its own `seed` before packing")
    elif value.get("seed") is not None:
        draft.drop("dataset_mixture.seed", "training shuffles by `seed`")


def _share(draft: Draft, entry: dict[str, Any], weight: Any, drawn: bool = True) -> None:
    """Take the share of a data set's rows as a slice of its split, in whole percentages; `drawn`: at random until now."""
    if weight in (None, 1):
        return
    split, percent = entry["split"], 100 * float(weight)
    nearest = max(1, round(percent))
    if not 0 < percent < 100 or nearest == 100 or "[" in split:
        draft.lose("weight", f"{weight} of {entry['path']} ({split}) is no slice of it; all its rows are taken")
        return
    entry["split"] = f"{split}[:{nearest}%]"
    if abs(percent - nearest) > 1e-6:
        draft.lose("weight", f"{weight} of {split} became its first {nearest}%: a slice is a whole percentage")
    elif drawn:
        draft.lose("weight", f"{weight} of {split} are its first rows, which were drawn at random")


def _mixer(draft: Draft, value: Any) -> None:
    """Take `dataset_mixer`, a share for each data set, with `dataset_splits` and `dataset_configs`."""
    splits = draft.old.get("dataset_splits") or ["train", "test"]
    configs = draft.old.get("dataset_configs") or [None] * len(value)
    training = [split for split in splits if "train" in split] or splits[:1]
    tests = [split for split in splits if split not in training]
    if len(value) == 1 and len(training) == 1 and [*value.values()] == [1]:
        draft.put("dataset_name", next(iter(value)), "was `dataset_mixer`")
        _splits(draft, splits)
        _configs(draft, [each for each in configs if each])
        return
    entries = []
    for (path, weight), config in zip(value.items(), configs, strict=True):
        for split in training:
            entry = {"path": path, "split": split, **({"name": config} if config else {})}
            _share(draft, entry, weight, drawn=False)
            entries.append(entry)
    draft.put("datasets", entries, "was `dataset_mixer`")
    if draft.old.get("packing"):
        draft.put("shuffle_dataset", True, "the alignment handbook shuffled before packing")
    if tests:
        draft.lose("dataset_splits", f"{', '.join(tests)} of a mixture is not read; write `test_split_size` to evaluate")


def _splits(draft: Draft, value: Any) -> None:
    for split in value:
        key = "dataset_train_split" if "train" in split else "dataset_test_split"
        if key == "dataset_train_split" or draft.old.get("eval_strategy", draft.old.get("evaluation_strategy", "no")) != "no":
            draft.put(key, split, "was in `dataset_splits`")


def _configs(draft: Draft, value: Any) -> None:
    if len(value) == 1:
        draft.put("dataset_config", value[0], "was `dataset_configs`")
    elif value:
        draft.lose("dataset_configs", "there are several; write `datasets`, an entry for each")


def _unless_mixed(take: Handler) -> Handler:
    """Return what takes a key unless `dataset_mixer` takes it with its own."""

    def handle(draft: Draft, value: Any) -> None:
        if "dataset_mixer" not in draft.old:
            take(draft, value)

    return handle


def _warmup(draft: Draft, value: Any) -> None:
    if 0 <= float(value) < 1:
        draft.put("warmup_steps", value, "was `warmup_ratio`; below 1 it is a share of all steps")
    else:
        draft.lose("warmup_ratio", f"{value} is not below 1")


def _packing(draft: Draft, value: Any) -> None:
    """Take `packing`, which meant the strategy `wrapped` as long as there was no choice of one."""
    draft.put("packing", value)
    if not value or draft.old.get("packing_strategy"):
        return
    if "dataset_mixer" in draft.old:
        draft.put("packing_strategy", "wrapped", "TRL cut joined rows when recipes had a `dataset_mixer`")
    elif "max_seq_length" in draft.old:
        why = "TRL before 0.18 cut joined rows, as `packing_strategy: wrapped` does; rows are packed whole here"
        draft.lose("packing", why)


def _max_seq_length(draft: Draft, value: Any) -> None:
    """Take the old name of `max_length`, and speak of prompts, on which TRL of that time trained."""
    draft.put("max_length", value, "was `max_seq_length`")
    if draft.old.get("completion_only_loss") is None:
        why = "TRL before 0.17 trained on the prompts of prompt-completion data too; `completion_only_loss: false` keeps that"
        draft.lose("completion_only_loss", why)


def _loss_type(draft: Draft, value: Any) -> None:
    if value == "dft":
        draft.put("objective", "dft", "was `loss_type: dft`")
    elif value in ("nll", "chunked_nll"):
        draft.drop("loss_type", "NLL is the default objective, and bl_trainer has its own loss head")
    else:
        draft.lose("loss_type", f"{value} has no counterpart; choose by `objective`")


def _dataset_kwargs(draft: Draft, value: Any) -> None:
    for key, each in value.items():
        if key == "skip_prepare_dataset":
            draft.put("dataset_kwargs", {key: each})
        else:
            draft.lose("dataset_kwargs", f"TRL no longer reads `{key}`; texts get the tokenizer's own special tokens")


_GONE = {key: "it no longer has an effect" for key, line in REPLACED.items() if line is None}
_TRL: dict[str, Handler] = {
    "chat_template": _chat_template,
    "dataset_mixture": _mixture,
    "dataset_mixer": _mixer,
    "dataset_splits": _unless_mixed(_splits),
    "dataset_configs": _unless_mixed(_configs),
    "max_seq_length": _max_seq_length,
    "warmup_ratio": _warmup,
    "response_template": losing("response_template", "write `assistant_only_loss: true`, or prompt-completion data"),
    "instruction_template": losing("instruction_template", "write `assistant_only_loss: true`, or prompt-completion data"),
    "system_prompt": losing("system_prompt", "write it into the chat template or the data"),
    "sharded_ddp": losing("sharded_ddp", "write `fsdp: full_shard`"),
    "torchdynamo": lambda draft, value: draft.put("torch_compile_backend", value, "was `torchdynamo`"),
    "tokenizer_name_or_path": losing("tokenizer_name_or_path", "the model's own tokenizer is used"),
    "push_to_hub_organization": losing("push_to_hub_organization", "write `hub_model_id: ORGANIZATION/MODEL`"),
    "logging_dir": to_environment("TENSORBOARD_LOGGING_DIR"),
    "wandb_project": to_environment("WANDB_PROJECT"),
    "wandb_entity": to_environment("WANDB_ENTITY"),
    "wandb_run_group": to_environment("WANDB_RUN_GROUP"),
    "gradient_checkpointing_use_reentrant": nested("gradient_checkpointing_kwargs", "use_reentrant"),
    "fsdp_min_num_params": nested("fsdp_config", "min_num_params"),
    "fsdp_transformer_layer_cls_to_wrap": nested("fsdp_config", "transformer_layer_cls_to_wrap"),
    "dispatch_batches": nested("accelerator_config", "dispatch_batches"),
    "split_batches": nested("accelerator_config", "split_batches"),
}
_FLAGS: dict[str, tuple[str, Any]] = {
    "use_flash_attention_2": ("attn_implementation", "flash_attention_2"),
    "group_by_length": ("train_sampling_strategy", "group_by_length"),
    "adafactor": ("optim", "adafactor"),
    "include_inputs_for_metrics": ("include_for_metrics", ["inputs"]),
    "include_tokens_per_second": ("include_num_input_tokens_seen", True),
}
_OPEN_R1 = {
    "benchmarks": "write them into a sweep, or run `bl-trainer evaluate`",
    "callbacks": "bl_trainer has its own",
    "overwrite_hub_revision": "the Hub keeps all revisions",
    "push_to_hub_revision": "write `push_to_hub: true` and `hub_revision`",
}


_VERBS = {
    "do_train": "`train` trains",
    "do_eval": "`eval_strategy` decides",
    "do_predict": "`bl-trainer evaluate` writes a model's answers",
}


def _absent(table: Mapping[str, Any]) -> dict[str, Any]:
    """Return a table without the keys that the installed versions have, and obey."""
    return {key: value for key, value in table.items() if key not in recipe_fields()}


def _precision_of_then(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the precision of the TRL that had `max_seq_length`: bf16 is the default since 0.19 (pull request 3515)."""
    return {"bf16": False} if "max_seq_length" in given and not {"bf16", "fp16"} & given.keys() else {}


TRL = Dialect(
    "TRL",
    renamed=_absent(RENAMED | {"hub_model_revision": "hub_revision"}),
    values={("packing_strategy", "ffd"): "bfd", ("packing_strategy", "bfd-requeue"): "bfd_split"},
    flags=_absent(_FLAGS),
    idle=_absent({**_GONE, **_OPEN_R1, "ignore_bias_buffers": "it does nothing in SFT"}) | _VERBS,
    handlers={**_absent(_TRL), "packing": _packing, "loss_type": _loss_type, "dataset_kwargs": _dataset_kwargs},
    defaults=_precision_of_then,
)
