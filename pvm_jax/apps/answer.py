"""What `python -m pvm_jax generate` does: one question, a chat, or a file of conversations."""

import json
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TextIO

import jax
import numpy as np
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

from pvm_jax.data.batch import Batch
from pvm_jax.data.conversations import open_conversations
from pvm_jax.data.example import Example
from pvm_jax.data.image_files import image_size
from pvm_jax.data.messages import asked
from pvm_jax.data.processor import Processor
from pvm_jax.data.stored import Conversations, plain_columns
from pvm_jax.data.video_files import VideoFile, outline
from pvm_jax.files.writing import Growing, write_whole
from pvm_jax.generation import Chat, Settings, generate
from pvm_jax.model.qwen3_vl import Qwen3VL

IMAGE_COMMAND = "/image "
VIDEO_COMMAND = "/video "
"""What a chat's line begins with that adds an image or a video to the next question."""

_LINE = b'{"source": '
"""What each line of a file of answers begins with."""


@dataclass
class Answerer:
    """A model with all that it takes to ask it in text.

    Attributes:
        settings: of the sampling.
        max_new_tokens: of an answer.
    """

    model: Qwen3VL
    processor: Processor
    max_new_tokens: int
    settings: Settings = field(default_factory=Settings)

    def batch(self, examples: Sequence[Example]) -> Batch:
        """One row for each of the examples."""
        return Batch.from_examples(examples, self.model.config)

    def answers(self, examples: Sequence[Example], seeds: Sequence[int]) -> list[list[str]]:
        """The texts of each example's samples, which follow the example's own seed."""
        return [
            [self.processor.decode(tokens) for tokens in samples]
            for samples in self.written(examples, seeds)
        ]

    def written(self, examples: Sequence[Example], seeds: Sequence[int]) -> list[list[np.ndarray]]:
        """The token ids [tokens] of each example's samples, the stop token included."""
        settings = Settings(**{**self.settings, "seeds": seeds})
        got = generate(
            self.model, self.batch(examples), max_new_tokens=self.max_new_tokens, **settings
        )
        rows = [
            tokens[:length]
            for tokens, length in zip(np.asarray(got.tokens), np.asarray(got.lengths), strict=True)
        ]
        samples = len(rows) // len(examples)
        return [rows[row : row + samples] for row in range(0, len(rows), samples)]


def question(
    text: str, images: Iterable[str | Path], videos: Iterable[str | Path] = ()
) -> dict[str, Any]:
    """The user's message: the images, the video files, then the text."""
    content = [{"type": "image", "image": str(path)} for path in images]
    content += [{"type": "video", "video": str(path)} for path in videos]
    content += [{"type": "text", "text": text}]
    return {"role": "user", "content": content}


class ChatSession:
    """A chat whose answers are written as they come; one question is a chat that ends."""

    def __init__(self, answerer: Answerer, out: TextIO):
        self.answerer, self.out = answerer, out
        self.messages: list[dict[str, Any]] = []
        self.chat = Chat(answerer.model)

    def ask(self, message: dict[str, Any]) -> str:
        """Writes the answer to `message` and returns it; it says on stderr how fast it came.

        Raises:
            FileNotFoundError, ValueError: for a message that cannot be taken, which then is not
                part of the conversation.
        """
        start, times, tokens = time.perf_counter(), [], []
        processor, settings = self.answerer.processor, self.answerer.settings
        example = processor.encode_next([*self.messages, message])
        stop_tokens = settings.get("stop_tokens", self.answerer.model.config.stop_tokens)
        if self.chat.unread is not None and self.chat.unread not in stop_tokens:
            example = replace(
                example, input_ids=np.append(self.chat.unread, example.input_ids), loss_mask=None
            )
        batch = self.answerer.batch([example])
        rng = settings.get("rng")
        if rng is not None:
            settings = Settings(
                **{**settings, "rng": jax.random.fold_in(rng, len(self.messages))}
            )  # each turn draws anew
        arriving = processor.decoder()
        for token in self.chat.stream(
            batch, max_new_tokens=self.answerer.max_new_tokens, **settings
        ):
            times.append(time.perf_counter())
            tokens.append(token)
            print(arriving(token), end="", file=self.out, flush=True)
        print(file=self.out)
        # The median leaves out the steps that waited for a compilation: the second token, and
        # whenever the cache grows.
        gaps = np.diff(times)
        rate = f", then {1 / np.median(gaps):,.1f} a second" if len(gaps) > 1 else ""
        print(
            f"[{len(tokens)} tokens, first after {times[0] - start:.2f} s (compilation"
            f" included){rate}]",
            file=sys.stderr,
        )
        answer = processor.decode(tokens)
        self.messages += [message, {"role": "assistant", "content": answer}]
        return answer


def chat(
    answerer: Answerer,
    images: Sequence[str],
    lines: Iterable[str],
    out: TextIO,
    videos: Sequence[str] = (),
) -> None:
    """Answers line after line. `/image FILE` and `/video FILE` add one to the next question; a
    question that is refused may be put anew."""
    conversation, waiting = ChatSession(answerer, out), (list(images), list(videos))
    sampling = answerer.processor.video_settings.sampling
    for line in lines:
        line = line.strip()
        try:
            if line.startswith(IMAGE_COMMAND):
                path = line.removeprefix(IMAGE_COMMAND).strip()
                image_size(path)
                waiting[0].append(path)
            elif line.startswith(VIDEO_COMMAND):
                path = line.removeprefix(VIDEO_COMMAND).strip()
                outline(VideoFile(path), sampling)
                waiting[1].append(path)
            elif line.startswith("/"):
                raise ValueError(
                    f"{line.split()[0]} is no command; there are {IMAGE_COMMAND}FILE and"
                    f" {VIDEO_COMMAND}FILE"
                )
            elif line:
                conversation.ask(question(line, *waiting))
                waiting = ([], [])
        except (OSError, ValueError, ImportError) as error:
            print(f"error: {error}", file=sys.stderr)


@dataclass(frozen=True)
class Questions:
    """Conversations to answer into a file, all of them checked.

    Attributes:
        left: indices of those that the file does not answer yet.
    """

    conversations: Conversations
    target: Path
    made_by: Mapping[str, Any]
    left: Sequence[int]


def open_questions(
    processor: Processor, source: Path, target: Path, *, made_by: Mapping[str, Any]
) -> Questions:
    """What is at `source` and not yet answered in the JSONL file `target`; no model is needed for
    it. Of the pictures the headers are read.

    Args:
        made_by: what the answers depend on, by name, as JSON has it; lines made by anything else
            are refused.

    Raises:
        FileNotFoundError: if there is nothing at `source`.
        ValueError: for a conversation that cannot be taken, naming its place; for a `target` that
            belongs to other data or other settings, which then is left as it is.
        OSError: if `target` cannot be written.
    """
    conversations = open_conversations(source, every_column=True)
    answered = _answered(conversations, target, made_by)
    left = [index for index in range(len(conversations)) if index not in answered]
    for index in left:
        messages = conversations[index]
        with conversations.naming(index):
            processor.count(asked(messages), add_generation_prompt=True)
    Growing(target).close()  # it can be written
    return Questions(conversations, target, made_by, left)


def answer_file(answerer: Answerer, questions: Questions, batch_size: int) -> None:
    """Answers what is left of the questions, `batch_size` at a time.

    A line of the file is {"source": place, "index": number from 0, "question": text of the last
    turn, "record": the record's own columns, "answers": [text of each sample], "made_by": …}. A
    conversation's last turn, if it is the assistant's, is left out. What the file answers already
    is not asked again: an answer depends on its conversation, its index and the settings alone, not
    on the others in its batch.
    """
    conversations, left = questions.conversations, questions.left
    columns = (*Progress.get_default_columns()[:3], MofNCompleteColumn(), TimeRemainingColumn())
    start, count = time.perf_counter(), 0
    with (
        Growing(questions.target) as out,
        Progress(*columns, console=Console(stderr=True)) as progress,
    ):
        task = progress.add_task(
            questions.target.name,
            total=len(conversations),
            completed=len(conversations) - len(left),
        )
        for first in range(0, len(left), batch_size):
            indices, prompts, examples = left[first : first + batch_size], [], []
            for index in indices:
                prompts.append(asked(conversations[index]))
                with conversations.naming(index):
                    examples.append(
                        answerer.processor.encode(prompts[-1], add_generation_prompt=True)
                    )
            for index, prompt, samples in zip(
                indices, prompts, answerer.written(examples, seeds=indices), strict=True
            ):
                line = {
                    "source": conversations.where(index),
                    "index": index,
                    "question": _text_of(prompt[-1]),
                    "record": plain_columns(conversations.columns(index)),
                    "answers": [answerer.processor.decode(tokens) for tokens in samples],
                    "made_by": questions.made_by,
                }
                out.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
                count += sum(map(len, samples))
            out.flush()
            progress.advance(task, len(indices))
    seconds = time.perf_counter() - start
    speed = (
        f"{count:,} tokens in {seconds:.1f} s, {count / seconds:,.1f} a second, compilation"
        " included"
    )
    print(
        f"[{len(left)} answered: {speed}; {questions.target} holds all {len(conversations)}]",
        file=sys.stderr,
    )


def _text_of(message: Mapping[str, Any]) -> str:
    content = message.get("content") or ""
    if isinstance(content, str):
        return content
    return "\n".join(part["text"] for part in content if part.get("type") == "text")


def _answered(conversations: Conversations, target: Path, made_by: Mapping[str, Any]) -> set[int]:
    """The indices that `target` answers; a line that was cut while it was written is taken out of
    the file."""
    if not target.exists():
        return set()
    *lines, torn = target.read_bytes().split(b"\n")
    advice = "give another --output, or remove the file"
    answered = set()
    for number, line in enumerate(lines, 1):
        try:
            stored = json.loads(line)
            index, theirs = stored["index"], stored["made_by"]
            known = stored["source"] == conversations.where(index)
        except (ValueError, KeyError, TypeError, IndexError):
            known = False
        if not known:
            raise ValueError(
                f"{target}:{number} answers no conversation of {conversations.path}: {advice}"
            )
        if other := [name for name in made_by if theirs.get(name) != made_by[name]]:
            raise ValueError(
                f"{target}:{number} was answered with another {', '.join(other)}: {advice}"
            )
        answered.add(index)
    if not (torn.startswith(_LINE) or _LINE.startswith(torn)):
        raise ValueError(
            f"{target}:{len(lines) + 1} answers no conversation of {conversations.path}: {advice}"
        )
    if torn:
        write_whole(target, b"".join(line + b"\n" for line in lines))
    return answered
