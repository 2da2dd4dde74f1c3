"""`python -m pvm_jax generate`: asks a checkpoint about images."""

import sys
import time
from collections.abc import Sequence
from typing import Any

import jax

from pvm_jax.batch import Batch
from pvm_jax.checkpoint import load
from pvm_jax.checkpoint_files import read_stop_tokens
from pvm_jax.command_line import command_parser
from pvm_jax.generation import stream
from pvm_jax.processing import Processor

EXAMPLES = """
examples:
  python -m pvm_jax generate --checkpoint checkpoints/8b --image photo.jpg "What is on the table?"
  python -m pvm_jax generate --checkpoint checkpoints/8b --branch runs/sft/branch --image a.png --image b.png "What differs?"
  python -m pvm_jax generate --checkpoint checkpoints/8b --lora runs/sft_lora/lora --image photo.jpg "What is on the table?"
  python -m pvm_jax generate --checkpoint checkpoints/8b --temperature 0.7 --top-p 0.8 --max-new-tokens 2048 "Tell me a story."
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Parses `argv` (default: the command line) and runs the command."""
    generate = command_parser(None, "Answers one question, printing as it writes.", EXAMPLES)
    generate.add_argument("question", type=str)
    generate.add_argument("--checkpoint", type=str, required=True, help="directory that convert.hf_to_orbax or training wrote")
    generate.add_argument("--branch", type=str, help="take the PVM branch from this checkpoint")
    generate.add_argument("--lora", type=str, help="put this LoRA adapter beside the weights")
    generate.add_argument("--image", type=str, action="append", default=[], help="image file; may be given several times")
    generate.add_argument("--max-new-tokens", type=int, default=1024)
    generate.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    generate.add_argument("--top-k", type=int)
    generate.add_argument("--top-p", type=float)
    generate.add_argument("--seed", type=int, default=0)
    generate.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: as stored")
    parser = command_parser("python -m pvm_jax", __doc__, EXAMPLES)
    parser.add_subcommands().add_subcommand("generate", generate, help="answer a question about images")
    try:
        _generate(parser.parse_args(argv).generate)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")


def _generate(args: Any) -> None:
    processor = Processor.from_pretrained(args.checkpoint)
    content = [{"type": "image", "image": path} for path in args.image] + [{"type": "text", "text": args.question}]
    arrays = processor([[{"role": "user", "content": content}]])
    model = load(args.checkpoint, branch=args.branch, lora=args.lora, dtype=args.dtype)
    batch = Batch.from_hf(arrays, model.config)
    stop_tokens = read_stop_tokens(args.checkpoint)
    start, first, tokens, shown = time.perf_counter(), 0.0, [], ""
    for token in stream(
        model,
        batch,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        stop_tokens=stop_tokens,
        rng=jax.random.key(args.seed),
    ):
        first = first or time.perf_counter() - start
        if int(token[0]) in stop_tokens:
            break
        tokens.append(int(token[0]))
        text = processor.decode(tokens)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # a character whose last bytes are still to come
            print(text[len(shown) :], end="", flush=True)
            shown = text
    rate = (len(tokens) - 1) / max(time.perf_counter() - start - first, 1e-9)
    print(
        f"\n[{len(tokens)} tokens, first after {first:.2f} s (compilation included), then {rate:.1f} a second]", file=sys.stderr
    )


if __name__ == "__main__":
    main()
