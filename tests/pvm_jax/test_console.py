"""The command `pvm`: which command it calls with which words, and what it says of others."""

import sys
from importlib import import_module
from types import SimpleNamespace

import pytest

from pvm_jax import __version__, console
from pvm_jax.console import COMMANDS, RECIPES, main

CALLS = {
    ("convert",): ("convert.hf_to_orbax", "main"),
    ("export",): ("convert.orbax_to_hf", "main"),
    ("adapter",): ("convert.adapter", "main"),
    ("dataset",): ("convert.dataset", "main"),
    ("train", "sft"): ("train.sft.__main__", "main"),
    ("train", "grpo"): ("train.grpo.__main__", "main"),
    ("fit",): ("train.fit.__main__", "main"),
    ("generate",): ("pvm_jax.__main__", "generate"),
    ("measure",): ("pvm_jax.__main__", "measure"),
}


@pytest.fixture
def called(monkeypatch) -> list[tuple[str, str, list[str]]]:
    """(module, entry, arguments) of every command that was called, in place of the command."""
    calls = []

    def pretend(module: str) -> SimpleNamespace:
        return SimpleNamespace(
            main=lambda argv: calls.append((module, "main", argv)),
            generate=lambda argv: calls.append((module, "generate", argv)),
            measure=lambda argv: calls.append((module, "measure", argv)),
        )

    monkeypatch.setattr(console.importlib, "import_module", pretend)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return calls


@pytest.mark.parametrize("words", CALLS)
def test_a_command_is_there_and_takes_help(words, capsys, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(SystemExit) as stopped:
        main([*words, "--help"])
    assert stopped.value.code == 0
    said, (module, entry) = capsys.readouterr().out, CALLS[words]
    assert said.startswith(f"usage: pvm {' '.join(words)} ")
    assert f"\n  pvm {' '.join(words)} " in said[said.index("\nexamples:") :]
    own = f"python -m {module.removesuffix('.__main__')}" + f" {entry}" * (entry != "main")
    assert own not in said
    with pytest.raises(SystemExit):
        getattr(import_module(module), entry)(["--help"])
    assert capsys.readouterr().out.startswith(f"usage: {own} ")


@pytest.mark.parametrize(("words", "entry"), CALLS.items())
def test_a_command_gets_what_follows_its_name(words, entry, called):
    main([*words, "--config", "a.yaml"])
    assert called == [(*entry, ["--config", "a.yaml"])]


def test_every_command_is_tested():
    names = {(name,) for name in COMMANDS if name != "train"} | {
        ("train", name) for name in RECIPES
    }
    assert names == CALLS.keys()


def test_modules_of_the_user_are_found_behind_all_others(called, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    main(["fit"])
    assert called
    assert sys.path[-1] == str(tmp_path)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["mesure"], "there is no command 'mesure', but convert, export, "),
        (["mesure"], "Did you mean 'measure'?"),
        (["train", "stf"], "Did you mean 'sft'?"),
    ],
)
def test_another_word_is_an_error_that_names_the_nearest(words, said, called, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert said in error
    assert error.count("\n") == 1
    assert not called


def test_help_lists_the_commands_and_version_is_the_packages(called, capsys):
    main([])
    main(["--help"])
    main(["train"])
    main(["--version"])
    *helps, version = capsys.readouterr().out.splitlines()
    for names, times in ((COMMANDS, 2), (RECIPES, 1)):
        assert all(sum(line.startswith(f"  {name} ") for line in helps) == times for name in names)
    assert version == __version__
    assert not called
