"""What is marked in a picture is found at its visual tokens."""

import numpy as np
import pytest
from PIL import Image

from demo.checkpoint import write_assets
from pvm_jax import Processor
from pvm_jax.data.boxes import read_boxes, touched


def test_a_box_marks_the_tokens_that_it_touches():
    marks = touched([(0, 0, 1, 1), (50, 20, 100, 40)], 100, 40, rows=2, columns=4)
    np.testing.assert_array_equal(marks.reshape(2, 4), [[1, 0, 0, 0], [0, 0, 1, 1]])
    assert touched([(0, 0, 100, 40)], 100, 40, rows=2, columns=4).all()
    assert not touched([], 100, 40, rows=2, columns=4).any()


@pytest.mark.parametrize(
    ("boxes", "told"),
    [
        ("0 0 1 1", "boxes must be a list"),
        ([[0, 0, 1]], r"a box is \[x0, y0, x1, y1\] in pixels"),
        ([[0, 0, 1, "1"]], r"a box is \[x0, y0, x1, y1\] in pixels"),
        ([[5, 0, 5, 1]], "needs 0 <= x0 < x1"),
        ([[-1, 0, 5, 1]], "needs 0 <= x0 < x1"),
    ],
)
def test_what_is_no_box_is_refused(boxes, told):
    with pytest.raises(ValueError, match=told):
        read_boxes(boxes)


def test_the_marked_tokens_of_a_conversation_are_columns_of_its_own_images(tmp_path):
    """Of the second of two pictures, which has another size than the model reads it in."""
    write_assets(tmp_path)
    processor = Processor.from_pretrained(tmp_path)
    image = processor.tokenizer.convert_tokens_to_ids("<|image_pad|>")

    def encode(**more):
        pictures = [
            {"type": "image", "image": Image.new("RGB", (64, 32))},
            {"type": "image", "image": Image.new("RGB", (50, 70))} | more,
        ]
        return processor.encode([{"role": "user", "content": pictures}])

    plain, boxed = encode(), encode(boxes=[[0, 0, 50, 5]])
    assert plain.evidence is None
    np.testing.assert_array_equal(plain.input_ids, boxed.input_ids)
    shown = np.flatnonzero(plain.input_ids == image)
    first, (rows, columns) = 2, plain.image_grid_thw[1, 1:] // 2
    assert len(shown) == first + rows * columns
    np.testing.assert_array_equal(boxed.evidence, shown[first : first + columns])  # the first row
    with pytest.raises(ValueError, match=r"content\[1\]: boxes: .* beyond the picture of 50 x 70"):
        encode(boxes=[[0, 0, 51, 5]])
