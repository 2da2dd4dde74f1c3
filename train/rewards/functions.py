"""What a completion is worth: functions (completion, example) -> float, which train.rewards.worker
calls in its own process.

Importing this imports nothing heavy: a worker must start fast, and without JAX.
"""

# ruff: noqa: RUF001 (letters that look like others are what this is about)
import importlib
import logging
import math
import re
import unicodedata
from collections.abc import Callable, Mapping
from typing import Any, cast

RewardFunction = Callable[[str, Mapping[str, Any]], float]

SOLUTION = "solution"
"""The example's key that `accuracy_reward` compares with."""


def check_name(function: str) -> None:
    """ValueError if `function` is neither built in nor an import path; imports nothing."""
    if function not in ("format", "accuracy") and not re.fullmatch(r"[\w.]+:\w+", function):
        raise ValueError(
            f'reward {function!r} is neither "format", "accuracy" nor an import path'
            ' "package.module:function"'
        )


def load_reward_function(function: str) -> RewardFunction:
    """The grader called "format" or "accuracy", or the user's own at "package.module:function".

    Raises:
        ValueError: if there is none, naming `function` and what is wrong.
    """
    check_name(function)
    if function == "format":
        return format_reward
    if function == "accuracy":
        try:
            same_answer(
                "$1$", "1"
            )  # imports math-verify and fills its tables: the first completion's time is its own
        except ImportError as error:
            raise ValueError(
                "reward 'accuracy' needs math-verify: pip install 'pvm-jax[rl]'"
            ) from error
        return accuracy_reward
    module, _, name = function.partition(":")
    try:
        grader = getattr(importlib.import_module(module), name)
    except Exception as error:
        raise ValueError(
            f"reward {function!r} cannot be imported: {type(error).__name__}: {error}"
        ) from error
    if not callable(grader):
        raise ValueError(f"reward {function!r} is no function but {grader!r}")
    return cast(RewardFunction, grader)


_THINK_THEN_ANSWER = re.compile(
    r"<think>(?:(?!</think>).)*</think>\s*<answer>(?:(?!</answer>).)*</answer>\s*",
    re.DOTALL,
)


def format_reward(completion: str, example: Mapping[str, Any]) -> float:
    """1 if the whole completion is <think>…</think>, white space, <answer>…</answer>, white space;
    else 0.

    Neither content may hold its own closing tag.
    """
    del example
    return float(_THINK_THEN_ANSWER.fullmatch(completion) is not None)


def accuracy_reward(completion: str, example: Mapping[str, Any]) -> float:
    """1 if what stands in the completion's first <answer> equals `example["solution"]`, as
    `same_answer` says; else 0."""
    after = completion.partition("<answer>")[2]
    answer, closed, _ = after.partition("</answer>")
    return float(bool(closed) and same_answer(str(example[SOLUTION]), answer))


def same_answer(solution: str, answer: str) -> bool:
    """Whether two final answers are equal.

    Where the solution is a multiple-choice letter, alone or with the option's text ("B", "(B)", "B.
    12 cm"), the answer's letter decides; an answer without a letter must equal the option's text.
    Words are compared as words, without regard to case and punctuation. Everything else (numbers,
    LaTeX, intervals, sets, equations, …) is compared by math-verify, and no account is taken of
    units. An answer that is hedged ("42 or 41", "not 42") or says several things equals the
    solution only if all of them do.

    It may take for ever ("10^{10^{10}}"): whoever calls it limits its time.
    """
    right, chosen = _CHOICE.fullmatch(_plain(solution)), _ANSWERED_CHOICE.fullmatch(_plain(answer))
    if right and chosen:
        return right["letter"].upper() == chosen["letter"].upper()
    if right:
        return bool(right["text"]) and _same_value(right["text"], answer)
    return _same_value(solution, answer) or bool(
        chosen and chosen["text"] and _same_value(solution, chosen["text"])
    )


# A letter alone, or marked and followed by the option's text: "A. text", "(A) text", "A: text".
# What joins several options ("A, C", "(A) or (B)", one a line) is no choice. A bare lower-case
# letter is a variable in a solution; an answer may be careless.
_NEXT = r"\n\s*+[(\[]?[A-Z](?:[)\].:：．、]|\s*+$)|\b(?i:or)\s+[(\[]?[A-Z][)\].:：]"
_MARKED = (
    r"(?:[)\].:：．、]++\s*+(?!(?i:or|and)\b|[,/&;]|[(\[][A-Za-z][)\]]|[A-Z]\s*+$)"
    rf"(?P<text>(?:(?!{_NEXT}).)*+))?"
)
_CHOICE = re.compile(rf"[(\[]?(?P<letter>[A-Z]|(?<=\()[a-z](?=\))){_MARKED}", re.DOTALL)
_ANSWERED_CHOICE = re.compile(
    r"(?:(?:the\s+)?(?:correct\s+|final\s+|right\s+)?(?:answer|option|choice)(?:\s+is\b)?[\s:：]*)*"
    rf"[(\[]?(?P<letter>[A-Z]){_MARKED}",
    re.DOTALL | re.IGNORECASE,
)
_WRAPPING = re.compile(r"\\(?:boxed|text|textbf|mathrm|mathbf|mbox)\b|\\[()\[\]]|[{}$`]|\*\*")


def _plain(text: str) -> str:
    """The text without what LaTeX and Markdown wrap a word or a letter in."""
    return _WRAPPING.sub("", text).strip()


def _same_value(solution: str, answer: str) -> bool:
    if solution.split() == answer.split():
        return bool(solution.strip())
    if any(hedge.search(answer) and not hedge.search(solution) for hedge in _HEDGES):
        return False
    said = _statements(answer)
    if len(said) < 2 or len(_statements(solution)) > 1:
        return _same_statement(solution, answer)
    listed = ", ".join(statement.strip(".").replace("$", "") for statement in said)
    return _same_statement(solution, listed) or all(
        _same_statement(solution, statement) for statement in said
    )


# What leaves an answer open, and what denies it; a solution that does the same is answered alike.
_HEDGES = (
    re.compile(
        r"\b(?:or|either|maybe|perhaps|possibly|alternatively|unless|except)\b|\\lor\b|∨",
        re.IGNORECASE,
    ),
    re.compile(
        r"\b(?:not|never|neither|nor|cannot|\w+n['’]t)\b|!=|≠|¬|\\(?:neq?|not|neg|lnot)\b",
        re.IGNORECASE,
    ),
)
# Where a statement ends and another begins; math-verify would take the last one alone.
_BORDER = re.compile(
    r"(?<=[\w)}\]$])[.!?]\s+(?=\S)|\.\.+|…|-+>|=>|[→⇒]|\s\|\s|\\(?:to|rightarrow|Rightarrow|implies)\b"
    r"|(?<=[$\d)}])\s+(?=\$)|(?<=\})\s*(?=\\boxed)|(?<=\\[\])])\s*(?=\\[\[(])"
)


def _statements(text: str) -> list[str]:
    """The statements of a text; of those with digits these alone, "The answer is" is none then."""
    lines = [text] if r"\begin{" in text else text.splitlines()
    found = [part.strip() for line in lines for part in _BORDER.split(line)]
    with_digits = [part for part in found if re.search(r"\d", part)]
    return with_digits or [part for part in found if re.search(r"\w", part)]


def _same_statement(solution: str, answer: str) -> bool:
    solution, answer = (_without_unit(_to_latex(text)) for text in (solution, answer))
    if words := _words(solution):
        return words == _words(answer)
    if _DATE.fullmatch(solution) or bool(_RELATION.match(solution)) != bool(
        _RELATION.match(answer)
    ):
        return False
    # math-verify rounds to six places, 1.6e-19 and 9.1e-31 to 0, and of 41 = 42 takes the 42.
    one = _decimal(solution)
    others = [_decimal(side.strip()) for side in answer.split("=")]
    if one is not None and any(
        other is not None and not math.isclose(one, other, rel_tol=1e-5) for other in others
    ):
        return False
    return _verified(solution, answer)


_DATE = re.compile(r"\d+([-/:.])\d+\1\d+")  # whose parts would be terms of a difference
_RELATION = re.compile(r"\$?\s*(?:[<>]|\\(?:le|ge|ne|lt|gt|leq|geq|neq)\b)")  # "<4" is no 4


def _decimal(text: str) -> float | None:
    """The value of a plain decimal number, 2.5 or 2.5 \\times 10^{-6}."""
    found = re.fullmatch(
        r"\$?\s*([-+]?(?:\d+(?:\.\d*)?|\.\d+))(?:\s*\\(?:times|cdot)\s*10\^\{?([-+]?\d+)\}?)?\s*\$?",
        text,
    )
    return float(f"{found[1]}e{found[2] or 0}") if found else None


def _without_unit(text: str) -> str:
    """The number of a number with a unit, "36" of "Area = 36 cm^2" or "36 people"; any other text
    as it is."""
    found = _QUANTITY.fullmatch(_plain(text))
    words = re.findall(r"[^\W\d_]+", (found and found["unit"]) or "")
    unit = all(
        word in _UNITS_OF_ONE_LETTER if len(word) == 1 else not _NO_UNIT.fullmatch(word)
        for word in words
    )
    return found["number"] if found and unit else text


_QUANTITY = re.compile(
    r"(?:[^\d=]*=)?\s*(?P<number>[-+]?\d[\d,]*(?:\.\d+)?(?:/\d+)?)"
    r"(?:\s*\^\\circ\s*[CFK]|\s+(?P<unit>[^\W\d_]\D*?)(?:\^[23])?)\.?"
)
_UNITS_OF_ONE_LETTER = "mgshlNJWVAKCFL"  # all others are variables
_NO_UNIT = re.compile(
    "or|and|to|plus|minus|times|over|mod|percent|hundred|thousand|million|billion|trillion|dozen|half|halves|thirds?|quarters?"
    "|squared|cubed|pi|sqrt"
)


def _words(text: str) -> list[str]:
    """The words of a text that is nothing but words (their letters would be factors of a product),
    else none."""
    text = _plain(text)
    words = re.findall(r"[^\W\d_]+", text.casefold())
    only_words = re.fullmatch(r"[^\W\d_]+(?:[\s'’,;-]+[^\W\d_]+)*[.!。！]?", text)
    return (
        words if only_words and any(len(word) > 1 or not word.isascii() for word in words) else []
    )


_SYMBOLS = str.maketrans(
    {
        "−": "-",
        "–": "-",
        "⁄": "/",
        "÷": "/",
        "×": r"\times ",
        "·": r"\cdot ",
        "√": r"\sqrt ",
        "π": r"\pi ",
        "°": r"^\circ ",
    }
    | {
        "∞": r"\infty ",
        "≤": r"\le ",
        "≥": r"\ge ",
        "≠": r"\ne ",
        "∪": r"\cup ",
        "∩": r"\cap ",
        "∈": r"\in ",
        "∠": r"\angle ",
    }
)


def _to_latex(text: str) -> str:
    """Unicode's fractions, exponents, wide letters and signs, and a programmer's numbers, as
    math-verify reads them."""
    text = text.replace(r"\$", "")  # a dollar is no delimiter
    text = re.sub(r"(?<![\w.])(\d+(?:\.\d*)?)[eE]([-+]?\d+)(?!\w)", r"\1\\times 10^{\2}", text)
    text = re.sub(r"[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻]+", lambda run: f"^{{{run[0]}}}", text)
    text = re.sub(r"[₀₁₂₃₄₅₆₇₈₉]+", lambda run: f"_{{{run[0]}}}", text)
    text = re.sub(
        r"[¼-¾⅐-⅞]",
        lambda sign: r"\frac{{{}}}{{{}}}".format(
            *unicodedata.normalize("NFKC", sign[0]).split("⁄")
        ),
        text,
    )
    return unicodedata.normalize("NFKC", text).translate(_SYMBOLS).strip()


def _verified(solution: str, answer: str) -> bool:
    from math_verify import parse, verify

    # Its own time limits are signals, which a library in C can hold up: the worker's limit is the
    # one that holds.
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that it has none
    expected, found = (parse(_delimited(text), parsing_timeout=0) for text in (solution, answer))
    return verify(expected, found, allow_set_relation_comp=True, timeout_seconds=0)


def _delimited(text: str) -> str:
    """With the $…$ that math-verify needs to take LaTeX for LaTeX."""
    return text if re.search(r"\$|\\\(|\\\[|\\boxed", text) else f"${text}$"
