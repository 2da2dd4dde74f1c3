"""A checkpoint's tokenizer and chat template, read as data: no code of the checkpoint's is run."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from pvm_jax.files.bucket import BucketError
from pvm_jax.files.cache import copied_settings
from pvm_jax.files.hub import convert_first
from pvm_jax.files.json_file import JsonObject, read_json, read_json_if_any
from pvm_jax.hf_config import check_model_type, read_config

_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "added_tokens.json",
    "special_tokens_map.json",
)
# All that read this model's tokenizer.json; another name would choose among transformers' readers.
_CLASSES = (
    "Qwen2Tokenizer",
    "Qwen2TokenizerFast",
    "PreTrainedTokenizerFast",
    "TokenizersBackend",
)
_DEFAULT = "default"
"""Which of several chat templates is taken, as transformers does."""


def has_tokenizer(folder: Path) -> bool:
    """Whether there is a tokenizer to read."""
    return any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json"))


def read_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in `folder`, and where there is a config.json, one that fits it.

    Raises:
        FileNotFoundError: if there is no directory, or no tokenizer in it.
        ValueError: naming the file, if it is malformed or not of a Qwen3-VL, or the tokenizer
            knows ids for which the model has no row.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such directory{convert_first(folder)}")
    if not has_tokenizer(folder):
        raise FileNotFoundError(f"{folder}: no tokenizer.json (nor vocab.json with merges.txt)")
    config = read_config(folder) if (folder / "config.json").exists() else None
    if config is not None:
        check_model_type(config)
    settings = read_json_if_any(folder / "tokenizer_config.json")
    kind = settings.text("tokenizer_class", None)
    if kind is not None and kind not in _CLASSES:
        settings.refuse("tokenizer_class", f"must be {' or '.join(_CLASSES)}, got {kind!r}")
    try:
        with TemporaryDirectory() as copies:
            tokenizer = AutoTokenizer.from_pretrained(
                str(copied_settings(folder, copies)), local_files_only=True, trust_remote_code=False
            )
    except BucketError:
        raise
    except Exception as error:  # the reader of tokenizer.json raises Exception itself
        for name in _FILES:
            if (folder / name).exists():
                read_json(folder / name)
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"{folder}: the tokenizer cannot be read (tokenizer.json, tokenizer_config.json):"
            f" {reason}"
        ) from error
    _check_named(folder, tokenizer, settings)
    if config is not None:
        check_vocabulary(tokenizer, config)
    return tokenizer


def _check_named(folder: Path, tokenizer: PreTrainedTokenizerBase, settings: JsonObject) -> None:
    """Raises ValueError for a special token that is named and not in the vocabulary: transformers
    would add it, and the model has never seen it."""
    files = [folder / name for name in _FILES if (folder / name).exists()]
    known = {token for file in files for token in _tokens(read_json(file))}
    for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
        token = getattr(tokenizer, name)
        if settings.get(name) is not None and token not in known:
            settings.refuse(name, f"{token!r:.80} is no token of the vocabulary")


def _tokens(file: JsonObject) -> Iterator[str]:
    """The tokens that a file of a tokenizer's brings."""
    name = Path(file.file).name
    if name in ("vocab.json", "added_tokens.json"):
        yield from file
    elif name == "tokenizer.json":
        yield from file.object("model").get("vocab", ())
        yield from (token.text("content") for token in file.objects("added_tokens"))
    elif name == "tokenizer_config.json" and (added := file.object("added_tokens_decoder", None)):
        yield from (added.object(number).text("content") for number in added)


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, config: JsonObject) -> None:
    """Raises ValueError if the tokenizer knows ids beyond `text_config.vocab_size`."""
    rows = config.object("text_config").integer("vocab_size")
    token, largest = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if largest >= rows:
        raise ValueError(
            f"{config.file}: text_config.vocab_size is {rows}, but the tokenizer's {token!r} is"
            f" {largest}: resize the model's embedding to {largest + 1} rows, or take the token out"
        )


def read_chat_template(folder: Path, tokenizer: PreTrainedTokenizerBase) -> str:
    """The processor's template where it has one of its own, else the tokenizer's
    (chat_template.jinja among them); of several, the one named "default".

    Raises:
        ValueError: naming the file, if there is none.
    """
    for name in ("processor_config.json", "chat_template.json"):
        file = read_json_if_any(folder / name)
        if template := file.get("chat_template"):
            return _one_template(template, file.file)
    if template := tokenizer.chat_template:
        return _one_template(template, f"{folder}/tokenizer_config.json")
    raise ValueError(f"{folder}: no chat template (chat_template.jinja)")


def _one_template(template: Any, file: str) -> str:
    if isinstance(template, list) and all(isinstance(entry, Mapping) for entry in template):
        template = {entry.get("name"): entry.get("template") for entry in template}
    if isinstance(template, Mapping):
        if _DEFAULT not in template:
            names = ", ".join(map(repr, template))
            raise ValueError(f"{file}: chat_template: none of {names} is named {_DEFAULT!r}")
        template = template[_DEFAULT]
    if not isinstance(template, str):
        raise ValueError(f"{file}: chat_template must be a text or texts by name")
    return template
