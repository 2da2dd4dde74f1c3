"""The command `pvm`: which command it calls with which words, and what it says of others."""

import importlib
import sys
from types import SimpleNamespace

import pytest

from pvm_jax import __version__, console
from pvm_jax.console import COMMANDS, main


@pytest.fixture
def called(monkeypatch) -> list[tuple[str, list[str]]]:
    """(module, arguments) of every command that was called, in place of the command."""
    calls = []

    def pretend(module: str) -> SimpleNamespace:
        return SimpleNamespace(main=lambda argv: calls.append((module, argv)))

    monkeypatch.setattr(console.importlib, "import_module", pretend)
    return calls


def test_every_command_is_a_main_that_takes_arguments():
    for name, command in COMMANDS.items():
        assert callable(importlib.import_module(command.module).main), name


def test_a_command_gets_what_follows_its_name(called):
    main(["train", "sft", "--config", "a.yaml"])
    main(["generate", "--help"])
    main(["convert"])
    assert called == [
        ("train.sft.__main__", ["--config", "a.yaml"]),
        ("pvm_jax.__main__", ["generate", "--help"]),
        ("convert.hf_to_orbax", []),
    ]


def test_modules_of_the_user_are_found_behind_all_others(called, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    main(["fit"])
    assert sys.path[-1] == str(tmp_path)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["mesure"], "pvm has no command 'mesure'. Did you mean 'measure'?"),
        (["train", "stf"], "pvm has no command 'train stf'. Did you mean 'train sft'?"),
        (["train"], "pvm has no command 'train'. Did you mean 'train sft'?"),
        (["!"], "There are convert, export, dataset, train sft, "),
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
    main(["--version"])
    *helps, version = capsys.readouterr().out.splitlines()
    assert all(sum(line.startswith(f"  {name} ") for line in helps) == 2 for name in COMMANDS)
    assert version == __version__
    assert not called
