"""Whether the packages that training with TRL needs are installed, within the bounds that our own metadata declares."""

import operator
import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, requires, version

from ..errors import DependencyError

# What all but the core needs, where our own metadata does not say it, as in a checkout that is not installed
STACK = ("accelerate", "datasets", "peft", "torch", "transformers", "trl")

NOT_INSTALLED = "not installed"

COMPARISONS = {">=": operator.ge, "<=": operator.le, "<": operator.lt, ">": operator.gt, "==": operator.eq, "!=": operator.ne}


def bounds() -> dict[str, str]:
    """Return each declared dependency with its bounds, `{"trl": "<2,>=1.15"}`; empty where the package is not installed."""
    try:
        lines = [line for line in requires("bl_trainer") or [] if "extra ==" not in line]
    except PackageNotFoundError:
        return {}
    found = [re.fullmatch(r"([\w.-]+)\s*\(?([^;)]*)\)?.*", line) for line in lines]
    return {match[1]: match[2].strip() for match in found if match}


@contextmanager
def needs_stack(what: str) -> Iterator[None]:
    """Raise DependencyError, which names `what`, unless all that is declared is installed within its bounds.

    It lists all that is missing. It is raised too where code within imports a package that is not installed.
    """
    declared = bounds() or dict.fromkeys(STACK, "")
    states = {name + bound: _state(name, bound) for name, bound in declared.items()}
    _refuse(what, {name: state for name, state in states.items() if state})
    try:
        yield
    except ModuleNotFoundError as error:
        name = str(error.name).partition(".")[0]
        if name == "bl_trainer":
            raise
        _refuse(what, {f"{name}{declared.get(name, '')}": NOT_INSTALLED})


def _refuse(what: str, wrong: dict[str, str]) -> None:
    if wrong:
        needs = ", ".join(f"{name} ({state})" for name, state in wrong.items())
        install = "Run `pip install " + " ".join(f"'{name}'" for name in wrong) + "`"
        if any(state != NOT_INSTALLED for state in wrong.values()):  # another stack may have pinned it
            install += " in an environment of its own"
        raise DependencyError(f"Cannot use {what}: it needs {needs}. {install}; objectives and `as_loss` work without them.")


def _state(name: str, bound: str) -> str | None:
    """Return what is wrong with an installed package, None if nothing is."""
    try:
        found = version(name)
    except PackageNotFoundError:
        return NOT_INSTALLED
    limits = re.findall(r"([<>=!]=?)\s*([\w.]+)", bound)
    fits = all(COMPARISONS[sign](_release(found), _release(limit)) for sign, limit in limits)
    return None if fits else f"{found} is installed"


def _release(text: str) -> tuple[int, ...]:
    """Return the numbers of a version, without its pre-release, development or local part."""
    return tuple(int(number) for number in re.sub(r"[^\d.].*", "", text).split(".") if number)
