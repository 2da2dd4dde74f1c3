"""Whether the branch recalls: its attention on the cell that the answer is about."""

from collections.abc import Sequence

import numpy as np

from demo.evaluate import EvaluationSettings, encode, value_places
from demo.task import COLUMNS, GridExample
from pvm_jax.data.processor import Processor
from pvm_jax.measure.looked import looked
from pvm_jax.measure.reading import find_answers
from pvm_jax.model.qwen3_vl import Qwen3VL


def attention_on_cell(
    model: Qwen3VL,
    processor: Processor,
    examples: Sequence[GridExample],
    settings: EvaluationSettings,
) -> dict[str, list[float]]:
    """By layer of the branch and head: the mean share of attention on the asked cell, where its
    value is to be said.

    Chance is one over the number of cells. All examples have grids of one size, `settings.size`.
    """
    encoded = encode(examples, processor)
    places = np.stack([value_places(example, settings.lines) for example in encoded])
    columns = np.take_along_axis(find_answers(encoded).columns, places, axis=1)
    cells = np.array(
        [
            [visual_token(cell, settings.size) for cell, _, _ in example.lines]
            for example in examples
        ]
    )
    branch = looked(model, encoded, columns, rows=settings.batch_size).branch
    asked = np.take_along_axis(branch, cells[:, None, None, :, None], axis=-1)
    shares = asked.mean((0, 3, 4))
    return {
        str(layer): share.tolist()
        for layer, share in zip(sorted(map(int, model.pvm)), shares, strict=True)
    }


def visual_token(cell: str, size: int) -> int:
    """Visual tokens are in reading order, one a cell."""
    return (int(cell[1]) - 1) * size + COLUMNS.index(cell[0])
