"""Generated answers as people read them in TensorBoard."""

from typing import NamedTuple

import numpy as np

from pvm_jax.data.image_files import read_image
from pvm_jax.data.messages import Messages, parse
from pvm_jax.data.video_files import first_frame


class Sample(NamedTuple):
    """One generated answer: the question, its images as one ([H, W, 3] uint8), what was and what
    should be said."""

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
    contents = [message.get("content") or [] for message in messages]
    parts = [
        [{"type": "text", "text": content}] if isinstance(content, str) else content
        for content in contents
    ]
    return "\n\n".join(
        part["text"] for content in parts for part in content if part["type"] == "text"
    )


def images_of(messages: Messages) -> np.ndarray | None:
    """All images, then each video's first frame, one beside the other: [H, W, 3] uint8; None where
    there is none."""
    conversation = parse(messages, ())
    sources = [source for _, source in conversation.images]
    sources += [first_frame(video) for _, video in conversation.videos]
    if not sources:
        return None
    images = [np.asarray(read_image(source)) for source in sources]
    height = max(map(len, images))
    return np.concatenate(
        [np.pad(image, ((0, height - len(image)), (0, 0), (0, 0))) for image in images], axis=1
    )
