"""pvm-jax as a model of lmms-eval 0.7.3: `python -m lmms_eval --model pvm_jax --model_args
checkpoint=…` (docs/evaluate.md).

lmms-eval finds `manifest` by the entry point in pyproject.toml. It is no dependency: nothing else
imports this file.
"""

import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from lmms_eval.api.model import lmms  # pyright: ignore[reportMissingImports]
from tqdm import tqdm

from pvm_jax.apps.answer import Answerer
from pvm_jax.checkpoint.store import load
from pvm_jax.data.batch import Batch, bucket_size
from pvm_jax.data.example import Example
from pvm_jax.data.processor import Processor
from pvm_jax.generation import Settings
from pvm_jax.model.qwen3_vl import Qwen3VL, without_pvm
from pvm_jax.sharding import computing_on, tensor_mesh

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tiff", ".webp")


def manifest() -> Any:
    """What lmms-eval registers under the name pvm_jax."""
    from lmms_eval.models.registry_v2 import ModelManifest  # pyright: ignore[reportMissingImports]

    return ModelManifest(
        "pvm_jax",
        simple_class_path="pvm_jax.apps.lmms_eval.PVM",
        chat_class_path="pvm_jax.apps.lmms_eval.PVMChat",
    )


class _Question(NamedTuple):
    """One generation: its text, the messages, lmms-eval's generation_kwargs, and what the sample
    follows.

    `messages` reads the document with its images and videos: a whole task's do not fit in memory.
    """

    text: str
    messages: Callable[[], list[dict[str, Any]]]
    kwargs: Mapping[str, Any]
    seed: int


class PVM(lmms):
    """The interface of tasks with one text and its images or videos ("simple"), and of those that
    compare likelihoods.

    Args (`--model_args name=value,…`):
        checkpoint, branch, lora: as `pvm_jax.load`.
        pvm: "off" runs the same weights without the branch.
        dtype: of weights and activations; None keeps what is stored.
        batch_size: questions at a time (`--batch_size`).
        seed: of the sampling; a question's sample depends on it, its task, its number and its
            repetition alone.
        max_new_tokens: of an answer, where the task names none.
        min_pixels, max_pixels: of an image after resizing; None keeps the checkpoint's.
        max_num_frames: of a video, spread evenly.
        system_prompt: put in front of every question.
        tensor: devices that share the model.

    Raises:
        ValueError: for a value out of its range.
    """

    is_simple = True

    def __init__(
        self,
        checkpoint: str,
        branch: str | None = None,
        lora: str | None = None,
        pvm: str = "on",
        dtype: str | None = "bfloat16",
        batch_size: int | str = 1,
        seed: int = 0,
        max_new_tokens: int = 1024,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        max_num_frames: int = 32,
        system_prompt: str | None = None,
        tensor: int = 1,
        device: None = None,
        max_batch_size: None = None,
    ):
        super().__init__()
        if device is not None or max_batch_size is not None:
            raise ValueError(
                "pvm_jax takes no --device (JAX_PLATFORMS chooses it) and no --max_batch_size"
            )
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise ValueError(
                f"pvm_jax needs --batch_size N, a number of questions, got {batch_size}"
            )
        if pvm not in ("on", "off"):
            raise ValueError(f'pvm must be "on" or "off", got {pvm!r}')
        self.mesh = tensor_mesh(int(tensor))
        model = load(checkpoint, mesh=self.mesh, branch=branch, lora=lora, dtype=dtype)
        self.model = model if pvm == "on" else without_pvm(model)
        self.processor = Processor.from_pretrained(checkpoint)
        sizes = {"min_pixels": min_pixels, "max_pixels": max_pixels}
        sizes = {name: int(size) for name, size in sizes.items() if size is not None}
        self.processor.image_settings = replace(self.processor.image_settings, **sizes)
        self.batch_size, self.seed, self.max_new_tokens = (
            int(batch_size),
            int(seed),
            int(max_new_tokens),
        )
        self.max_num_frames, self.system_prompt = int(max_num_frames), system_prompt

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """The answer to each request (context, generation_kwargs, doc_to_visual, doc_id, task,
        split)."""
        questions = [
            _Question(context, partial(self._asked, context, doc_to_visual, *place), kwargs, seed)
            for (context, kwargs, doc_to_visual, *place), seed in _seeded(requests)
        ]
        return self._answers(questions)

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """For each request (context, continuation, doc_to_visual, doc_id, task, split) the NEGATIVE
        log-probability of the continuation, in nats, and whether it is the greedy one.

        lmms-eval 0.7.3 takes the least of these values for the best choice, whatever
        `lmms.loglikelihood` says.
        """
        scores = []
        for part in tqdm(_parts(requests, self.batch_size), desc="pvm_jax"):
            examples = [self._choice(*request.args) for request in part]
            with computing_on(self.mesh):
                scores += continuation_scores(self.model, examples)
        return [(-logprob, greedy) for logprob, greedy in scores]

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Raises NotImplementedError."""
        raise NotImplementedError("pvm_jax does not answer tasks of several rounds")

    def _document(self, doc_id: int, task: str, split: str) -> Any:
        return self.task_dict[task][split][doc_id]

    def _asked(
        self, context: str, doc_to_visual: Callable[[Any], Any], *place: Any
    ) -> list[dict[str, Any]]:
        return self._messages(context, doc_to_visual(self._document(*place)))

    def _messages(self, text: str, visuals: Iterable[Any] | None) -> list[dict[str, Any]]:
        parts = [self._part(visual) for visual in visuals or ()]
        # Some tasks write where their images belong; these come first, as with lmms-eval's
        # Qwen3-VL.
        parts.append({"type": "text", "text": text.replace("<image>", "")})
        return self._prompted([{"role": "user", "content": parts}])

    def _prompted(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        if self.system_prompt is None:
            return messages
        return [{"role": "system", "content": self.system_prompt}, *messages]

    def _part(self, visual: Any) -> dict[str, Any]:
        """An image or a video file as a part of a message.

        Raises:
            ValueError: for anything else.
        """
        if not isinstance(visual, str):
            if isinstance(visual, Mapping):
                raise ValueError(f"pvm_jax reads images and whole videos, got {visual!r:.80}")
            return {"type": "image", "image": visual}
        if visual.lower().endswith(IMAGE_SUFFIXES):
            return {"type": "image", "image": visual}
        frames, seconds = read_frames(visual, self.max_num_frames)
        return {"type": "video", "video": frames, "timestamps": seconds}

    def _answers(self, questions: Sequence[_Question]) -> list[str]:
        """Questions that are sampled alike are answered together, those with the longest text
        first: a batch pads little."""
        alike: dict[tuple, list[int]] = {}
        for number, question in enumerate(questions):
            alike.setdefault(sampling(question.kwargs, self.max_new_tokens), []).append(number)
        answers = [""] * len(questions)
        progress = tqdm(total=len(questions), desc="pvm_jax")
        for (max_new_tokens, temperature, top_k, top_p), numbers in alike.items():
            settings = Settings(
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                rng=jax.random.key(self.seed),
            )
            answerer = Answerer(self.model, self.processor, max_new_tokens, settings)
            numbers.sort(key=lambda number: -len(questions[number].text))
            for part in _parts(numbers, self.batch_size):
                examples = [
                    self.processor.encode(questions[n].messages(), add_generation_prompt=True)
                    for n in part
                ]
                with computing_on(self.mesh):
                    texts = answerer.answers(examples, seeds=[questions[n].seed for n in part])
                for n, (text,) in zip(part, texts, strict=True):
                    answers[n] = _cut(text, questions[n].kwargs.get("until"))
                progress.update(len(part))
        return answers

    def _choice(
        self,
        context: str,
        continuation: Any,
        doc_to_visual: Callable[[Any], Any] | None = None,
        *place: Any,
    ) -> Example:
        """What a request of `loglikelihood` scores."""
        visuals = ()
        if doc_to_visual is not None:  # a choice without its question (acc_mutual_info) has none
            document = self._document(*place)
            visuals = doc_to_visual(document)
            continuation = continuation(document) if callable(continuation) else continuation
        return self._continued(self._messages(context, visuals), continuation)

    def _continued(self, messages: list[dict[str, Any]], continuation: str) -> Example:
        """The prompt with the continuation after it, which alone is marked as learned."""
        prompt = self.processor.encode(messages, add_generation_prompt=True)
        tokens = self.processor.tokenizer(continuation, add_special_tokens=False)["input_ids"]
        if not tokens:
            raise ValueError("loglikelihood: a continuation is empty")
        ids = np.append(prompt.input_ids, tokens)
        return replace(
            prompt, input_ids=ids, loss_mask=np.arange(len(ids)) >= len(prompt.input_ids)
        )


class PVMChat(PVM):
    """The interface of tasks that give whole conversations ("chat"); the one that lmms-eval takes
    unless --force_simple."""

    is_simple = False

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """The answer to each request (context, doc_to_messages, generation_kwargs, doc_id, task,
        split)."""
        questions = [
            _Question(context, partial(self._conversation, doc_to_messages, *place), kwargs, seed)
            for (context, doc_to_messages, kwargs, *place), seed in _seeded(requests)
        ]
        return self._answers(questions)

    def _conversation(
        self, doc_to_messages: Callable[[Any], Any], *place: Any
    ) -> list[dict[str, Any]]:
        messages = doc_to_messages(self._document(*place))
        messages = [
            {**message, "content": [self._content(part) for part in message["content"]]}
            for message in messages
        ]
        return self._prompted(messages)

    def _content(self, part: Mapping[str, Any]) -> dict[str, Any]:
        """A part of lmms-eval's ChatMessages: media lie under "url"."""
        if part["type"] == "text":
            return {"type": "text", "text": part["text"]}
        clip = {key for key in ("start_time", "end_time") if part.get(key) is not None}
        if part["type"] not in ("image", "video") or clip:
            raise ValueError(
                f"pvm_jax reads text, images and whole videos, got {part['type']}"
                f" {' '.join(sorted(clip))}"
            )
        return self._part(part["url"])


def _seeded(requests: Sequence[Any]) -> Iterator[tuple[tuple, int]]:
    """Each request's arguments with a seed: the same question, repeated, gets another one."""
    seen: Counter[str] = Counter()
    for request in requests:
        name = "/".join(map(str, request.args[-3:]))  # its number, task and split
        yield request.args, zlib.crc32(f"{name}/{seen[name]}".encode()) >> 1
        seen[name] += 1


def sampling(
    kwargs: Mapping[str, Any], max_new_tokens: int
) -> tuple[int, float, int | None, float | None]:
    """(max_new_tokens, temperature, top_k, top_p) out of generation_kwargs.

    A temperature says whether to sample, as with lmms-eval's Qwen3-VL: tasks often leave
    `do_sample: false` beside the one that the command line sets. Without a temperature, `do_sample`
    says it.

    Raises:
        ValueError: for beam search.
    """
    if (kwargs.get("num_beams") or 1) > 1:
        raise ValueError(
            f"pvm_jax has no beam search: --gen_kwargs num_beams=1, got {kwargs['num_beams']}"
        )
    temperature = kwargs.get("temperature")
    if temperature is None:
        temperature = 1.0 if kwargs.get("do_sample") else 0.0
    longest = int(kwargs.get("max_new_tokens") or max_new_tokens)
    if not temperature:
        return longest, 0.0, None, None
    return longest, float(temperature), kwargs.get("top_k") or None, kwargs.get("top_p")


def _cut(text: str, until: str | Sequence[str] | None) -> str:
    """The text before the first of the strings that end it."""
    # lmms-eval puts the blank line there itself, where a task names none; an answer may have
    # paragraphs.
    ends = [until] if isinstance(until, str) else [end for end in until or () if end != "\n\n"]
    for end in filter(None, ends):
        text = text.split(end)[0]
    return text


def _parts(items: Sequence[Any], size: int) -> list[Sequence[Any]]:
    return [items[first : first + size] for first in range(0, len(items), size)]


def read_frames(path: str, count: int) -> tuple[list[Any], list[float]]:
    """At most `count` frames of a video file, spread evenly from the first to the last, and their
    seconds.

    Raises:
        FileNotFoundError, ValueError: if the file is not there or holds no two frames.
    """
    import av  # pyright: ignore[reportMissingImports]: PyAV comes with lmms-eval

    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such video file")
    with av.open(path) as video:
        total = video.streams.video[0].frames or sum(1 for _ in video.decode(video=0))
    if total < 2:
        raise ValueError(f"{path}: a video needs two frames or more, got {total}")
    wanted = set(np.linspace(0, total - 1, min(count, total)).astype(int).tolist())
    with av.open(path) as video:
        chosen = [frame for number, frame in enumerate(video.decode(video=0)) if number in wanted]
        return [frame.to_image() for frame in chosen], [float(frame.time) for frame in chosen]


def continuation_scores(model: Qwen3VL, examples: Sequence[Example]) -> list[tuple[float, bool]]:
    """For each example the log-probability of the tokens that its loss_mask marks, in nats, and
    whether each of them is the likeliest; logits exist for these alone."""
    batch = Batch.from_examples(examples, model.config)
    marked = [np.flatnonzero(np.asarray(example.loss_mask)) for example in examples]
    columns = np.zeros((len(examples), bucket_size(max(map(len, marked)))), np.int32)
    for row, where in zip(columns, marked, strict=True):
        row[: len(where)] = where
    graphdef, params = nnx.split(model)
    logprobs, greedy = _scores(graphdef, nnx.as_pure(params), batch, columns)
    return [
        (float(np.sum(row[: len(where)], dtype=np.float64)), bool(np.all(best[: len(where)])))
        for row, best, where in zip(np.asarray(logprobs), np.asarray(greedy), marked, strict=True)
    ]


@partial(jax.jit, static_argnames="graphdef")
def _scores(graphdef, params, batch: Batch, columns: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Of the tokens at `columns` [B, K]: log-probabilities [B, K], and whether they are the
    likeliest."""
    model: Qwen3VL = nnx.merge(graphdef, params)
    before = jnp.take_along_axis(
        model.hidden(batch), jnp.maximum(columns - 1, 0)[..., None], axis=1
    )
    tokens = jnp.take_along_axis(batch.tokens, columns, axis=1)
    logits = model.logits(before)
    logprobs = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[..., None], -1)[..., 0]
    return logprobs, jnp.argmax(logits, -1) == tokens
