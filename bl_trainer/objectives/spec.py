"""Reading an objective as a recipe spells it: its name, its parameters, and what it is composed with."""

import importlib
import math
import re
import sys
from collections.abc import Callable, Mapping
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .._util.text import from_json, is_number, nearest, to_exponent, to_number
from ..errors import RecipeError
from .composition import KEYS, Schedule
from .functions import anneal, log_one_minus_p, neg_p, nll, power
from .published import PUBLISHED

if TYPE_CHECKING:
    from .objective import Objective

OBJECTIVES: dict[str, Callable[..., Tensor]] = {
    "nll": nll,
    "neg_p": neg_p,
    "power": power,
    "log_one_minus_p": log_one_minus_p,
    "anneal": anneal,
    **PUBLISHED,
}


def read_spec(spec: Any) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """Return the name of an objective, its own parameters, and its composition as it is spelled. Raises RecipeError."""
    spec = named(from_json("objective", spec, '{"name": "power", "alpha": 10}'))
    given = spec if isinstance(spec, Mapping) else {"name": spec}
    name = given.get("name")
    if not isinstance(name, str) or not name:
        raise RecipeError(
            f"`objective` must be a name or a mapping with `name`, got {spec!r}. Write `objective: neg_p`, with parameters "
            "`{name: power, alpha: 10}`."
        )
    parameters = {key: _setting(key, value) for key, value in given.items() if key not in ("name", *KEYS)}
    return name, parameters, {key: given[key] for key in KEYS if key in given}


def named(spec: Any) -> Any:
    """Return the spec of an objective with import paths in place of functions, fit for a recipe and a checkpoint.

    A function may stand wherever a name may: as the spec itself, as `name`, and in `mix` and `special_tokens`. An `Objective`
    and a `Schedule` become their mappings. Raises RecipeError on a function that an import path doesn't lead to.
    """
    if hasattr(spec, "to_dict"):
        return spec.to_dict()
    if isinstance(spec, Mapping):
        return {named(key): named(value) for key, value in spec.items()}
    if isinstance(spec, (list, tuple)):
        return [named(each) for each in spec]
    return _path_of(spec) if callable(spec) else spec


def _path_of(function: Callable[..., Any]) -> str:
    """Return the name in `OBJECTIVES`, or the import path, of a function. Raises RecipeError if it has none."""
    for name, own in OBJECTIVES.items():
        if function is own:
            return name
    module, name = getattr(function, "__module__", None), getattr(function, "__qualname__", "")
    if name.endswith("<lambda>") or "<locals>" in name:
        what = "a lambda" if name.endswith("<lambda>") else "defined within another function"
        raise RecipeError(
            f"Cannot record the objective {name.rpartition('.')[2]!r} in a checkpoint: it is {what}, so it cannot be imported. "
            "Define it with `def` at the top level of a module."
        )
    try:
        found = attrgetter(name)(sys.modules[str(module)])
    except (AttributeError, KeyError):
        found = None
    if found is not function or module == "builtins":
        raise RecipeError(
            f"Cannot record the objective {function!r} in a checkpoint: no import path leads to it. Give a function from the "
            'top level of a module. Its parameters go beside it: `{"name": my_losses.gated, "gamma": 2}`.'
        )
    return f"{module}:{name}"


def read_composition(spec: Mapping[str, Any], parse: "Callable[[Any], Objective]") -> dict[str, Any]:
    """Return the fields of `Objective` that `floor`, `mix` and `special_tokens` make; `parse` reads an objective."""
    read: dict[str, Callable[[Any], Any]] = {
        "floor": _floor,
        "mix": lambda value: _mix(value, parse),
        "special_tokens": lambda value: _part("special_tokens", value, parse),
    }
    return {key: read[key](value) for key, value in spec.items()}


def function_of(name: str) -> Callable[..., Tensor]:
    """Return the function behind a name in `OBJECTIVES` or an import path. Raises RecipeError."""
    head = re.split(r"\W", name)[0]
    if head in OBJECTIVES and name != head and not name.partition(":")[2].isidentifier():
        raise RecipeError(
            f"Cannot read `objective: {name}`: parameters go in a mapping. Write `objective: {{name: power, alpha: 2}}`, on "
            """the command line as JSON: `--objective '{"name": "power", "alpha": 2}'`."""
        )
    if ":" in name:
        return _import(name)
    if name not in OBJECTIVES:
        raise RecipeError(
            f"Unknown objective {name!r}.{nearest(name, OBJECTIVES)} Built in: {', '.join(OBJECTIVES)}. Your "
            "own function goes by its import path, e.g. `objective: my_package.losses:my_objective`."
        )
    return OBJECTIVES[name]


def _setting(key: str, value: Any) -> Any:
    return Schedule.parse(key, value) if Schedule.is_meant(value) else to_exponent(value)


def _bounded(what: str, value: Any, most: float, advice: str) -> Any:
    """Read a number from 0 to `most`, or a schedule of such."""
    setting = to_number(_setting(what, value))
    for end in (setting.start, setting.end) if isinstance(setting, Schedule) else (setting,):
        if not is_number(end) or not 0 <= end <= most:
            limits = "0 or above" if most == math.inf else f"between 0 and {most:g}"
            raise RecipeError(f"`{what}` must be a number {limits}, or a schedule of such, got {value!r}. {advice}")
    return setting


def _floor(value: Any) -> Any:
    return _bounded("floor", value, 1, "It is the smallest weight of a token on the NLL gradient, e.g. `floor: 0.1`.")


def _mix(spec: Any, parse: "Callable[[Any], Objective]") -> "tuple[tuple[Objective, Any], ...]":
    example = "Write `mix: {nll: 0.1}`, or with parameters `mix: [{name: power, alpha: 10, weight: 0.1}]`."
    if not isinstance(spec, (Mapping, list, tuple)) or not spec:
        raise RecipeError(f"`mix` must be objectives with their weights, got {spec!r}. {example}")
    if isinstance(spec, Mapping):
        if "name" in spec or any(isinstance(weight, Mapping) and not Schedule.is_meant(weight) for weight in spec.values()):
            raise RecipeError(f"`mix` with an objective's parameters must be a list, got {dict(spec)}. {example}")
        spec = [{"name": name, "weight": weight} for name, weight in spec.items()]
    for other in spec:
        if not isinstance(other, Mapping) or not {"name", "weight"} <= other.keys():
            near = "".join(nearest(key, ["weight"]) for key in other if key != "name") if isinstance(other, Mapping) else ""
            raise RecipeError(f"Each of `mix` must have a `name` and a `weight`, got {other!r}.{near} {example}")
    return tuple(
        (
            _part("mix", {name: value for name, value in other.items() if name != "weight"}, parse, example),
            _bounded("weight", other["weight"], math.inf, f"It is that of {other['name']!r} in `mix`. {example}"),
        )
        for other in spec
    )


def _part(key: str, spec: Any, parse: "Callable[[Any], Objective]", example: str = "") -> "Objective":
    """Read an objective within another; `example` takes the place of what a message says to write for one on its own."""
    try:
        part = parse(spec)
    except RecipeError as error:
        what, write, how = str(error).partition(" Write `objective: ")
        how = "" if not write else f" {example}" if example else f" Write `{key}: {how}"
        what = what.replace("`objective` must", "it must")
        raise RecipeError(f"In `{key}` of the objective: {what}{how}") from error
    if part.special_tokens is not None:
        raise RecipeError(f"`special_tokens` within `{key}` would mean nothing: write it once, beside `name`.")
    return part


def _import(path: str) -> Callable[..., Tensor]:
    module_name, _, attribute = path.partition(":")
    hint = "Write `objective: package.module:function`; the module must be importable from where you launch."
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise RecipeError(f"Cannot import objective {path!r}: {type(error).__name__}: {error}. {hint}") from error
    try:
        function = attrgetter(attribute)(module)
    except AttributeError as error:
        raise RecipeError(f"Module {module_name!r} has no {attribute!r}.{nearest(attribute, vars(module))} {hint}") from error
    if not callable(function):
        raise RecipeError(f"Objective {path!r} is a {type(function).__name__}, not a function. {hint}")
    return function
