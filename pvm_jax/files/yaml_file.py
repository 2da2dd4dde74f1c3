"""YAML files of options, read as they are meant: what YAML would settle in silence is an error."""

import json
import re
from pathlib import Path
from typing import Any

import yaml

_SafeLoader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # as the parser's own
_INT = "tag:yaml.org,2002:int"
_MERGE = "tag:yaml.org,2002:merge"
_MISLEADING = re.compile(r"[-+]?0[\d_]|.*:")
"""010 is 8 in YAML, and 1:30 is 90."""


class _Loader(_SafeLoader):
    """Refuses a key that stands twice, and numbers that are not what they look like."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if key.tag != _MERGE and isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.MarkedYAMLError(
                        problem=f"the key {key.value!r} stands twice", problem_mark=key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        if _MISLEADING.match(node.value):
            raise yaml.MarkedYAMLError(
                problem=f"{node.value} is not the number that it looks like: without leading 0 or"
                " colon it is, in quotes it is a text",
                problem_mark=node.start_mark,
            )
        return super().construct_yaml_int(node)


_Loader.add_constructor(_INT, _Loader.construct_yaml_int)


def is_yaml(path: str | Path) -> bool:
    """Whether this is what YAML files are called."""
    return str(path).endswith((".yaml", ".yml"))


def read_yaml(file: Path) -> dict[str, Any]:
    """The keys and values in `file`.

    Raises:
        ValueError: naming file and line, if it is no YAML in UTF-8, holds something else than keys
            and values, a key twice, or a number that is not what it looks like.
        OSError: if it cannot be read.
    """
    try:
        content = yaml.load(file.read_text(encoding="utf-8"), _Loader)
        json.dumps(content, default=str)  # raises for what holds itself by an alias
    except yaml.MarkedYAMLError as error:
        line = "" if error.problem_mark is None else f":{error.problem_mark.line + 1}"
        raise ValueError(f"{file}{line}: {error.problem or error.context}") from error
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{file} cannot be read as YAML: {error}") from error
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ValueError(f"{file} must hold keys and values in YAML, got {content!r:.80}")
    return content
