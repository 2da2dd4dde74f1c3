"""Conversations on disk, buckets, and the order of batches."""

import json
from dataclasses import dataclass

import numpy as np
import pytest

from train import data as train_data
from train.config import Bucket, DataConfig, SFTConfig
from train.data import Conversations, assign, load_training_data


@dataclass(frozen=True)
class FakeBatch:
    """Stands for pvm_jax.batch.Batch: which examples, in which shape."""

    ids: np.ndarray
    shape: tuple[int, int]

    @staticmethod
    def from_rows(rows, config, *, length, patches):
        return FakeBatch(np.array([example for (example,) in rows]), (length, patches))


class FakeProcessor:
    """Reads an example's number and size from its text."""

    def count(self, messages):
        _, tokens, patches = map(int, messages[0]["content"].split())
        return tokens, patches

    def encode(self, messages):
        return int(messages[0]["content"].split()[0])


@pytest.fixture(autouse=True)
def fake_batch(monkeypatch):
    monkeypatch.setattr(train_data, "Batch", FakeBatch)


@pytest.fixture
def make_config(tmp_path):
    """(sizes, **overrides) -> config of a run over examples of these (tokens, patches)."""

    def make(sizes, *, buckets=((10, 4), (20, 16)), too_long="drop", **overrides):
        path = tmp_path / "data.jsonl"
        lines = [
            json.dumps({"messages": [{"role": "assistant", "content": f"{index} {tokens} {patches}"}]})
            for index, (tokens, patches) in enumerate(sizes)
        ]
        path.write_text("\n".join(lines) + "\n")
        data = DataConfig(str(path), [Bucket(*bucket) for bucket in buckets], too_long=too_long)
        return SFTConfig(checkpoint="", run_dir="", data=data, **overrides)

    return make


def read(config, **kwargs):
    data = load_training_data(config, FakeProcessor(), None, **kwargs)
    return [data.batches[index] for index in range(len(data.batches))]


SIZES = [(5, 4)] * 40 + [(15, 4)] * 20 + [(5, 16)] * 4


def test_every_example_once_in_the_smallest_bucket_that_holds_it(make_config):
    batches = read(make_config(SIZES, batch_size=4))
    assert sorted(np.concatenate([batch.ids for batch in batches])) == list(range(64))
    for batch in batches:
        assert batch.shape == ((10, 4) if max(batch.ids) < 40 else (20, 16))
    assert [batch.shape for batch in batches] != sorted(batch.shape for batch in batches)  # the buckets are mixed


def test_every_epoch_reads_every_example_in_another_order(make_config):
    batches = read(make_config([(5, 4)] * 12, batch_size=4, epochs=2))
    ids = np.concatenate([batch.ids for batch in batches])
    first, second = ids[:12], ids[12:]
    assert sorted(first) == sorted(second) == list(range(12))
    assert list(first) != list(second)


def test_the_order_depends_on_the_seed_alone(make_config):
    def ids(**overrides):
        return [list(batch.ids) for batch in read(make_config(SIZES, batch_size=4, **overrides))]

    assert ids() == ids()
    assert ids() != ids(seed=1)


def test_hosts_share_shapes_and_split_the_rows(make_config):
    config = make_config([*SIZES, (5, 4)], batch_size=4)  # 41 small examples: one is left over on every host
    whole = read(config)
    parts = [read(config, rows=rows) for rows in (slice(0, 2), slice(2, 4))]
    for batch, first, second in zip(whole, *parts, strict=True):
        assert first.shape == second.shape == batch.shape
        assert [*first.ids, *second.ids] == list(batch.ids)


def test_measured_sizes_are_kept_for_the_next_start(make_config, tmp_path):
    config = make_config(SIZES, batch_size=4)
    expected = read(config, sizes_file=tmp_path / "sizes.npy")
    (tmp_path / "data.jsonl").write_text("{}\n" * len(SIZES))  # nothing is measured again
    data = load_training_data(config, FakeProcessor(), None, sizes_file=tmp_path / "sizes.npy")
    assert len(data.batches) == len(expected)


def test_too_long_examples_are_counted_or_refused(make_config):
    sizes = [(5, 4), (99, 4), (5, 99), (5, 4)]
    data = load_training_data(make_config(sizes, batch_size=2), FakeProcessor(), None)
    assert sorted(data.batches[0].ids) == [0, 3]
    assert "2 examples too long" in data.report
    with pytest.raises(ValueError, match=r"2 examples fit no bucket, the first is .*data.jsonl:2 with 99 tokens"):
        load_training_data(make_config(sizes, batch_size=2, too_long="error"), FakeProcessor(), None)


def test_a_bucket_that_cannot_fill_a_batch_passes_its_examples_on():
    sizes = np.array([(5, 4)] * 3 + [(15, 4)] * 5)
    buckets = [Bucket(10, 4), Bucket(20, 16)]
    assert [len(members) for members in assign(sizes, buckets, least=4)] == [0, 8]
    assert [len(members) for members in assign(sizes, buckets, least=3)] == [3, 5]


def test_max_steps_cuts_the_run(make_config):
    config = make_config(SIZES, batch_size=4, max_steps=3)
    assert [list(b.ids) for b in read(config)] == [list(b.ids) for b in read(make_config(SIZES, batch_size=4))][:3]


def test_too_few_examples_for_a_batch_is_an_error(make_config):
    with pytest.raises(ValueError, match="no bucket has the 64 examples of one batch"):
        read(make_config(SIZES[:10]))


def test_the_iterator_starts_at_any_step(make_config):
    data = load_training_data(make_config(SIZES, batch_size=4), FakeProcessor(), None)
    whole = [list(batch.ids) for batch in data.iterator(0, threads=2, prefetch=4)]
    assert [list(batch.ids) for batch in data.iterator(5, threads=2, prefetch=4)] == whole[5:]


def test_image_paths_are_relative_to_the_file(tmp_path):
    path = tmp_path / "data.jsonl"
    content = [
        {"type": "image", "image": "a.png"},
        {"type": "image", "image": "/elsewhere/b.png"},
        {"type": "video", "video": ["c.png", "d.png"]},
        {"type": "text", "text": "?"},
    ]
    path.write_text(json.dumps({"messages": [{"role": "user", "content": content}]}))
    (message,) = Conversations(path)[0]
    assert [part.get("image", part.get("video")) for part in message["content"]] == [
        str(tmp_path / "a.png"),
        "/elsewhere/b.png",
        [str(tmp_path / "c.png"), str(tmp_path / "d.png")],
        None,
    ]


@pytest.mark.parametrize("line", ["{", "[]", '{"message": []}', '{"messages": [{"role": "user"}]}', '{"messages": 3}', ""])
def test_a_bad_line_is_named(tmp_path, line):
    path = tmp_path / "data.jsonl"
    path.write_text('{"messages": []}\n' + line + "\n")
    conversations = Conversations(path)
    assert conversations[0] == []
    with pytest.raises(ValueError, match=r"data.jsonl:2: not an object"):
        conversations[1]


def test_an_example_that_is_refused_is_named(make_config):
    config = make_config([(5, 4), (5, "many")], batch_size=1)
    with pytest.raises(ValueError, match=r"data.jsonl:2: invalid literal"):
        read(config)


def test_an_example_without_an_assistant_turn_is_refused(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"messages": [{"role": "user", "content": "0 1 4"}]}')
    with pytest.raises(ValueError, match=r"data.jsonl:1: there is no assistant turn"):
        train_data.measure(Conversations(path), FakeProcessor().count, 1)
