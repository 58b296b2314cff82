"""TRL's parser of recipes, whose errors name the key."""

import re
from typing import Any

from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, TrlParser

from .._util.text import listed, sentence
from ..errors import RecipeError
from ..training.config import BLConfig
from .reading import unknown

DATACLASSES: Any = (ScriptArguments, BLConfig, ModelConfig, DatasetMixtureConfig)


class Parser(TrlParser):
    """TRL's parser, made to reject what it would ignore and to end in one sentence."""

    def error(self, message: str) -> Any:
        if wrong := re.fullmatch(r"argument (--\w+)\S*: invalid (int|float) value: '(.*)'", message):
            message = f"`{wrong[1]} {wrong[3]}` must be {'a whole number' if wrong[2] == 'int' else 'a number'}"
        raise RecipeError(message[:1].upper() + message[1:] + ".")

    @property
    def known(self) -> list[str]:
        """All recipe keys."""
        return [action.dest for action in self._actions if action.dest != "help"]

    def is_given(self, key: str, argv: list[str]) -> bool:
        """Whether the command line sets `key`."""
        options = {o for action in self._actions if action.dest == key for o in action.option_strings}
        return any(arg.split("=", 1)[0] in options for arg in argv)

    def check(self, argv: list[str]) -> None:
        """Raise RecipeError on options that there are not, for a verb without a recipe."""
        names = [arg.partition("=")[0] for arg in argv if arg.startswith("--")]
        wrong = [name[2:].replace("-", "_") for name in names if name not in self._option_string_actions]
        if wrong:
            raise RecipeError(listed([unknown(name, "", self.prog, self.known, "option") for name in wrong], "the options"))

    def parse(self, config: dict[str, Any], argv: list[str]) -> list[Any]:
        """Return the dataclasses that keys of a file and a command line make, the latter winning. Raises RecipeError."""
        try:
            return self._parse(config, argv)
        except RecipeError:
            raise
        except Exception as error:  # of the libraries' checks, which are of many kinds and seldom name the key
            message = sentence(error)
            if not any(re.search(rf"\b{key}\b", message) for key in self.known):
                message = f"{_suspects(config, message)}{message}"
            raise RecipeError(message) from error

    def _parse(self, config: dict[str, Any], argv: list[str]) -> list[Any]:
        parser = type(self)(self.dataclass_types, prog=self.prog, allow_abbrev=False)
        parser.set_defaults_with_config(**config)
        return list(parser.parse_args_into_dataclasses(argv, look_for_args_file=False))


def _suspects(config: dict[str, Any], message: str) -> str:
    """Return the start of a message that names no key: those that it spells otherwise or whose values it quotes, else all."""
    spelled = [key for key in config if re.search(rf"\b{key}\b", message, re.IGNORECASE)]
    quoted = [key for key, value in config.items() if isinstance(value, str) and repr(value) in message]
    names = ", ".join(f"`{key}`" for key in spelled or quoted or config)
    return f"Cannot use {names}: " if spelled or quoted else f"Cannot use one of the keys {names}: " if config else ""
