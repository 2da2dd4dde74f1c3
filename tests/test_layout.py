"""Two promises of the house: imports go down only, without a circle; and files, functions and lines
stay short."""

import ast
import os
import re
from collections import Counter
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = {
    "pvm_jax": [
        "files hf_config presets config options sharding",
        "data",
        "model",
        "checkpoint generation",
        "measure apps",
        "__main__ console",
    ],
    "train": ["config published mixture", "data step rewards", "run", "sft grpo", "fit"],
}
"""What may import what: a room reads those of its own floor and of the floors before it."""
PACKAGES = {
    "pvm_jax": {"pvm_jax"},
    "convert": {"convert", "pvm_jax"},
    "train": {"train", "pvm_jax"},
}
"""And which packages a package may read."""


def name_of(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts)


FILES = {name_of(file): file for package in PACKAGES for file in (ROOT / package).rglob("*.py")}


@cache
def nodes_of(file: Path) -> list[ast.AST]:
    return list(ast.walk(ast.parse(file.read_text())))


@cache
def imports(module: str) -> set[str]:
    """The modules of ours that `module` imports, also within functions."""
    found = set()
    for node in nodes_of(FILES[module]):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {
                name if name in FILES or f"{name}.__init__" in FILES else node.module
                for name in names
            }
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name if name in FILES else f"{name}.__init__" for name in found} & FILES.keys()


def test_nothing_imports_in_a_circle():
    order = list(TopologicalSorter({module: imports(module) for module in FILES}).static_order())
    assert len(order) > 80


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_reads_no_other_than_it_may(package):
    read = {
        name.split(".")[0]
        for module in FILES
        if module.startswith(f"{package}.")
        for name in imports(module)
    }
    assert read <= PACKAGES[package]


@pytest.mark.parametrize("package", FLOORS)
def test_no_arrow_goes_up(package):
    floor = {
        room: number for number, rooms in enumerate(FLOORS[package]) for room in rooms.split()
    } | {"__init__": len(FILES)}
    inside = [module for module in FILES if module.startswith(f"{package}.")]
    assert {module.split(".")[1] for module in inside} == floor.keys()
    for module in inside:
        for name in imports(module) & set(inside):
            assert floor[name.split(".")[1]] <= floor[module.split(".")[1]], (
                f"{module} imports {name}"
            )


def test_a_package_has_few_modules_of_its_own():
    for package, most in (("pvm_jax", 8), ("train", 4)):
        files = [file for file in (ROOT / package).glob("*.py") if file.name != "__init__.py"]
        assert len(files) <= most


def test_no_two_classes_share_a_name():
    packages = (*PACKAGES, "demo", "benchmarks", "examples")
    files = [file for package in packages for file in (ROOT / package).rglob("*.py")]
    nodes = [node for file in files for node in nodes_of(file)]
    names = Counter(node.name for node in nodes if isinstance(node, ast.ClassDef))
    assert [name for name, count in names.items() if count > 1] == []


def private_names() -> set[str]:
    """What our own modules define with a leading underscore."""
    nodes = [node for file in FILES.values() for node in nodes_of(file)]
    named = {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    named |= {
        node.id if isinstance(node, ast.Name) else node.attr
        for node in nodes
        if isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store)
    }
    return {name for name in named if name[0] == "_" and name[:2] != "__" and name != "_"}


def names_read(test: ast.Module) -> Iterator[tuple[str, int]]:
    """(name, line) of what a test imports, takes of something that is not its own, or replaces by
    setattr."""
    for node in ast.walk(test):
        if isinstance(node, ast.ImportFrom):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.Attribute):
            if not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")):
                yield node.attr, node.lineno
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "setattr":
            for word in node.args[:2]:
                if isinstance(word, ast.Constant) and isinstance(word.value, str):
                    yield word.value.rpartition(".")[2], node.lineno


def test_tests_read_no_private_name_of_ours():
    private = private_names()
    assert {"_nearest", "_places", "_FREE_KEYS"} <= private
    found = [
        f"{file}:{line}: {name}"
        for file in (ROOT / "tests").rglob("*.py")
        for name, line in names_read(ast.parse(file.read_text()))
        if name in private
    ]
    assert not found, "\n".join(found)


_OF_OTHERS = ("golden", "out", "build")


def ours(*suffixes: str) -> list[Path]:
    """The files of the repository with these names' ends, without what others wrote."""
    found = []
    for folder, folders, names in os.walk(ROOT):
        folders[:] = [name for name in folders if name[0] != "." and name not in _OF_OTHERS]
        found += [Path(folder) / name for name in names if name.endswith(suffixes)]
    return sorted(found)


def test_files_and_functions_are_short():
    """400 lines a file, 60 a function with its docstring; its decorators are not counted."""
    long = []
    for file in ours(".py"):
        text = file.read_text()
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                count = node.end_lineno - node.lineno + 1
                long += [f"{file}:{node.lineno}: {node.name} has {count}"] if count > 60 else []
        count = len(text.splitlines())
        long += [f"{file} has {count}"] if count > 400 else []
    assert not long, "\n".join(long)


def test_lines_have_at_most_100_columns():
    """Those of Python are ruff's. In Markdown the prose alone: tables, and code and output between
    fences or indented, have lines of their own."""
    long = []
    for file in ours(".md", ".yaml", ".toml", "Makefile"):
        fenced = False
        for number, line in enumerate(file.read_text().splitlines(), 1):
            fenced ^= file.suffix == ".md" and line.startswith("```")
            prose = not (fenced or line.startswith(("|", "    ")))
            if len(line) > 100 and (prose or file.suffix != ".md"):
                long.append(f"{file}:{number}")
    assert not long, "\n".join(long)


def test_every_file_of_the_packages_is_in_the_tree_of_the_docs():
    text = (ROOT / "docs" / "architecture.md").read_text()
    tree = re.findall(r"\w+", text[text.index("## The tree") : text.index("## Four paths")])
    assert {file.stem for file in FILES.values()} - {"__init__"} <= set(tree)
