"""The command line of a run: its config's dataclass, filled in by YAML files and `--section.key
value`."""

import difflib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from types import MappingProxyType
from typing import Any, NoReturn, TypeVar

import jax
from jsonargparse import ArgumentParser

from pvm_jax.command_line import HelpFormatter

Config = TypeVar("Config")


class Parser(ArgumentParser):
    """An argument parser that proposes the nearest option for a misspelt one."""

    def error(self, message: str, *args, **kwargs) -> NoReturn:
        """Prints `message` with a suggestion where it names an unknown option, and exits."""
        unknown = _UNKNOWN_OPTION.findall(message)
        known = sorted({key for action in self._actions for key in _names(action.option_strings)})
        for groups in unknown:
            word = next(filter(None, groups))
            near = difflib.get_close_matches(word, known, n=1) or difflib.get_close_matches(
                word, [key.rpartition(".")[2] for key in known], n=1
            )
            if near:
                message += f". Did you mean {near[0]!r}?"
        super().error(message, *args, **kwargs)


_UNKNOWN_OPTION = re.compile(
    r"unrecognized arguments: --([\w.]+)|[Oo]ption '([\w.]+)'|[Kk]ey '([\w.]+)'"
)


def _names(option_strings: Sequence[str]) -> list[str]:
    return [option.removeprefix("--") for option in option_strings]


def parse(
    cls: type[Config],
    argv: Sequence[str] | None,
    *,
    prog: str,
    description: str,
    examples: str,
    flags: Mapping[str, str] = MappingProxyType({}),
) -> tuple[Config, set[str]]:
    """An instance of the dataclass `cls` from `--config FILE` (YAML) and overriding `--section.key
    value` arguments.

    Args:
        flags: options without a value that do not belong to a config, as "--dry-run", and their
            help.

    Returns:
        The instance, and those of `flags` that were given.

    Exits with a message that names the key for unknown, missing or ill-typed values and for what
    `cls` itself refuses.
    """
    parser = Parser(
        prog=prog,
        usage=f"{prog} --config FILE [--key value ...]",
        description=description,
        epilog=examples,
        formatter_class=HelpFormatter,
    )
    parser.add_argument("--config", action="config", help="YAML file; later options override it")
    for flag, help_text in flags.items():
        parser.add_argument(flag, action="store_true", help=help_text)
    parser.add_class_arguments(cls)
    namespace = parser.parse_args(argv)
    try:
        values = vars(parser.instantiate(namespace))
        given = {flag for flag in flags if values.pop(flag.removeprefix("--").replace("-", "_"))}
        values.pop("config")
        config = cls(**values)
        _refuse_non_finite(config)
        return config, given
    except ValueError as error:
        parser.error(str(error))


def _refuse_non_finite(config: Any) -> None:
    """ValueError for a number of the dataclass `config` that is none, or infinite, naming its key:
    comparisons let NaN pass."""
    for path, value in jax.tree.leaves_with_path(asdict(config)):
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(
                f"{jax.tree_util.keystr(path, simple=True, separator='.')} must be finite, got"
                f" {value}"
            )
