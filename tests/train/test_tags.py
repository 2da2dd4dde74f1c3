"""What goes with a model that learned its tags as text."""

from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer

from demo.checkpoint import write_assets
from pvm_jax.data.processor import Processor
from train.config import Bucket, DataConfig
from train.run.lifecycle import assets_of
from train.sft.config import SFTConfig


@pytest.mark.parametrize("tags", [[], ["<think>"]])
def test_the_tokenizer_of_a_whole_model_forgets_them_too(tmp_path, tags):
    write_assets(tmp_path)
    file = tmp_path / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    tokenizer.save(str(file))
    data = DataConfig("data.jsonl", [Bucket(8, 4)])
    config = SFTConfig(str(tmp_path), "run", data, trainable="all", tags_as_text=tags)
    with assets_of(config) as assets:
        names = {path.name for path in Path(assets).iterdir()}
        written = Processor.from_pretrained(assets)
    expected = Processor.from_pretrained(tmp_path, tags_as_text=tags)
    assert {path.name for path in tmp_path.iterdir()} <= names
    assert written.fingerprint == expected.fingerprint
    assert ("<think>" in written.tokenizer.get_vocab()) == (not tags)
