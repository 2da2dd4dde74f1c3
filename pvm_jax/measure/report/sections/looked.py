"""Where a model looks as it writes, drawn over the images."""

from collections.abc import Sequence

import numpy as np

from pvm_jax.data.example import Example, Frame, visual_runs
from pvm_jax.data.processor import Processor
from pvm_jax.measure.looked import Looked, looked
from pvm_jax.measure.pictures import picture
from pvm_jax.measure.reading import find_answers
from pvm_jax.measure.report.captions import caption
from pvm_jax.measure.report.figures import AttentionMap
from pvm_jax.measure.report.section import Section
from pvm_jax.measure.report.task import Models, Task, own_answers
from pvm_jax.model.qwen3_vl import Qwen3VL


def measure_looks(models: Models, task: Task) -> Section:
    """`looked` for `task.looks`, of the first model, drawn over the images."""
    name, model = next(iter(models.items()))
    examples, tokens, columns = _answered(name, model, task)
    found = looked(model, examples, columns, rows=task.rows, chunk=task.chunk)
    attention = _sharpest_attention(found, sorted(map(int, model.pvm)))
    pixels, merge = task.processor.image_settings, model.config.vision.spatial_merge_size
    panels = []
    for place, (example, (number, _)) in enumerate(zip(examples, task.looks, strict=True)):
        seen = visual_runs(example, model.config)
        panels.append(
            AttentionMap(
                f"looked_{place}",
                _said(task.processor, example, int(columns[place, 0]), tokens[place]),
                caption("look", token=tokens[place], number=number),
                [picture(f.pixels, f.rows, f.columns, pixels, model.config.vision) for f in seen],
                {layer: _maps(values[place], seen, merge) for layer, values in attention.items()},
            )
        )
    return Section("looked", "Where it looked", panels, text=caption("looked", name=name))


def _answered(name: str, model: Qwen3VL, task: Task) -> tuple[list[Example], list[int], np.ndarray]:
    """Of each look of the task: its conversation with the model's own answer in place of the true
    one, which token of that answer is looked at, from 0, and its column, [looks, 1]."""
    own = own_answers(name, model, task)
    examples = [own[number] for number, _ in task.looks]
    answers = find_answers(examples)
    tokens = [
        int((place + 0.5) / len(examples) * length) if token is None else min(token, length - 1)
        for place, (length, (_, token)) in enumerate(
            zip(answers.lengths.tolist(), task.looks, strict=True)
        )
    ]
    columns = np.take_along_axis(answers.columns, np.array(tokens)[:, None], 1)
    return examples, tokens, columns


def _sharpest_attention(found: Looked, branches: Sequence[int]) -> dict[str, np.ndarray]:
    """The attention on the image, [looks, V], of the branch's sharpest head, where the layers
    `branches` have one, and of the decoder's sharpest layer; by the report's names."""
    layer = _sharpest(found.decoder[:, :, 0])
    decoder = {f"decoder, layer {layer}": found.decoder[:, layer, 0]}
    if not branches:
        return decoder
    looks, _, heads = found.branch.shape[:3]
    of_heads = found.branch[:, :, :, 0].reshape(looks, len(branches) * heads, -1)
    at, head = divmod(_sharpest(of_heads), heads)
    return {f"branch, layer {branches[at]}": found.branch[:, at, head, 0]} | decoder


def _sharpest(attention: np.ndarray) -> int:
    """Of attention [looks, choices, V], the choice whose attention on the image is the most
    concentrated, over all looks."""
    shares = attention / np.maximum(attention.sum(-1, keepdims=True), 1e-9)
    entropy = -(shares * np.log(np.maximum(shares, 1e-9))).sum(-1)
    return int(entropy.mean(0).argmin())


def _said(processor: Processor, example: Example, column: int, token: int) -> str:
    """The token of this column, behind those of the answer before it, of which there are
    `token`."""
    before = processor.decode(example.input_ids[column - min(4, token) : column]).strip()
    said = processor.decode(
        example.input_ids[column : column + 1], skip_special_tokens=False
    ).strip()
    return f"{'…' if token > 4 else ''}{before} → {said}".lstrip()


def _maps(values: np.ndarray, seen: Sequence[Frame], merge: int) -> list[np.ndarray]:
    """Attention on visual tokens [V] -> a map [rows, columns] for each frame."""
    grids = [(frame.rows // merge, frame.columns // merge) for frame in seen]
    ends = np.cumsum([rows * columns for rows, columns in grids])
    return [
        part.reshape(grid)
        for part, grid in zip(np.split(values[: ends[-1]], ends[:-1]), grids, strict=True)
    ]
