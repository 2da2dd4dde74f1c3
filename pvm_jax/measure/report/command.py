"""What `python -m pvm_jax measure` does: a checkpoint and a file of conversations -> a report."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from pvm_jax.checkpoint.store import load
from pvm_jax.data.conversations import check_learnable, open_conversations
from pvm_jax.data.example import Example
from pvm_jax.data.messages import naming
from pvm_jax.data.processor import Processor
from pvm_jax.data.side_files import read_stop_tokens
from pvm_jax.data.stored import Conversations
from pvm_jax.files.lock import sole_writer
from pvm_jax.files.paths import checkpoint_path, make_paths
from pvm_jax.files.writing import check_writable
from pvm_jax.measure.ablations import silence, with_filler
from pvm_jax.measure.decision import final_after
from pvm_jax.measure.pictures import partners
from pvm_jax.measure.reading import find_answers
from pvm_jax.measure.report.figures import check_matplotlib
from pvm_jax.measure.report.page import write_report
from pvm_jax.measure.report.provenance import provenance
from pvm_jax.measure.report.section import Section
from pvm_jax.measure.report.sections import MEASUREMENTS
from pvm_jax.measure.report.task import WITH, WITHOUT, Models, Task
from pvm_jax.model.qwen3_vl import Qwen3VL
from pvm_jax.sharding import computing_on, tensor_mesh


@dataclass(frozen=True)
class Request:
    """What to measure.

    Attributes:
        checkpoint: directory that convert.hf_to_orbax or training wrote.
        data: conversations with answers, their assistant turns: JSONL or another format of the
            training data.
        output: folder for report.html, report.json and figures/.
        branch: take the PVM branch from this checkpoint.
        lora: put this LoRA adapter beside the weights.
        against: compare with this checkpoint; by default with the same weights without the branch,
            if there is one.
        only: what to measure, of MEASUREMENTS.
        limit: conversations, from the front of the data.
        fillers: tokens of filler text between image and question, and ahead of the image, each a
            point.
        looks: tokens whose attention is drawn over the image, spread over conversations and over
            what the model writes.
        look_at: draw these tokens of what the model writes as the last answer instead (its last,
            where it stops before), each as CONVERSATION:TOKEN, both counted from 0.
        final_after: text that the final answer follows, in what the models write.
        max_new_tokens: of an answer that a model writes; by default the longest true one's.
        batch_size: conversations that are computed together.
        chunk: columns that are computed together: less takes less memory.
        dtype: by default as stored.
        tensor: devices that share each model.
    """

    checkpoint: Path
    data: Path
    output: Path
    branch: Path | None = None
    lora: Path | None = None
    against: Path | None = None
    only: Sequence[str] = tuple(MEASUREMENTS)
    limit: int = 32
    fillers: Sequence[int] = (0, 100, 400, 1600)
    looks: int = 6
    look_at: Sequence[str] = ()
    final_after: str = "<answer>"
    max_new_tokens: int | None = None
    batch_size: int = 4
    chunk: int = 256
    dtype: Literal["float32", "bfloat16"] | None = None
    tensor: int = 1

    def __post_init__(self):
        make_paths(self, "checkpoint", "branch", "lora", "against", of=checkpoint_path)
        make_paths(self, "data", "output")
        if unknown := [name for name in self.only if name not in MEASUREMENTS]:
            raise ValueError(
                f"--only: there is no measurement {', '.join(map(repr, unknown))}, but"
                f" {', '.join(MEASUREMENTS)}"
            )
        for name, least in (
            ("limit", 1),
            ("looks", 0),
            ("max_new_tokens", 1),
            ("batch_size", 1),
            ("chunk", 1),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"--{name} must be at least {least}, got {value}")
        if not self.final_after:
            raise ValueError("--final_after is the text that the final answer follows, got nothing")
        if not self.fillers:
            raise ValueError("--fillers must have at least one number; 0 is no filler")
        if min(self.fillers) < 0:
            raise ValueError(f"--fillers must be 0 or more, got {min(self.fillers)}")


def measure_checkpoint(request: Request) -> None:
    """Measures, writes the report and prints what came out.

    Raises:
        FileNotFoundError, ValueError, CheckpointError: for a request that cannot be met, naming
            what is wrong.
        OSError: if another process writes to `output`.
    """
    with sole_writer(request.output, otherwise="give another --output"):
        _measure_alone(request)


def _measure_alone(request: Request) -> None:
    mesh = tensor_mesh(request.tensor)
    processor = Processor.from_pretrained(request.checkpoint)
    task = make_task(request, processor)
    models = compared(
        load(
            request.checkpoint,
            mesh=mesh,
            branch=request.branch,
            lora=request.lora,
            dtype=request.dtype,
        ),
        (
            {str(request.against): load(request.against, mesh=mesh, dtype=request.dtype)}
            if request.against
            else {}
        ),
    )
    lengths = find_answers(task.examples).lengths
    about = [
        (
            f"{len(task.examples)} conversations of {request.data}, whose answers have"
            f" {lengths.min():,} to {lengths.max():,} tokens. Measured: {', '.join(models)}."
            " Intervals are 95%, by resampling conversations."
        ),
        ", ".join(
            f"{name} {value}"
            for name in ("checkpoint", "branch", "lora", "against")
            if (value := getattr(request, name))
        ),
    ]
    settings = {name: str(value) for name, value in vars(request).items()}
    title = "What the model sees over a long answer"
    with computing_on(mesh):
        report_on(
            models,
            task,
            request.output,
            only=request.only,
            title=title,
            about=about,
            settings=settings,
        )


def report_on(
    models: Models,
    task: Task,
    output: Path,
    *,
    only: Sequence[str] = tuple(MEASUREMENTS),
    title: str,
    about: Sequence[str],
    settings: Mapping[str, Any],
) -> None:
    """Measures `only`, writes the report to `output` (`write_report`) and prints its facts and
    where it is.

    Raises:
        ImportError, OSError: without matplotlib or where `output` cannot be written to, before
            anything is measured.
    """
    check_matplotlib()
    check_writable(output)
    sections = measure(models, task, only)
    path = write_report(
        sections,
        output,
        title=title,
        about=about,
        origin=provenance(models, task.examples, [*task.fillers.values(), *task.ahead.values()]),
        settings=settings,
    )
    for section in sections:
        for fact in section.facts:
            print(f"{section.title}: {fact}")
    print(f"The report: {path} (open it in a browser); every number: {path.with_suffix('.json')}")


def measure(models: Models, task: Task, only: Sequence[str]) -> list[Section]:
    """The measurements of these names, in the report's order; what will be done, what is under way
    and how long it took is said on stderr."""
    console, sections, task = Console(stderr=True, highlight=False), [], replace(task)
    names = [name for name in MEASUREMENTS if name in only and (name != "looked" or task.looks)]
    console.print(
        f"{len(task.examples):,} conversations, {len(models)} models ({', '.join(models)}),"
        f" {len(names)} measurements: {', '.join(names)}. How long one takes is told after it"
    )
    for number, name in enumerate(names, 1):
        start = time.perf_counter()
        with console.status(f"measuring {name}"):
            sections.append(MEASUREMENTS[name](models, task))
        seconds = time.perf_counter() - start
        console.print(f"{number}/{len(names)} measured {name}, {seconds:,.0f} s")
    return sections


def compared(model: Qwen3VL, against: Mapping[str, Qwen3VL]) -> dict[str, Qwen3VL]:
    """What is measured side by side: `model` and `against`, or without that, the same weights with
    every gate at 0.

    No name in `against` can be taken for one of the measurements' own.
    """
    if against:
        return {"checkpoint": model} | {f"against {name}": other for name, other in against.items()}
    layers = [int(layer) for layer in model.pvm]
    return {WITH: model, WITHOUT: silence(model, layers)} if layers else {"checkpoint": model}


def make_task(request: Request, processor: Processor) -> Task:
    """The task that a file of conversations is.

    Raises:
        FileNotFoundError, ValueError: for a conversation that cannot be taken, naming its place.
    """
    conversations = open_conversations(request.data)
    indices = range(min(request.limit, len(conversations)))
    examples = [_encode(conversations, index, processor, 0) for index in indices]
    fillers, ahead = {}, {}
    if {"ablations", "midway"} & {*request.only}:
        with naming(str(request.data)):
            partners(examples)  # refuses here, not after the other measurements
    if "ablations" in request.only:
        for tokens in request.fillers:
            for found, before in ((fillers, False), (ahead, True)):
                found[tokens] = (
                    [
                        _encode(conversations, index, processor, tokens, ahead=before)
                        for index in indices
                    ]
                    if tokens
                    else examples
                )
    max_new_tokens = request.max_new_tokens or int(find_answers(examples).lengths.max())
    return Task(
        examples=examples,
        processor=processor,
        stop_tokens=read_stop_tokens(request.checkpoint),
        max_new_tokens=max_new_tokens,
        fillers=fillers,
        ahead=ahead,
        final=lambda ids: final_after(
            ids, request.final_after, partial(processor.decode, skip_special_tokens=False)
        ),
        final_is=f"a final answer, behind {request.final_after!r}",
        looks=[_look(text, len(examples), max_new_tokens) for text in request.look_at]
        or [(place % len(examples), None) for place in range(request.looks)],
        rows=request.batch_size,
        chunk=request.chunk,
    )


def _encode(
    conversations: Conversations,
    index: int,
    processor: Processor,
    filler: int,
    *,
    ahead: bool = False,
) -> Example:
    messages = conversations[index]
    with conversations.naming(index):
        check_learnable(messages)
        last = max(
            number for number, message in enumerate(messages) if message.get("role") == "assistant"
        )
        messages = messages[: last + 1]  # what follows the last answer has none to be measured
        example = processor.encode(with_filler(messages, filler, processor, ahead=ahead))
        if not example.num_patches:
            raise ValueError("there is no image to look at")
        return example


def _look(text: str, conversations: int, tokens: int) -> tuple[int, int]:
    """(conversation, token) of CONVERSATION:TOKEN. Raises ValueError unless there are as many of
    both."""
    conversation, _, token = text.partition(":")
    if not (conversation.isdecimal() and token.isdecimal()):
        raise ValueError(
            f"--look_at takes CONVERSATION:TOKEN, both counted from 0, such as 2:40; got {text!r}"
        )
    if int(conversation) >= conversations or int(token) >= tokens:
        raise ValueError(
            f"--look_at {text}: there are {conversations} conversations (--limit), both are counted"
            f" from 0, and an answer is written up to {tokens} tokens (--max_new_tokens)"
        )
    return int(conversation), int(token)
