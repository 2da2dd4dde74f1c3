"""What all command lines share: how options are spelt, what is refused, how errors end a
command."""

import contextlib
import runpy
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

import jax
import pytest

from pvm_jax.options import arguments, command, dispatch, given_options, parse


@dataclass(frozen=True)
class Part:
    """A section of a list.

    Attributes:
        name: its name.
        weight: its weight.
    """

    name: str
    weight: float = 1.0


@dataclass(frozen=True)
class Section:
    """A section.

    Attributes:
        sources: names, or parts.
        rate: a number.
    """

    sources: str | list[str | Part] = "a"
    rate: float = 0.5


@dataclass(frozen=True)
class Example:
    """An example of options.

    Attributes:
        src: a place.
        max_new_tokens: a count.
        plain: yes or no.
        layers: counts.
        marks: texts.
        image: texts, one at a time.
        parts: sections.
        inner: a section.
        held_out: a section, or none.
    """

    src: str
    max_new_tokens: int = 1
    plain: bool = False
    layers: list[int] | None = None
    marks: Sequence[str] = field(default_factory=list)
    image: Sequence[str] = field(default_factory=list)
    parts: list[Part] = field(default_factory=list)
    inner: Section = field(default_factory=Section)
    held_out: Section | None = None

    def __post_init__(self):
        if self.max_new_tokens < 1:
            raise ValueError(f"--max_new_tokens must be at least 1, got {self.max_new_tokens}")


def read(*argv: str) -> Example:
    return parse(
        Example,
        argv,
        prog="example",
        description="An example.",
        examples="examples:\n  example a --plain",
        by_place=["src"],
        repeated=["image"],
        flags={"dry_run": "try"},
    )[0]


@pytest.fixture
def file(tmp_path):
    """text -> the options that read it."""

    def write(text: str) -> list[str]:
        (tmp_path / "config.yaml").write_text(text)
        return ["--config", str(tmp_path / "config.yaml")]

    return write


@pytest.mark.parametrize(
    "argv",
    [
        ["a", "--max_new_tokens", "3", "--plain"],
        ["--max-new-tokens=3", "--plain", "a"],
        ["--src", "a", "--plain=true", "--max-new_tokens", "3"],
        ["--plain", "True", "--max_new_tokens=3", "--", "a"],
    ],
)
def test_both_spellings_and_places_are_one(argv):
    assert read(*argv) == Example("a", max_new_tokens=3, plain=True)


def test_a_list_takes_words_up_to_the_next_option_and_keeps_them_as_they_are():
    assert read("--src", "[{a").src == "[{a"
    given = read("a", "--layers", "5", "-3", "--marks", "2:40", "on", "[x", "--plain", "false")
    assert (given.layers, given.marks, given.plain) == ([5, -3], ["2:40", "on", "[x"], False)
    assert read("a", "--layers", "[5, 11]").layers == read("a", "--layers=[5,11]").layers == [5, 11]
    assert read("a", "--layers", "1", "--layers", "2").layers == [2]
    assert read("--image", "b", "--image", "c", "a").image == ["b", "c"]
    assert read("a", "--inner.sources", "b", "c").inner.sources == ["b", "c"]
    assert read("a", "--inner.sources", "b").inner.sources == "b"


def test_a_list_replaces_one_of_a_file_whole(file):
    """Also where as many sections are in both, and one leaves a key out that the other gives."""
    before = file(
        "{src: a, parts: [{name: b, weight: 7}], inner: {sources: [{name: c, weight: 8}]},"
        " held_out: {sources: [{name: d, weight: 9}], rate: 2}}"
    )
    plain = [Part("e")]
    assert read(*before).parts == [Part("b", 7.0)]
    assert read(*before, "--parts", "[{name: e}]").parts == plain
    assert read(*before, "--inner.sources=[{name: e}]").inner.sources == plain
    assert read(*before, "--held-out.sources", "[{name: e}]").held_out == Section(plain, 2.0)
    assert read(*before, "--held_out={sources: [{name: e}]}").held_out == Section(plain, 2.0)
    assert read(*before, "--parts+={name: e}").parts == [Part("b", 7.0), *plain]


def test_a_list_of_a_second_file_replaces_the_first_ones(file, tmp_path):
    second = tmp_path / "second.yaml"
    second.write_text("{parts: [{name: e}], held_out: {sources: [{name: e}]}}")
    both = read(*file("{src: a, parts: [{name: b, weight: 7}]}"), "--config", str(second))
    assert (both.parts, both.held_out) == ([Part("e")], Section([Part("e")]))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "required: src"),
        (["a", "b"], "unexpected argument 'b'"),
        (["a", "--max_new_token", "3"], "--max_new_token=3. Did you mean 'max_new_tokens'?"),
        (["a", "--max", "3"], "unrecognized arguments: --max=3. Did you mean 'max_new_tokens'?"),
        (["a", "--inner.rat=3"], "Did you mean 'inner.rate'?"),
        (["a", "--held-out.rat=3"], "'rat' is not accepted. Did you mean 'rate'?"),
        (["a", "-plain"], "unrecognized arguments: -plain"),
        (["a", "--max_new_tokens"], "--max_new_tokens: expected one argument"),
        (["a", "--max_new_tokens", "--plain"], "--max_new_tokens: expected one argument"),
        (["a", "--max_new_tokens", "many"], "max_new_tokens:"),
        (["a", "--max_new_tokens", "0"], "--max_new_tokens must be at least 1, got 0"),
        (["a", "--layers"], "--layers: expected one argument"),
        (["a", "--max_new_tokens", str(2**31)], "max_new_tokens must be a whole number between "),
        (["a", "--max_new_tokens", str(-(2**31) - 1)], "between -2^31 and 2^31, got -2147483649"),
        (["a", "--inner.rate", ".nan"], "inner.rate must be finite, got nan"),
        (["a", "--parts=[{name: b, weight: .inf}]"], "parts.0.weight must be finite, got inf"),
        (["a", "--parts=[{name: b"], "parts:"),
        (["a", "--config", "nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_what_is_wrong_is_named(argv, message):
    with pytest.raises(ValueError) as raised:  # noqa: PT011
        read(*argv)
    assert message in str(raised.value)


def test_a_seed_of_more_bits_would_draw_what_another_draws():
    """Why whole numbers end at 2^31."""
    keys = [jax.random.key_data(jax.random.key(seed)).tolist() for seed in (5, 2**32 + 5)]
    assert keys[0] == keys[1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("src: [", r"config\.yaml:[12]: "),
        ("src: a\nsrc: b", r"config\.yaml:2: the key 'src' stands twice"),
        ("inner: {rate: 1, rate: 2}", r"config\.yaml:1: the key 'rate' stands twice"),
        ("src: a\nmax_new_tokens: 010", r"config\.yaml:2: 010 is not the number"),
        ("max_new_tokens: 1:30", r"config\.yaml:1: 1:30 is not the number"),
        ("a: &a {b: *a}", r"config\.yaml cannot be read as YAML"),
        ("\0", r"config\.yaml cannot be read as YAML"),
        ("- a", r"config\.yaml must hold keys and values"),
        ("config: b.yaml", r"config\.yaml: 'config' is for the command line"),
        ("src: a\nplain: null", "plain must not be null"),
        ("src: a\ninner: {rate: null}", r"inner\.rate must not be null"),
        ("src: a\ninner: false", "inner must be keys and values, got False"),
        ("src: a\nheld_out: 0", r"held_out:.*expected keys and values \(Section\)"),
        ("src: a\nparts: [3]", r"parts:.*expected keys and values \(Part\), got 3"),
    ],
)
def test_a_file_that_says_nothing_clear_is_named(file, content, message):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        read(*file(content))


def test_null_is_a_value_where_it_can_be(file):
    assert read(*file("src: a\nlayers: null\nheld_out: null")) == Example("a")


def test_help_ends_with_the_examples_and_a_printed_config_can_be_read_again(file, capsys):
    with pytest.raises(SystemExit, match=r"^0$"):
        read("--help")
    said = capsys.readouterr().out
    assert said.startswith("usage: example [SRC] [--key value ...]\n")
    assert said.endswith("\nexamples:\n  example a --plain\n")
    assert all(f"--{key}" in said for key in ("max_new_tokens", "inner.rate", "dry_run", "config"))
    with pytest.raises(SystemExit, match=r"^0$"):
        read("a", "--print-config", "--dry-run", "--layers", "3")
    printed = capsys.readouterr().out
    assert "dry_run" not in printed.replace("dry_run: true\n", "")
    assert read(*file(printed)) == Example("a", layers=[3])


def test_flags_are_no_part_of_the_values():
    values, given = arguments(
        Section, ["--dry-run", "--traceback"], prog="", description="", flags={"dry_run": "try"}
    )
    assert (values, given) == ({"sources": "a", "rate": 0.5}, {"dry_run"})


def test_given_options():
    argv = ["a", "--max-new-tokens", "3", "--held-out.rate=a-b", "--plain", "--layers"]
    assert dict(given_options(argv)) == {
        "max_new_tokens": "3",
        "held_out.rate": "a-b",
        "plain": "",
        "layers": "",
    }


@pytest.mark.parametrize(
    ("error", "line", "status"),
    [
        (ValueError("one\n  two"), "error: one two\n", 2),
        (FileNotFoundError(2, "No such file", "x"), "error: [Errno 2] No such file: 'x'\n", 2),
        (RuntimeError(), "error: RuntimeError\n", 2),
        (KeyError("x"), "error: KeyError: 'x' (a bug; --traceback shows where)\n", 2),
        (AssertionError("y"), "error: AssertionError: y (a bug; --traceback shows where)\n", 2),
        (KeyboardInterrupt(), "error: interrupted\n", 130),
    ],
)
def test_errors_end_a_command_with_one_line(error, line, status, capsys):
    @command
    def main(argv: Sequence[str]) -> None:
        raise error

    with pytest.raises(SystemExit) as ended:
        main([])
    assert (ended.value.code, ended.value.__cause__) == (status, error)
    assert capsys.readouterr().err == line
    with pytest.raises(SystemExit) as ended:
        main(["--traceback"])
    assert ended.value.code == status
    said = capsys.readouterr().err
    assert said.startswith("Traceback")
    assert said.endswith(line)


def test_a_command_is_found_by_its_name(refused, capsys):
    ran = []

    @command
    def main(argv: Sequence[str]) -> None:
        commands = {"measure": ("measures", lambda argv=None: ran.append(argv))}
        dispatch(argv, commands, prog="example", description="An example.")

    main(["measure", "a", "--b"])
    assert ran == [["a", "--b"]]
    for argv in ([], ["--help"]):
        main(argv)
        assert "\n  measure  measures\n" in capsys.readouterr().out
    assert refused(main, ["mesure"]) == (
        "error: there is no command 'mesure', but measure. Did you mean 'measure'?"
    )


def test_a_function_is_a_command(tmp_path, monkeypatch, capsys):
    """Its parameters are the options, those without a default by place too."""
    (tmp_path / "sums.py").write_text(
        "from pvm_jax.options import run_as_command\n\n\n"
        "def main(a: int, b: int = 2):\n"
        '    """Adds.\n\n    Args:\n        a: one.\n        b: the other.\n    """\n'
        "    print(a + b)\n\n\nrun_as_command(main)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    for argv, said in ((["3", "--b=4"], "7\n"), (["--help"], "usage: python -m sums [A] [--key")):
        monkeypatch.setattr(sys, "argv", ["sums.py", *argv])
        with contextlib.suppress(SystemExit):
            runpy.run_module("sums", run_name="__main__")
        assert capsys.readouterr().out.startswith(said)
