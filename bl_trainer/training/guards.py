"""What would let a run end without having learnt: nothing trainable, no step, names that match nothing."""

import functools
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from torch import nn

from .._util.text import nearest
from ..errors import RecipeError


def leaves_no_empty_folder(method: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate a trainer's method that may refuse: empty folders that the trainer has made for its output go away again."""

    @functools.wraps(method)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return method(self, *args, **kwargs)
        except Exception:
            for folder in getattr(self, "made_folders", ()):
                with suppress(OSError):  # it is not empty, or another process was first
                    folder.rmdir()
            raise

    return wrapped


def missing_folders(folder: Path) -> list[Path]:
    """Return what of `folder` and its parents isn't there yet, the innermost first."""
    return [path for path in (folder, *folder.parents) if not path.exists()]


def refuse_frozen(model: nn.Module) -> None:
    """Raise RecipeError if no parameter of `model` trains."""
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise RecipeError(
            f"Cannot train {type(model).__name__}: all its parameters are frozen. Load an adapter with `is_trainable=True`, "
            "or call `requires_grad_(True)` on what is to train."
        )


def refuse_dropped(rows: int, per_step: int, name: str, key: str) -> None:
    """Raise RecipeError if `dataloader_drop_last` drops all `rows` of a set, of which `per_step` make a batch."""
    if rows < per_step:
        raise RecipeError(
            f"Cannot use the {name} set: `dataloader_drop_last: true` drops its only batch, {rows} rows where all processes "
            f"take {per_step}. Remove the key, or lower `{key}`."
        )


def refuse_unmatched(peft_model: Any) -> None:
    """Raise RecipeError on a name in the active adapter's configuration that matches nothing in the model."""
    config, base = peft_model.peft_config[peft_model.active_adapter], peft_model.get_base_model()
    modules = [name for name, _ in base.named_modules(remove_duplicate=False)]
    parameters = [name.replace(".base_layer", "") for name, _ in base.named_parameters(remove_duplicate=False)]
    for key, present, ends in (
        ("target_modules", modules, _ends_at_dot),
        ("exclude_modules", modules, _ends_at_dot),
        ("target_parameters", parameters, _ends_at_dot),
        ("modules_to_save", modules, str.endswith),  # for which PEFT doesn't ask for a dot
    ):
        wanted = getattr(config, key, None) or ()
        if isinstance(wanted, str) and not any(re.fullmatch(wanted, each) for each in modules):
            _refuse_name(wanted, key, base, modules)
        for name in () if isinstance(wanted, str) else sorted(wanted):
            if not any(ends(each, name) for each in present):
                _refuse_name(name, key, base, present)


def _ends_at_dot(key: str, name: str) -> bool:
    return key == name or key.endswith(f".{name}")


def _refuse_name(name: str, key: str, base: nn.Module, present: list[str]) -> NoReturn:
    recipe_key = key if key == "exclude_modules" else f"lora_{key}"
    near = nearest(name.split(".")[-1], sorted({each.split(".")[-1] for each in present}))
    raise RecipeError(
        f"Cannot apply `{recipe_key}`: {name!r} matches nothing in {type(base).__name__}.{near} Correct the name or remove it."
    )
