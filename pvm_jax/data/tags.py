"""Added tokens that a text writes in letters instead: what a model was never trained on it cannot
be asked for."""

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase


def plain_tags(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The added tokens that are no control tokens, as <think> of Qwen3-VL: `with_tags_as_text` can
    write them as text."""
    return [token.content for token in tokenizer.added_tokens_decoder.values() if not token.special]


def with_tags_as_text(
    tokenizer: PreTrainedTokenizerBase, tags: Sequence[str]
) -> PreTrainedTokenizerBase:
    """`tokenizer` without the added tokens `tags`, which it then reads letter by letter as any
    other text; of their ids it writes nothing.

    Raises:
        ValueError: for a tag that is no added token, or one that gives a conversation its
            structure.
    """
    if not tags:
        return tokenizer
    known = plain_tags(tokenizer)
    if unknown := [tag for tag in tags if tag not in known]:
        raise ValueError(
            f"tags_as_text: {unknown[0]!r} is no added token that could be written as text; the"
            f" tokenizer has {', '.join(map(repr, known)) or 'none'}"
        )
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        forget_tags(Path(folder), tags)
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def forget_tags(folder: Path, tags: Sequence[str]) -> None:
    """Takes the added tokens `tags` out of the tokenizer's files in `folder`."""
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    content["added_tokens"] = [
        token for token in content["added_tokens"] if token["content"] not in tags
    ]
    file.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    file = folder / "tokenizer_config.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    if "added_tokens_decoder" in content:
        content["added_tokens_decoder"] = {
            number: token
            for number, token in content["added_tokens_decoder"].items()
            if token["content"] not in tags
        }
    for key in ("extra_special_tokens", "additional_special_tokens"):
        if isinstance(content.get(key), list):
            content[key] = [token for token in content[key] if token not in tags]
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
