"""`python -m pvm_jax generate | measure`: asks a checkpoint about images; measures what it sees
over a long answer."""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from pvm_jax.apps.answer import Answerer, ChatSession, answer_file, chat, question
from pvm_jax.checkpoint.directory import read_stop_tokens
from pvm_jax.checkpoint.store import load
from pvm_jax.command_line import command_parser
from pvm_jax.data.processor import Processor
from pvm_jax.generation import Settings
from pvm_jax.measure.report.command import Request, measure_checkpoint
from pvm_jax.measure.report.sections import MEASUREMENTS
from pvm_jax.model.qwen3_vl import without_pvm
from pvm_jax.sharding import computing_on, tensor_mesh

EXAMPLES = """
examples:
  python -m pvm_jax generate --checkpoint checkpoints/8b --image photo.jpg "What is on the table?"
  python -m pvm_jax generate --checkpoint checkpoints/8b --branch runs/sft/branch \\
      --image a.png --image b.png "What differs?"
  python -m pvm_jax generate --checkpoint checkpoints/8b --lora runs/sft_lora/lora \\
      --image photo.jpg "What is on the table?"
  python -m pvm_jax generate --checkpoint checkpoints/8b \\
      --temperature 0.7 --top-p 0.8 --max-new-tokens 2048 "Tell me a story."
  python -m pvm_jax generate --checkpoint checkpoints/8b --image photo.jpg --chat
  python -m pvm_jax generate --checkpoint checkpoints/8b --pvm off \\
      --image photo.jpg "What does it say without the branch?"
  python -m pvm_jax generate --checkpoint checkpoints/8b \\
      --input questions.jsonl --output answers.jsonl
  python -m pvm_jax generate --checkpoint checkpoints/8b \\
      --input a.jsonl --output b.jsonl --num-samples 4 --temperature 0.7
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
_DECISIVE += ("temperature", "top_k", "top_p", "seed")


def main(argv: Sequence[str] | None = None) -> None:
    """Parses `argv` (default: the command line) and runs the command."""
    generate = command_parser(
        None, "Answers a question, a chat's, or a file's, printing as it writes.", EXAMPLES
    )
    generate.add_argument(
        "question", type=str, nargs="?", help="what to ask; not with --chat or --input"
    )
    generate.add_argument(
        "--checkpoint",
        type=str,
        required=True,
        help="directory that convert.hf_to_orbax or training wrote",
    )
    generate.add_argument("--branch", type=str, help="take the PVM branch from this checkpoint")
    generate.add_argument("--lora", type=str, help="put this LoRA adapter beside the weights")
    generate.add_argument(
        "--pvm",
        choices=["on", "off"],
        default="on",
        help="off: the same weights without the branch",
    )
    generate.add_argument(
        "--image",
        type=str,
        action="append",
        default=[],
        help="image file; may be given several times",
    )
    generate.add_argument(
        "--chat",
        action="store_true",
        help="ask line after line; the line '/image FILE' adds an image",
    )
    generate.add_argument(
        "--input",
        type=Path,
        help="answer these conversations: JSONL or another format of the training data",
    )
    generate.add_argument(
        "--output",
        type=Path,
        help="JSONL file for the answers; what is there already is not asked again",
    )
    generate.add_argument(
        "--batch-size", type=int, default=8, help="conversations of --input at a time"
    )
    generate.add_argument(
        "--num-samples", type=int, default=1, help="answers to each conversation of --input"
    )
    generate.add_argument("--max-new-tokens", type=int, default=1024)
    generate.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    generate.add_argument("--top-k", type=int)
    generate.add_argument("--top-p", type=float)
    generate.add_argument("--seed", type=int, default=0)
    generate.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: as stored")
    generate.add_argument("--tensor", type=int, default=1, help="devices that share the model")
    parser = command_parser("python -m pvm_jax", __doc__, EXAMPLES)
    measure = command_parser(
        None,
        "Measures what a checkpoint sees over long answers; writes a report.",
        MEASURE_EXAMPLES,
    )
    measure.add_argument(
        "--checkpoint",
        type=Path,
        required=True,
        help="directory that convert.hf_to_orbax or training wrote",
    )
    measure.add_argument("--branch", type=Path, help="take the PVM branch from this checkpoint")
    measure.add_argument("--lora", type=Path, help="put this LoRA adapter beside the weights")
    measure.add_argument(
        "--against",
        type=Path,
        help="compare with this checkpoint; default: the same without the branch",
    )
    measure.add_argument(
        "--data",
        type=Path,
        required=True,
        help="conversations with answers: JSONL or another such format",
    )
    measure.add_argument(
        "--output",
        type=Path,
        required=True,
        help="folder for report.html, report.json and figures/",
    )
    measure.add_argument(
        "--only",
        nargs="+",
        choices=list(MEASUREMENTS),
        default=list(MEASUREMENTS),
        help="what to measure",
    )
    measure.add_argument(
        "--limit", type=int, default=32, help="conversations, from the front of the data"
    )
    measure.add_argument(
        "--fillers",
        nargs="+",
        type=int,
        default=[0, 100, 400, 1600],
        help="tokens of filler text, each a point",
    )
    measure.add_argument(
        "--looks",
        type=int,
        default=6,
        help="tokens whose attention is drawn over the image, spread over what the model writes",
    )
    measure.add_argument(
        "--look-at",
        nargs="+",
        default=[],
        metavar="CONVERSATION:TOKEN",
        help=(
            "draw these tokens of what the model writes as the last answer instead (its last, where"
            " it stops before); both counted from 0"
        ),
    )
    measure.add_argument(
        "--max-new-tokens",
        type=int,
        help="of an answer that a model writes; default: the longest true one's",
    )
    measure.add_argument(
        "--batch-size", type=int, default=4, help="conversations that are computed together"
    )
    measure.add_argument(
        "--chunk",
        type=int,
        default=256,
        help="columns that are computed together: less takes less memory",
    )
    measure.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: as stored")
    measure.add_argument("--tensor", type=int, default=1, help="devices that share the model")
    commands = parser.add_subcommands()
    commands.add_subcommand("generate", generate, help="answer questions about images")
    commands.add_subcommand(
        "measure", measure, help="measure what is seen over long answers, and write a report"
    )
    try:
        args = parser.parse_args(argv)
        if args.subcommand == "generate":
            _generate(args.generate)
        else:
            measure_checkpoint(Request(**vars(args.measure)))
    except (OSError, ValueError, ImportError) as error:
        sys.exit(f"error: {error}")


def _generate(args: Any) -> None:
    _check(args)
    mesh = tensor_mesh(args.tensor)
    processor = Processor.from_pretrained(args.checkpoint)
    model = load(args.checkpoint, mesh=mesh, branch=args.branch, lora=args.lora, dtype=args.dtype)
    settings = Settings(
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        stop_tokens=read_stop_tokens(args.checkpoint),
        num_samples=args.num_samples,
        rng=jax.random.key(args.seed),
    )
    answerer = Answerer(
        model if args.pvm == "on" else without_pvm(model), processor, args.max_new_tokens, settings
    )
    with computing_on(mesh):
        if args.input:
            made_by = {name: getattr(args, name) for name in _DECISIVE}
            answer_file(answerer, args.input, args.output, args.batch_size, made_by=made_by)
        elif args.chat:
            chat(answerer, args.image, _lines(), sys.stdout)
        else:
            ChatSession(answerer, sys.stdout).ask(question(args.question, args.image))


def _check(args: Any) -> None:
    """Raises ValueError for arguments that do not go together."""
    given = [name for name in ("question", "chat", "input") if getattr(args, name)]
    if len(given) != 1:
        raise ValueError(
            f"give one of a question, --chat and --input, got {' and '.join(given) or 'none'}"
        )
    if bool(args.input) != bool(args.output):
        raise ValueError("--input and --output go together")
    if args.input and args.image:
        raise ValueError(
            "--image goes with a question or --chat: the conversations of --input bring their own"
            " images"
        )
    if not args.input and args.num_samples != 1:
        raise ValueError("--num-samples goes with --input")
    if args.num_samples > 1 and args.temperature == 0:
        raise ValueError(
            "--num-samples needs a --temperature above 0: greedy answers are all the same"
        )
    if args.batch_size < 1:
        raise ValueError(f"--batch-size must be at least 1, got {args.batch_size}")


def _lines() -> Iterator[str]:
    """The lines of stdin; a person gets a prompt for each."""
    while True:
        try:
            yield input("> ") if sys.stdin.isatty() else input()
        except EOFError:
            return


if __name__ == "__main__":
    main()
