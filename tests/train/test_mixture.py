"""A mixture file in the place of sources."""

import pytest

from pvm_jax.data.conversations import open_conversations
from train.config import Bucket, ExamplesConfig
from train.mixture import Source, mixture_of


def test_a_mixture_file_is_the_sources_that_it_names(tmp_path):
    file = tmp_path / "mixture.yaml"
    file.write_text("sources:\n- a.jsonl\n- {path: /data/b, weight: 0.5}\n")
    named = [Source(str(tmp_path / "a.jsonl"), 2.0), Source("/data/b", 1.0)]
    assert mixture_of([Source(str(file), 2.0), "c"]) == [*named, Source("c")]
    config = ExamplesConfig(str(file), [Bucket(8, 8)])
    assert config.sources == [Source(named[0].path), Source("/data/b", 0.5)]
    assert ExamplesConfig("a.jsonl", [Bucket(8, 8)]).sources == "a.jsonl"


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("sources: []", "a mixture file has one key"),
        ("data: [a]", "a mixture file has one key"),
        ("sources: [{path: a, wieght: 2}]", "a source is a path"),
        ("sources: [[a]]", "a source is a path"),
        ("sources: [{path: 3}]", "a path must be a text, got 3"),
        ("sources: [{path: a, weight: two}]", "the weight of a must be .* above 0, got 'two'"),
        ("sources: [{path: a, weight: .inf}]", "the weight of a must be a finite number"),
        ("sources: [mixture.yml]", r"mixture\.yml is a mixture file too"),
    ],
)
def test_another_file_is_refused(tmp_path, content, told):
    file = tmp_path / "mixture.yml"
    file.write_text(content)
    with pytest.raises(ValueError, match=rf"mixture\.yml: .*{told}"):
        mixture_of(str(file))
    with pytest.raises(ValueError, match=r"mixture\.yml: a mixture file is for the sources"):
        open_conversations(file)


def test_a_file_that_is_not_there_is_named():
    with pytest.raises(FileNotFoundError, match=r"^sources: none\.yaml: no such mixture file$"):
        mixture_of("none.yaml")
