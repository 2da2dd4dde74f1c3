"""Added tokens that texts hold in letters instead."""

import pytest
from tokenizers import AddedToken, Tokenizer

from demo.checkpoint import write_assets
from pvm_jax.data.processor import Processor

TAGS = ("<think>", "</think>")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The demo's tokenizer with two tokens more, as Qwen3-VL's has them."""
    folder = tmp_path_factory.mktemp("checkpoint")
    write_assets(folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in TAGS])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def asked(text):
    return [{"role": "user", "content": "List"}, {"role": "assistant", "content": text}]


def test_tags_are_written_in_letters_where_that_is_asked_for(checkpoint):
    text = "<think>A2 digit 0</think>A2 digit 0"
    usual, plain = (Processor.from_pretrained(checkpoint, tags_as_text=tags) for tags in ((), TAGS))
    ids = usual.tokenizer.convert_tokens_to_ids(list(TAGS))
    with_tokens, in_letters = (
        processor.encode(asked(text)).input_ids for processor in (usual, plain)
    )
    assert [list(with_tokens).count(tag) for tag in ids] == [1, 1]
    assert not set(ids) & set(in_letters)
    assert text in plain.decode(in_letters)  # what the rewards read
    assert len(in_letters) == plain.count(asked(text))[0] > len(with_tokens)
    for processor in (usual, plain):  # nothing else is read in another way
        assert processor.encode(asked("A2 digit 0")).input_ids.tolist() == (
            usual.encode(asked("A2 digit 0")).input_ids.tolist()
        )
    assert plain.fingerprint != usual.fingerprint


@pytest.mark.parametrize("tag", ["<thnik>", "<|im_end|>"])
def test_what_is_no_tag_is_refused(checkpoint, tag):
    told = f"tags_as_text: '{tag}' is no added token .* has '<think>', '</think>'".replace("|", ".")
    with pytest.raises(ValueError, match=told):
        Processor.from_pretrained(checkpoint, tags_as_text=[tag])
