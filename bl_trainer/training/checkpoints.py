"""Checkpoints: how they are saved, which are complete, and what is recorded in them."""

import errno
import json
import pickletools
import re
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from .._util.files import write_text
from ..errors import CheckpointError

RECORD_FILE = "bl_trainer.json"

MANIFEST_FILE = "bl_trainer_manifest.json"

STATE_FILE = "trainer_state.json"  # transformers writes it after all others

SENTINEL = "checkpoint-is-incomplete.txt"  # of transformers, while it saves upon SIGTERM

WEIGHTS = ("*.safetensors", "*/adapter_model.safetensors", "pytorch_model*", "adapter_model.bin", "global_step*")

# What of bitsandbytes' configuration decides the weights, and the type that they are computed in
QUANTIZATION = (
    "load_in_4bit", "load_in_8bit", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant", "bnb_4bit_compute_dtype",
    "llm_int8_skip_modules", "llm_int8_threshold",
)  # fmt: skip

UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)


@contextmanager
def writing(path: str) -> Iterator[None]:
    """Turn what json, torch and safetensors raise on a full disk into a CheckpointError."""
    try:
        yield
    except Exception as error:  # tokenizers' is no more than that
        unwritten = getattr(error, "errno", None) in UNWRITABLE or any(word in str(error) for word in ("os error", "Writer"))
        if not unwritten:  # it has another cause, such as a push to the Hub or a lost process
            raise
        raise CheckpointError(
            f"Cannot write {path}: {error}. Earlier checkpoints are complete. Set `resume_from_checkpoint: true`, and the same "
            "command resumes from the last one."
        ) from error


@contextmanager
def saving(checkpoint: Path, accelerator: Any, saves: bool) -> Iterator[None]:
    """Let all processes save `checkpoint`, and then those that `saves` its manifest. Raises CheckpointError as `writing`."""
    with writing(str(checkpoint)):
        if saves and checkpoint.exists():
            if why_broken(checkpoint):
                shutil.rmtree(checkpoint)  # what an earlier start left, of which some would stay
            else:
                (checkpoint / MANIFEST_FILE).unlink(missing_ok=True)
        accelerator.wait_for_everyone()
        yield
        if saves and checkpoint.exists():
            write_manifest(checkpoint)


def take_average(optimizer: Any) -> None:
    """Let the model have the averaged weights of a schedule-free optimizer, which are its result.

    The next training step returns to the point that it trains at. Other optimizers do nothing.
    """
    average = getattr(optimizer, "eval", None)
    if callable(average):
        average()


def write_manifest(checkpoint: Path) -> None:
    """Write the names and sizes of all files of `checkpoint` in one go; to be its last file."""
    files = (path for path in sorted(checkpoint.rglob("*")) if path.is_file() and path.name != MANIFEST_FILE)
    sizes = {path.relative_to(checkpoint).as_posix(): path.stat().st_size for path in files}
    write_text(checkpoint / MANIFEST_FILE, json.dumps({"files": sizes}, indent=1) + "\n")


def why_broken(checkpoint: Path) -> str | None:
    """Return what is missing or truncated in `checkpoint`, which a killed run may leave behind; None if it is complete.

    A checkpoint is judged by its manifest. Without one it is judged by what its files and their names tell: an older
    version's, another trainer's, or one killed before the manifest. The last may be the only one left, since transformers
    deletes older checkpoints before the manifest can be written.
    """
    if (checkpoint / SENTINEL).exists():
        return f"it holds {SENTINEL}"
    manifest = read_json(checkpoint / MANIFEST_FILE)
    sizes = manifest.get("files") if isinstance(manifest, dict) else None
    return next(_faults_by_size(checkpoint, sizes) if sizes else _faults_by_name(checkpoint), None)


def _faults_by_size(checkpoint: Path, sizes: dict[str, int]) -> Iterator[str]:
    for name, size in sizes.items():
        path = checkpoint / name
        if not path.is_file():
            yield f"its {name} is missing"
        elif path.suffix == ".json":  # which may have been edited by hand
            yield from () if _is_complete(path) else (f"its {name} is truncated",)
        elif path.stat().st_size < size:
            yield f"its {name} is truncated"


def _faults_by_name(checkpoint: Path) -> Iterator[str]:
    if "global_step" not in (read_json(checkpoint / STATE_FILE) or {}):
        yield f"its {STATE_FILE} is {'truncated' if (checkpoint / STATE_FILE).exists() else 'missing'}"
    if not any(next(checkpoint.glob(pattern), None) for pattern in WEIGHTS):
        yield "its weights are missing"
    for path in sorted(checkpoint.rglob("*")):
        if path.is_file() and not _is_complete(path):
            yield f"its {path.relative_to(checkpoint)} is truncated"
    for name in _expected(checkpoint):
        if not (checkpoint / name).exists():
            yield f"its {name} is missing"


def has_model(folder: Path) -> bool:
    """Whether `folder` holds a whole model that a run of ours has saved at its end."""
    weights = [*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin"), *folder.glob("adapter_model.bin")]
    return (folder / RECORD_FILE).exists() and bool(weights) and all(map(_is_complete, weights))


def _is_complete(path: Path) -> bool:
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, "pt"):
                return True
        except (SafetensorError, OSError):
            return False
    if path.suffix in (".pt", ".pth", ".bin"):  # torch's files are zip archives, whose directory comes last
        return zipfile.is_zipfile(path)
    return path.suffix != ".json" or read_json(path) is not None


def _expected(checkpoint: Path) -> list[str]:
    """Names of files that others in the checkpoint speak of."""
    names = [
        f"{path.name}/.metadata" for pattern in ("pytorch_model_fsdp_*", "optimizer_*") for path in checkpoint.glob(pattern)
    ]
    names = [name for name in names if (checkpoint / name).parent.is_dir()]
    for index in checkpoint.glob("*.index.json"):
        names += sorted(set((read_json(index) or {}).get("weight_map", {}).values()))
    record = read_record(str(checkpoint))
    processes = record.get("processes", 0)
    if record.get("save_only_model"):
        return names
    if any(checkpoint.glob("global_step*")):  # DeepSpeed's, with the optimizer's state
        names += _expected_of_deepspeed(checkpoint, processes)
    else:
        names += ["scheduler.pt", *([] if any(checkpoint.glob("optimizer*")) else ["optimizer.pt"])]
    return names + (["rng_state.pth"] if processes == 1 else [f"rng_state_{i}.pth" for i in range(processes)])


def _expected_of_deepspeed(checkpoint: Path, processes: int) -> list[str]:
    if not (checkpoint / "latest").is_file():
        return ["latest"]
    folder = (checkpoint / "latest").read_text().strip()
    found = len(list((checkpoint / folder).glob("*optim_states.pt")))
    return [] if found >= max(processes, 1) else [f"{folder}/*optim_states.pt of process {found}"]


def read_record(checkpoint: str) -> dict[str, Any]:
    """Return what we recorded in `checkpoint`; nothing if another trainer made it."""
    return read_json(Path(checkpoint) / RECORD_FILE) or {}


def quantization_in(config: Any) -> dict[str, Any] | None:
    """Return the quantization of a model, by its configuration, as a record has it; None if there is none."""
    found = getattr(config, "quantization_config", None)
    return found if isinstance(found, dict) or found is None else found.to_dict()


def quantization_of(record: dict[str, Any]) -> dict[str, Any]:
    """Return bitsandbytes' configuration of the run that left `record`, empty if its base was not quantised."""
    found = record.get("quantization")
    if found is not None:
        return {key: found[key] for key in QUANTIZATION if key in found}
    recipe = record.get("recipe") or {}  # of a version that recorded no more
    if recipe.get("load_in_4bit"):
        quant_type, double = recipe.get("bnb_4bit_quant_type", "nf4"), recipe.get("use_bnb_nested_quant", False)
        return {"load_in_4bit": True, "bnb_4bit_quant_type": quant_type, "bnb_4bit_use_double_quant": double}
    return {"load_in_8bit": True} if recipe.get("load_in_8bit") else {}


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def pickled_text(path: Path, key: str) -> str | None:
    """Return the text of `key` in a file of torch's; empty if there is none, None if the file can't be read.

    It reads the pickle's instructions and runs none of them.
    """
    try:
        with zipfile.ZipFile(path) as file:
            name = next(name for name in file.namelist() if name.endswith("data.pkl"))
            instructions = [*pickletools.genops(file.read(name))]
    except (OSError, ValueError, StopIteration, zipfile.BadZipFile):
        return None
    memo: dict[Any, Any] = {}
    last = None
    for opcode, argument, _ in instructions:
        if "PUT" in opcode.name:
            memo[argument] = last
            continue
        value = memo.get(argument) if "GET" in opcode.name else argument
        if last == key:
            return value if isinstance(value, str) else ""
        last = value
    return ""


def last_whole(folder: Path) -> tuple[Path | None, dict[Path, str]]:
    """Return the last whole checkpoint of `folder`, or None, and the later ones with what is wrong with each."""
    found = {int(path.name[11:]): path for path in folder.glob("checkpoint-*") if re.fullmatch(r"\d+", path.name[11:])}
    broken: dict[Path, str] = {}
    for _, path in sorted(found.items(), reverse=True):
        why = why_broken(path)
        if why is None:
            return path, broken
        broken[path] = why
    return None, broken
