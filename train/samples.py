"""Generated answers as people read them in TensorBoard."""

from typing import NamedTuple

import numpy as np

from pvm_jax.images import read_image
from pvm_jax.messages import Messages, parse


class Sample(NamedTuple):
    """One generated answer: the question, the first image [H, W, 3] uint8 if there is one, what was and what should be said."""

    question: str
    image: np.ndarray | None
    answer: str
    truth: str

    @property
    def markdown(self) -> str:
        """All of it but the image."""
        return "\n\n".join([self.question, "**answered**", self.answer, "**truth**", self.truth])


def text_of(messages: Messages) -> str:
    """The text parts of all messages."""
    contents = [message["content"] for message in messages]
    parts = [[{"type": "text", "text": content}] if isinstance(content, str) else content for content in contents]
    return "\n\n".join(part["text"] for content in parts for part in content if part["type"] == "text")


def first_image(messages: Messages) -> np.ndarray | None:
    """[H, W, 3] uint8; None where there is no image."""
    images = parse(messages, ()).images
    return np.asarray(read_image(images[0][1]).convert("RGB")) if images else None
