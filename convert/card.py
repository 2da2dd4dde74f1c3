"""The card of a model that is pushed to the Hub: what it is, of what, trained how, measured how."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from pvm_jax.config import ModelConfig
from pvm_jax.data.shards import SHARDS_INDEX
from pvm_jax.files.json_file import JsonObject, read_json, read_json_if_any

_RUN = "run.json"
_REPORT = "report.json"


def write_card(
    name: str,
    config: ModelConfig,
    *,
    base_model: str | None,
    parts: Mapping[str, Path],
    report: Path | None,
) -> str:
    """The card, in Markdown. What is not recorded is said not to be. Of paths of this machine it
    names the last part alone.

    Args:
        config: of what is exported.
        parts: what was put together, "branch" or "lora" or "checkpoint" -> its directory, beside
            which a run leaves its notes.
        report: the folder that `measure` wrote.

    Raises:
        FileNotFoundError, ValueError: if the report or the notes cannot be read.
    """
    head: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "image-text-to-text"}
    head["tags"] = ["qwen3_vl", *(["persistent-visual-memory"] if config.text.pvm_layers else [])]
    if base_model is not None:
        head["base_model"] = base_model
    lines = ["---", yaml.safe_dump(head, sort_keys=False).strip(), "---", "", f"# {name}", ""]
    lines += [*_what(config, parts), "", "## Of what", ""]
    lines += [f"The base model is {base_model or 'not recorded'}.", "", "## Trained how", ""]
    lines += _trained(parts)
    lines += ["", "## Measured how", "", *_measured(report), ""]
    return "\n".join(lines)


def _what(config: ModelConfig, parts: Mapping[str, Path]) -> Iterator[str]:
    layers = config.text.pvm_layers
    gate = ", its gate by token" if config.text.pvm_gate == "token" else ""
    if layers:
        yield (
            "A Qwen3-VL with the branch of Persistent Visual Memory"
            " ([arXiv 2605.00814](https://arxiv.org/abs/2605.00814)): beside the FFN of the decoder"
            f" layers {', '.join(map(str, layers))} (counted from 0), {config.text.pvm_hidden_size}"
            f" wide, recalling {config.text.pvm_visibility} images{gate}. With"
            " `trust_remote_code=True` transformers runs it; without, it leaves the branch out."
        )
    else:
        yield "A Qwen3-VL, as transformers' own `Qwen3VLForConditionalGeneration`."
    if "lora" in parts:
        yield "The updates of a LoRA adapter are merged into the weights."
    yield "Exported by pvm-jax."


def _trained(parts: Mapping[str, Path]) -> list[str]:
    lines = []
    for part, directory in parts.items():
        notes, what = read_json_if_any(directory.parent / _RUN), f"The {part}, by a run"
        while notes:
            lines += [f"{what} with these settings:", "", "| | |", "| --- | --- |"]
            lines += [f"| {key} | {_cell(value)} |" for key, value in _settings(notes)]
            lines += [""]
            begun = notes.text("branch", None)
            notes = read_json_if_any(Path(begun).parent / _RUN) if begun else None
            what = "It began with the branch of a run"
            if begun and not notes:
                lines += ["It began with a trained branch, of which no run's notes are left.", ""]
    return lines[:-1] or ["Not recorded: no run left its notes beside what was exported."]


def _settings(notes: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """The settings of a run that have a value and count, sections flat; sources by their names, no
    path."""
    for key, value in notes.items():
        if key == "lora" and notes.get("trainable") not in (None, "lora"):
            continue
        if key == "sources":
            yield f"{above}{key}", ", ".join(_source(one) for one in _several(value))
        elif isinstance(value, Mapping):
            yield from _settings(value, f"{above}{key}.")
        elif (
            key != "contents"
            and value is not None
            and not (isinstance(value, str) and "/" in value)
        ):
            yield f"{above}{key}", value


def _several(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _source(source: Any) -> str:
    """What a source was made of, where that is on the Hub; else the last part of its path."""
    path = Path(source["path"] if isinstance(source, Mapping) else source)
    made_of = read_json_if_any(path / SHARDS_INDEX).text("source", "")
    return made_of if made_of.startswith("hf://") else path.name


def _measured(report: Path | None) -> list[str]:
    if report is None:
        return ["Not measured."]
    content: JsonObject = read_json(report / _REPORT)
    origin = [(k, v) for k, v in (content.get("origin") or {}).items() if k != "command"]  # paths
    lines = _table([("", ""), *origin]) if origin else []
    sections = content.object("sections")
    for key in sections:
        section = sections.object(key)
        facts, rows = section.get("facts") or (), section.get("table") or []
        if facts or rows:
            lines += [f"### {section.text('title', key)}", "", *(f"- {fact}" for fact in facts), ""]
            lines += _table(rows)
    return lines[:-1]


def _table(rows: Sequence[Sequence[Any]]) -> list[str]:
    if not rows:
        return []
    first, *others = [f"| {' | '.join(map(_cell, row))} |" for row in rows]
    return [first, f"|{' --- |' * len(rows[0])}", *others, ""]


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")
