"""The one idiom of all command lines: options from a dataclass or a function, errors in one line.

An option is `--key value` or `--key=value`, `--section.key value` for what is inside a section.
Keys are spelt as in YAML files and in Python, and `-` may stand for `_`. `--flag` alone is true.
A list takes the words up to the next option. `--config FILE` gives any of the keys in YAML.
"""

import difflib
import functools
import inspect
import math
import re
import sys
import traceback
from argparse import SUPPRESS, RawDescriptionHelpFormatter
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, NoReturn, Protocol, TypeVar, Union, get_args, get_origin

import yaml
from jsonargparse import ArgumentParser, DefaultHelpFormatter, Namespace

from pvm_jax.files.yaml_file import read_yaml

Config = TypeVar("Config")


class Main(Protocol):
    """A command's entry; None: the process's arguments."""

    def __call__(self, argv: Sequence[str] | None = None) -> None: ...


USERS_ERRORS = (ValueError, OSError, ImportError, RuntimeError, FloatingPointError)
"""What is raised for what a user can change; whatever else a command raises is a bug in it."""

TRACEBACK = "--traceback"
_TRACEBACK_FLAG = {"traceback": "of an error, show where it was raised"}
_FAILED, _INTERRUPTED = 2, 130
_NO_FLAGS: dict[str, str] = {}
_STARTED_AS: ContextVar[str | None] = ContextVar("started_as", default=None)
"""What `dispatch` calls the command that it has called."""


def command(main: Callable[[Sequence[str]], None]) -> Main:
    """A command's entry: what `main` raises ends the process with one line on stderr, `error: …`.

    The status is 2, and 130 after Ctrl-C. With --traceback, where it was raised comes before. In
    Python it is the cause of the SystemExit.
    """

    @functools.wraps(main)
    def entry(argv: Sequence[str] | None = None) -> None:
        words = sys.argv[1:] if argv is None else list(argv)
        try:
            main(words)
        except (Exception, KeyboardInterrupt) as error:
            raise SystemExit(report(error, with_traceback=TRACEBACK in words)) from error

    return entry


def report(error: BaseException, *, with_traceback: bool) -> int:
    """Says on stderr what ended a command. Returns the exit status."""
    if with_traceback:
        traceback.print_exception(error)
    status, text = _FAILED, str(error) or type(error).__name__
    if isinstance(error, KeyboardInterrupt):
        status, text = _INTERRUPTED, "interrupted"
    elif not isinstance(error, USERS_ERRORS):
        text = f"{type(error).__name__}: {error} (a bug; {TRACEBACK} shows where)"
    print("error:", re.sub(r"\s*\n\s*", " ", text), file=sys.stderr, flush=True)
    return status


def dispatch(
    argv: Sequence[str], commands: Mapping[str, tuple[str, Main]], *, prog: str, description: str
) -> None:
    """Calls the one of `commands` that `argv` names first with the rest of it.

    Args:
        commands: name -> (a line of help, its entry).

    Raises:
        ValueError: if there is no such command.
    """
    name, *rest = argv or ["--help"]
    if name in ("-h", "--help"):
        width = max(map(len, commands))
        lines = [f"  {name:{width}}  {line}" for name, (line, _) in commands.items()]
        print(f"usage: {prog} COMMAND ...\n\n{description.strip()}\n\ncommands:", *lines, sep="\n")
        print(f"\n`{prog} COMMAND --help` shows what each of them takes.")
    elif name in commands:
        token = _STARTED_AS.set(f"{prog} {name}")
        try:
            commands[name][1](rest)
        finally:
            _STARTED_AS.reset(token)
    else:
        raise ValueError(
            f"there is no command {name!r}, but {', '.join(commands)}{_nearest(name, commands)}"
        )


def run_as_command(function: Callable[..., Any]) -> None:
    """Calls `function` with the process's arguments, as a command whose module ends with this.
    Parameters without a default may be given by place."""
    parameters = inspect.signature(function).parameters.values()
    spec = function.__globals__["__spec__"]

    @command
    def main(argv: Sequence[str]) -> None:
        values, _ = arguments(
            function,
            argv,
            prog=f"python -m {spec.name}",
            description=(inspect.getdoc(function) or "").partition("\n\n")[0],
            by_place=[one.name for one in parameters if one.default is one.empty],
        )
        function(**values)

    main()


def parse(cls: type[Config], argv: Sequence[str], **options: Any) -> tuple[Config, set[str]]:
    """An instance of the dataclass `cls` from `argv`, and those of the flags that were given.

    `options` are those of `arguments`, and so is what is raised.
    """
    values, given = arguments(cls, argv, **options)
    return cls(**values), given


def arguments(
    of: Callable[..., Any],
    argv: Sequence[str],
    *,
    prog: str,
    description: str,
    examples: str = "",
    by_place: Sequence[str] = (),
    repeated: Collection[str] = (),
    flags: dict[str, str] = _NO_FLAGS,
) -> tuple[dict[str, Any], set[str]]:
    """What `argv` and the files of --config give for the parameters of `of`, by name.

    Prints the help, which ends with `examples` as they are written, and exits for --help; prints
    the values as YAML and exits for --print_config.

    Args:
        of: a dataclass or a function; its annotations are the types, its docstring is the help.
        prog: the command's name in help, description and examples, unless `dispatch` has another.
        by_place: keys whose values may also be given without them, in this order.
        repeated: keys of lists that take one value, and may be given several times.
        flags: options that belong to no parameter, and their help.

    Returns:
        The values, and those of `flags` that were given.

    Raises:
        ValueError: for unknown, missing or ill-typed values, numbers that are not finite or have
            more than 32 bits, and what a dataclass refuses; it names the key.
    """
    name = _STARTED_AS.get() or prog
    parser = _parser(
        of,
        name,
        usage=" ".join([name, *(f"[{key.upper()}]" for key in by_place), "[--key value ...]"]),
        description=description.replace(prog, name),
        epilog=examples.replace(prog, name),
        flags=tuple((flags | _TRACEBACK_FLAG).items()),
    )
    namespace = parser.parse_args(_Words(parser, by_place, repeated).expand(argv))
    _refuse_null(parser, namespace)
    try:
        values = vars(parser.instantiate(namespace))
    except ValueError as error:  # of a section that may be left out, in the parser's words
        parser.error(str(error), error)
    values.pop("config")
    given = {flag for flag in (*flags, *_TRACEBACK_FLAG) if values.pop(flag, False)} & flags.keys()
    for key, value in values.items():
        _refuse_unbounded(key, value)
    return values, given


@functools.lru_cache(maxsize=64)
def _parser(
    of: Callable[..., Any], name: str, *, flags: Sequence[tuple[str, str]], **texts: str
) -> "Parser":
    """A command's parser: to make it takes longer than to parse with it."""
    style: Any = {"formatter_class": HelpFormatter, **texts}
    parser = Parser(prog=name, allow_abbrev=False, **style)
    parser.add_argument("--config", action="config", help="YAML file; later options override it")
    for flag, help_text in flags:
        # Suppressed where it is not given: --print_config prints what belongs in a file.
        parser.add_argument(f"--{flag}", action="store_true", default=SUPPRESS, help=help_text)
    if inspect.isclass(of):
        parser.add_class_arguments(of)
    else:
        parser.add_function_arguments(of)
    return parser


def given_options(argv: Sequence[str]) -> Iterator[tuple[str, str]]:
    """(key, value) of the options in `argv`, as they are written but for the key's spelling; the
    value is "" where there is none."""
    for word, after in zip(argv, [*argv[1:], ""], strict=True):
        if word.startswith("--"):
            name, equals, value = _spelled(word).partition("=")
            yield name.removeprefix("--"), value if equals else "" if after[:2] == "--" else after


class HelpFormatter(RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """Shows types and defaults, and the examples line by line."""


class Parser(ArgumentParser):
    """An argument parser that raises ValueError, and proposes the nearest for a misspelt key."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raises ValueError, with a proposal where `message` names an unknown key."""
        known = sorted({option.lstrip("-").rstrip("+") for option in self._option_string_actions})
        for word in filter(None, (word for words in _UNKNOWN.findall(message) for word in words)):
            if "Did you mean" not in message:  # a section's own parser has said it before
                last = [key.split(".")[-1] for key in known]
                message += _nearest(word, known) or _nearest(word, last)
        if not self.exit_on_error:  # a section's own, which the whole's asks
            super().error(message, ex)
        for pattern, text in _PLAINER.items():
            message = re.sub(pattern, text, message, flags=re.DOTALL)
        raise ValueError(message.strip()) from ex


_PLAINER = {  # what the parser says -> in plainer words
    r'Parser key "([\w.]+)"': r"\1",
    r"\s*Given value type: .*": "",
    r"argument (--[\w.]+)/\1\+": r"argument \1",
    r"\s*Does not validate against any of the Union subtypes\s*Subtypes: [^\n]*\s*Errors:": "",
    r"\s*Problem with given class_path '[\w.]+':": "",
    r"Not a valid subclass of (\w+)": r"expected keys and values (\1)",
    r"\s*Subclass types expect one of:(?:\n\s*- a [^\n]*)*": "",
    r"Expected a dot import path string: ": "expected keys and values, got ",
    r"Expected a (?:<class '(\w+)'>|typing\.(\w+\[[^\n]*?\]))": r"expected \1\2",
    r"\. Got value: ": ", got ",
    r"Unable to load config '([^\n]*)'\s*- [\w.]+: .*": r"must be keys and values, got '\1'",
    r"(^|:)\s*- *((?:(?!\n\s*- ).)+)\n\s*- expected NoneType$": r"\1 \2",
}
_UNKNOWN = re.compile(r"unrecognized arguments: --([\w.]+)|[Oo]ption '([\w.]+)'|r key '([\w.]+)'")


def _nearest(word: str, known: Collection[str]) -> str:
    longer = [key for key in known if key.startswith(word)]
    near = difflib.get_close_matches(word, known, n=1) or longer
    return f". Did you mean {near[0]!r}?" if near else ""


class _Words:
    """Rewrites a command line as `--key=value` throughout, which is what the parser reads."""

    def __init__(self, parser: Parser, by_place: Sequence[str], repeated: Collection[str]):
        self.parser, self.repeated = parser, repeated
        self.places = deque(by_place)
        self.options = parser._option_string_actions
        self.seen: set[str] = set()

    def expand(self, argv: Sequence[str]) -> list[str]:
        """The words of `argv`, rewritten."""
        words, expanded = deque(argv), []
        while words:
            word = words.popleft()
            if word == "--":
                expanded += map(self._place, words)
                break
            if re.match(r"-[^\d.]", word):
                expanded += self._option(_spelled(word), words)
            else:
                expanded.append(self._place(word))
        return expanded

    def _place(self, word: str) -> str:
        if not self.places:
            self.parser.error(f"unexpected argument {word!r}: give it as --key {word}")
        return f"--{self.places.popleft()}={word}"

    def _option(self, option: str, words: deque[str]) -> Iterator[str]:
        """An option, rewritten; its values are taken from `words`."""
        name, equals, value = option.partition("=")
        action, key = self.options.get(name), name.removeprefix("--")
        kind = getattr(action, "_typehint", None)
        if name == "--print_config" or (action is not None and action.nargs == 0):
            yield option
            return
        if equals:
            values = [value]
        elif kind is bool:
            follows = words and words[0].lower() in ("true", "false")
            values = [words.popleft() if follows else "true"]
        elif f"{name}+" in self.options and key not in self.repeated:
            values = _taken(words, len(words))
        else:
            values = _taken(words, 1)
        if not values:
            yield name
        elif len(values) > 1 or (_is_list(kind) and name[-1] != "+" and values[0][:1] != "["):
            if key not in self.repeated or key not in self.seen:
                yield f"{name}=[]"
            yield from (f"{name}+={value}" for value in values)
        else:
            yield from self._emptied(key, values[0])
            yield f"{name}={values[0]}"
        self.seen.add(key)

    def _emptied(self, key: str, text: str) -> Iterator[str]:
        """`--key=[]` for lists of sections that `text` gives: the parser would take what one of
        their sections leaves out from the list that was there before."""
        file = Path(text) if key == "config" and Path(text).is_file() else None
        if not file and text[:1] not in ("[", "{"):
            return
        try:
            given = read_yaml(file) if file else yaml.safe_load(text)
        except yaml.YAMLError:
            return  # text, or for the parser to refuse
        if file and "config" in given:
            self.parser.error(f"{file}: 'config' is for the command line: give both files there")
        key = "" if key == "config" else key
        for place in _lists_of_sections(key, given):
            parts = place.split(".")
            above = (self.options.get("--" + ".".join(parts[:n])) for n in range(1, len(parts) + 1))
            if any(hasattr(action, "_typehint") for action in above):
                yield f"--{place}=[]"


def _spelled(word: str) -> str:
    """The option `word` with the key as Python spells it: `--dry-run` is `--dry_run`."""
    name, equals, value = word.removeprefix("--").partition("=")
    return "--" + name.replace("-", "_") + equals + value if word.startswith("--") else word


def _taken(words: deque[str], most: int) -> list[str]:
    """Takes the words up to the next option from `words`, no more than `most`."""
    taken = []
    while words and len(taken) < most and not words[0].startswith("--"):
        taken.append(words.popleft())
    return taken


def _is_list(kind: Any) -> bool:
    """Whether values of this type are lists, and nothing else (but None)."""
    kinds = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    return all(get_origin(one) in (list, Sequence) or one is type(None) for one in kinds)


def _lists_of_sections(key: str, value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _lists_of_sections(f"{key}.{name}".lstrip("."), inner)
    elif isinstance(value, list) and any(isinstance(one, dict) for one in value):
        yield key


def _refuse_null(parser: Parser, namespace: Namespace) -> None:
    """ValueError for null where it is no value, and for a section that is no keys and values."""
    for action in parser._actions:
        key, kind = action.dest, getattr(action, "_typehint", None)
        if key == "config" or key not in namespace or action.nargs == 0:
            continue
        value = namespace[key]
        if kind is None and not isinstance(value, Namespace):
            parser.error(f"{key} must be keys and values, got {value!r:.80}")
        if kind is not None and value is None and type(None) not in get_args(kind):
            parser.error(f"{key} must not be null: leave it out for its default")


def _refuse_unbounded(key: str, value: Any) -> None:
    """ValueError for a number that is none (comparisons let NaN pass), infinite, or whole and of
    more than the 32 bits that arrays hold: of a larger seed JAX would take the last 32 bits, and
    draw what another seed draws. No option counts bytes."""
    if isinstance(value, int) and not -(2**31) <= value < 2**31:
        raise ValueError(f"{key} must be a whole number between -2^31 and 2^31, got {value}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{key} must be finite, got {value}")
    if is_dataclass(value):
        parts = {field.name: getattr(value, field.name) for field in fields(value)}
    else:
        parts = dict(enumerate(value)) if isinstance(value, list | tuple) else {}
    for name, part in parts.items():
        _refuse_unbounded(f"{key}.{name}", part)
