"""A mixture file in the place of sources."""

import pytest

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
    "content", ["sources: []", "data: [a]", "sources: [{path: a, wieght: 2}]", "sources: [[a]]"]
)
def test_another_file_is_refused(tmp_path, content):
    file = tmp_path / "mixture.yml"
    file.write_text(content)
    with pytest.raises(ValueError, match=r"mixture\.yml: a (mixture file|source)"):
        mixture_of(str(file))
