"""`python -m pvm_jax generate | measure`: asks a checkpoint about images; measures what it sees
over a long answer."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Literal

import jax

from pvm_jax.apps.answer import (
    Answerer,
    ChatSession,
    answer_file,
    chat,
    open_questions,
    question,
)
from pvm_jax.checkpoint.store import find, load, read_branch, read_lora
from pvm_jax.data.processor import Processor
from pvm_jax.files.lock import sole_writer
from pvm_jax.files.paths import any_path, checkpoint_path, make_paths
from pvm_jax.generation import Settings
from pvm_jax.measure.report.command import Request, measure_checkpoint
from pvm_jax.model.qwen3_vl import without_pvm
from pvm_jax.options import command, dispatch, parse
from pvm_jax.sharding import computing_on, tensor_mesh

EXAMPLES = """
examples:
  python -m pvm_jax generate --checkpoint checkpoints/8b --image photo.jpg "What is on the table?"
  python -m pvm_jax generate --checkpoint checkpoints/8b --branch runs/sft/branch \\
      --image a.png --image b.png "What differs?"
  python -m pvm_jax generate --checkpoint checkpoints/8b --lora runs/sft_lora/lora \\
      --image photo.jpg "What is on the table?"
  python -m pvm_jax generate --checkpoint checkpoints/8b \\
      --temperature 0.7 --top_p 0.8 --max_new_tokens 2048 "Tell me a story."
  python -m pvm_jax generate --checkpoint checkpoints/8b --image photo.jpg --chat
  python -m pvm_jax generate --checkpoint checkpoints/8b --pvm off \\
      --image photo.jpg "What does it say without the branch?"
  python -m pvm_jax generate --checkpoint checkpoints/8b --video clip.mp4 "What happens?"
  python -m pvm_jax generate --checkpoint checkpoints/8b \\
      --input questions.jsonl --output answers.jsonl
  python -m pvm_jax generate --checkpoint checkpoints/8b \\
      --input a.jsonl --output b.jsonl --num_samples 4 --temperature 0.7
"""


MEASURE_EXAMPLES = """
examples:
  python -m pvm_jax measure --checkpoint checkpoints/8b --branch runs/sft/branch \\
      --data held_out.jsonl --output out/report
  python -m pvm_jax measure --checkpoint checkpoints/8b --against checkpoints/8b-lora \\
      --data held_out.jsonl --output out/report
  python -m pvm_jax measure --checkpoint checkpoints/8b \\
      --data held_out.jsonl --output out/report --only dilution lens
"""


# What an answer to a line of --input depends on.
_DECISIVE = ("checkpoint", "branch", "lora", "pvm", "dtype", "num_samples", "max_new_tokens")
_DECISIVE += ("temperature", "top_k", "top_p", "seed", "tags_as_text")


@dataclass(frozen=True)
class GenerateOptions:
    """What to ask whom, and how the answer is drawn.

    Attributes:
        question: what to ask; not with --chat or --input.
        checkpoint: directory that convert.hf_to_orbax or training wrote.
        branch: take the PVM branch from this checkpoint.
        lora: put this LoRA adapter beside the weights.
        pvm: "off": the same weights without the branch.
        image: image file; may be given several times.
        video: video file, read at the checkpoint's frames a second; the same.
        tags_as_text: added tokens, as '<think>', that texts hold in letters: those that the branch
            or the adapter was trained with.
        chat: ask line after line; the lines '/image FILE' and '/video FILE' add one.
        input: answer these conversations: JSONL or another format of the training data.
        output: JSONL file for the answers; what is there already is not asked again.
        batch_size: conversations of --input at a time.
        num_samples: answers to each conversation of --input.
        max_new_tokens: of an answer.
        temperature: 0 is greedy.
        top_k: draw among this many of the likeliest tokens.
        top_p: draw among the smallest set of tokens with this probability.
        seed: of what is drawn.
        dtype: by default as stored.
        tensor: devices that share the model.
    """

    checkpoint: str
    _: KW_ONLY
    question: str = ""
    branch: str | None = None
    lora: str | None = None
    pvm: Literal["on", "off"] = "on"
    image: Sequence[str] = ()
    video: Sequence[str] = ()
    tags_as_text: list[str] | None = None
    chat: bool = False
    input: Path | None = None
    output: Path | None = None
    batch_size: int = 8
    num_samples: int = 1
    max_new_tokens: int = 1024
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0
    dtype: Literal["float32", "bfloat16"] | None = None
    tensor: int = 1

    def __post_init__(self):
        make_paths(self, "checkpoint", "branch", "lora", of=checkpoint_path)
        make_paths(self, "input", "output")
        for name in ("image", "video"):
            paths = [str(any_path(path)) for path in getattr(self, name)]
            object.__setattr__(self, name, paths)
        given = [name for name in ("question", "chat", "input") if getattr(self, name)]
        if len(given) != 1:
            raise ValueError(
                f"give one of a question, --chat and --input, got {' and '.join(given) or 'none'}"
            )
        if bool(self.input) != bool(self.output):
            raise ValueError("--input and --output go together")
        if self.input and (self.image or self.video):
            raise ValueError(
                "--image and --video go with a question or --chat: the conversations of --input"
                " bring their own"
            )
        if not self.input and self.num_samples != 1:
            raise ValueError("--num_samples goes with --input")
        if self.num_samples > 1 and self.temperature == 0:
            raise ValueError(
                "--num_samples needs a --temperature above 0: greedy answers are all the same"
            )
        if self.batch_size < 1:
            raise ValueError(f"--batch_size must be at least 1, got {self.batch_size}")


@command
def main(argv: Sequence[str]) -> None:
    """Runs the command that `argv` (default: the process's arguments) names."""
    commands = {
        "generate": ("answer questions about images", generate),
        "measure": ("measure what is seen over long answers, and write a report", measure),
    }
    dispatch(argv, commands, prog="python -m pvm_jax", description=__doc__ or "")


@command
def generate(argv: Sequence[str]) -> None:
    """Answers a question, a chat's, or a file's, printing as it writes."""
    options, _ = parse(
        GenerateOptions,
        argv,
        prog="python -m pvm_jax generate",
        description=generate.__doc__ or "",
        examples=EXAMPLES,
        by_place=["question"],
        repeated=["image", "video"],
    )
    if options.output is None:
        _answer(options)
        return
    with sole_writer(options.output, otherwise="give another --output"):
        _answer(options)


def _answer(options: GenerateOptions) -> None:
    """Looks at all that is asked and all that is to be loaded before it loads the weights."""
    processor = Processor.from_pretrained(
        options.checkpoint, tags_as_text=options.tags_as_text or ()
    )
    find(options.checkpoint)
    if options.branch:
        read_branch(find(options.branch))
    if options.lora:
        read_lora(find(options.lora))
    questions, first = None, question(options.question, options.image, options.video)
    if options.input and options.output:
        made_by = {name: getattr(options, name) for name in _DECISIVE}
        questions = open_questions(processor, options.input, options.output, made_by=made_by)
        print(
            f"{len(questions.left):,} of {len(questions.conversations):,} conversations to answer"
            f" into {options.output}, at most {options.num_samples} x {options.max_new_tokens:,}"
            " tokens each; the bar tells how long it takes",
            file=sys.stderr,
        )
    else:
        processor.encode([first], add_generation_prompt=True)
    answerer, mesh = _answerer(options, processor)
    with computing_on(mesh):
        if questions:
            answer_file(answerer, questions, options.batch_size)
        elif options.chat:
            chat(answerer, options.image, _lines(), sys.stdout, options.video)
        else:
            ChatSession(answerer, sys.stdout).ask(first)


def _answerer(
    options: GenerateOptions, processor: Processor
) -> tuple[Answerer, jax.sharding.Mesh | None]:
    """The model, loaded, with its processor and settings; and the mesh that it is on."""
    mesh = tensor_mesh(options.tensor)
    model = load(
        options.checkpoint,
        mesh=mesh,
        branch=options.branch,
        lora=options.lora,
        dtype=options.dtype,
    )
    settings = Settings(
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        num_samples=options.num_samples,
        rng=jax.random.key(options.seed),
    )
    if options.pvm == "off":
        model = without_pvm(model)
    return Answerer(model, processor, options.max_new_tokens, settings), mesh


@command
def measure(argv: Sequence[str]) -> None:
    """Measures what a checkpoint sees over long answers; writes a report."""
    request, _ = parse(
        Request,
        argv,
        prog="python -m pvm_jax measure",
        description=measure.__doc__ or "",
        examples=MEASURE_EXAMPLES,
    )
    measure_checkpoint(request)


def _lines() -> Iterator[str]:
    """The lines of stdin; a person gets a prompt for each."""
    while True:
        try:
            yield input("> ") if sys.stdin.isatty() else input()
        except EOFError:
            return


if __name__ == "__main__":
    main()
