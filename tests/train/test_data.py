"""Sources on disk, the order of batches, and what becomes of every example."""

import json
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import pytest
from PIL import Image

from pvm_jax.data.conversations import open_conversations, size_of
from tests.full_disk import full_disk
from train.config import Bucket, DataConfig, HideSchedule, Source
from train.data import loading as train_data
from train.data.loading import epoch_readings, load_training_data
from train.data.sizes import cached, measure
from train.run.samples import images_of, text_of
from train.sft.held_out import first_conversations


@dataclass(frozen=True)
class FakeBatch:
    """Stands for pvm_jax.data.batch.Batch: which examples, in which shape, in rows whose images are
    hidden or not."""

    rows: list[list[int]]
    shape: tuple[int, int]
    hidden: tuple[bool, ...] = ()

    @property
    def ids(self):
        return np.array([example for row in self.rows for example in row])

    @staticmethod
    def from_rows(rows, config, *, length, patches, videos):
        return FakeBatch(rows, (length, patches))


class FakeExample(int):
    """An example's number, and its size."""

    def __new__(cls, number, tokens, patches):
        example = super().__new__(cls, number)
        example.input_ids, example.num_patches = [0] * tokens, patches
        example.pixel_values_videos = None
        return example


class FakeProcessor:
    """Reads an example's number and size from its text."""

    def count(self, messages):
        _, tokens, patches = map(int, messages[0]["content"].split())
        return tokens, patches

    def encode(self, messages):
        return FakeExample(*map(int, messages[0]["content"].split()))


@pytest.fixture(autouse=True)
def fake_batch(monkeypatch):
    monkeypatch.setattr(train_data, "Batch", FakeBatch)
    monkeypatch.setattr(
        train_data, "hide_images", lambda batch, rows: replace(batch, hidden=tuple(rows))
    )


@pytest.fixture
def write(tmp_path):
    """(sizes, name, first number) -> path of a file with examples of these (tokens, patches)."""

    def write(sizes, name="data.jsonl", first=0):
        lines = [
            json.dumps(
                {"messages": [{"role": "assistant", "content": f"{index} {tokens} {patches}"}]}
            )
            for index, (tokens, patches) in enumerate(sizes, first)
        ]
        (tmp_path / name).write_text("\n".join(lines) + "\n")
        return str(tmp_path / name)

    return write


@pytest.fixture
def open_data(write):
    """(sizes, options of DataConfig and of load_training_data) -> TrainingData."""

    def open_data(
        sizes, *, buckets=((10, 4), (20, 16)), packing=False, too_long="drop", hide=0.0, **options
    ):
        buckets = [Bucket(*bucket) for bucket in buckets]
        config = DataConfig(
            write(sizes), buckets, packing=packing, too_long=too_long, hide_images=hide
        )
        return load_training_data(config, FakeProcessor(), None, **{"batch_size": 4} | options)

    return open_data


@pytest.fixture
def read(open_data):
    """The batches of `open_data`."""

    def read(*args, **options):
        data = open_data(*args, **options)
        return [data.batches[step] for step in range(len(data.batches))]

    return read


SIZES = [(5, 4)] * 40 + [(15, 4)] * 20 + [(5, 16)] * 4


def test_every_example_once_in_the_smallest_bucket_that_holds_it(read):
    batches = read(SIZES)
    assert sorted(np.concatenate([batch.ids for batch in batches])) == list(range(64))
    for batch in batches:
        assert batch.shape == ((10, 4) if max(batch.ids) < 40 else (20, 16))
    assert [batch.shape for batch in batches] != sorted(
        batch.shape for batch in batches
    )  # the buckets are mixed


def test_every_epoch_reads_every_example_in_another_order(read):
    ids = np.concatenate([batch.ids for batch in read([(5, 4)] * 12, epochs=2)])
    first, second = ids[:12], ids[12:]
    assert sorted(first) == sorted(second) == list(range(12))
    assert list(first) != list(second)


def test_the_order_depends_on_the_seed_alone(read):
    def ids(**options):
        return [batch.rows for batch in read(SIZES, **options)]

    assert ids() == ids()
    assert ids() != ids(seed=1)


@pytest.mark.parametrize("packing", [False, True])
def test_hosts_share_shapes_and_split_the_rows(read, packing):
    sizes = [*SIZES, (5, 4)]  # one small example more than whole batches
    whole = read(sizes, packing=packing)
    parts = [read(sizes, packing=packing, rows=rows) for rows in ((0, 1), (2, 3))]
    for batch, first, second in zip(whole, *parts, strict=True):
        assert first.shape == second.shape == batch.shape
        assert first.rows + second.rows == batch.rows


@pytest.mark.parametrize(("share", "hidden"), [(0, 0), (0.25, 1), (0.5, 2), (1, 4)])
def test_images_are_hidden_in_a_share_of_the_whole_batchs_rows(read, share, hidden):
    whole = read(SIZES, hide=share)
    parts = [read(SIZES, hide=share, rows=rows) for rows in ((0, 1), (2, 3))]
    for batch, first, second in zip(whole, *parts, strict=True):
        assert sum(batch.hidden) == hidden
        assert first.hidden + second.hidden == batch.hidden
        if hidden == 2:
            assert sum(first.hidden) == 1


@pytest.mark.parametrize(
    ("options", "counts"),
    [({}, (4, 0)), ({"share": 0.5, "then": 0.25}, (2, 1)), ({"share": 0.0, "then": 1.0}, (0, 4))],
)
def test_a_schedule_of_hidden_images_is_the_same_for_all_hosts_and_starts(
    read, open_data, options, counts
):
    """By step and row alone: whoever reads a step, in whatever run of the plan, hides the same."""
    hide = HideSchedule(until=0.4, **options)
    whole = read(SIZES, hide=hide)
    until = round(0.4 * len(whole))
    assert 0 < until < len(whole)
    assert [sum(batch.hidden) for batch in whole] == [
        counts[step >= until] for step in range(len(whole))
    ]
    parts = [read(SIZES, hide=hide, rows=rows) for rows in ((0, 1), (2, 3))]
    for batch, first, second in zip(whole, *parts, strict=True):
        assert first.hidden + second.hidden == batch.hidden
    data = open_data(SIZES, hide=hide)
    assert f" of the rows before step {until}, in " in data.report
    for start in (until - 1, until):
        resumed = data.iterator(start, threads=2, prefetch=4)
        assert [(b.rows, b.hidden) for b in resumed] == [(b.rows, b.hidden) for b in whole[start:]]


def test_a_plain_share_of_hidden_images_holds_for_the_whole_run(read):
    """And hides the rows that it always has: a run that was begun so goes on."""
    hidden = {batch.hidden for batch in read(SIZES, hide=0.5)}
    assert hidden == {(False, True, False, True)}


def test_measured_sizes_are_kept_for_the_next_start(read, open_data, write, tmp_path):
    expected = read(SIZES, sizes_file=tmp_path / "sizes.npy")
    other = [(tokens, patches + 1) for tokens, patches in SIZES]  # nothing is measured again
    data = open_data(other, sizes_file=tmp_path / "sizes.npy")
    assert len(data.batches) == len(expected)
    told = (
        r"data.jsonl:\d+ has (5|15) tokens and \d+ patches, and had (5|15) and \d+ when it was"
        " measured: .* set data.measure_anew"
    )
    with pytest.raises(ValueError, match=told):
        data.batches[0]


def test_no_more_epochs_are_laid_out_than_the_steps_take(open_data):
    data = open_data([(5, 4)] * 10, epochs=10**9, max_steps=7)
    assert len(data.batches) == 7
    assert "4 epochs" in data.report  # the first one has two batches
    assert len(open_data([(5, 4)] * 3, epochs=10**9, max_steps=2).batches) == 2
    assert len(open_data([(5, 4)] * 10, epochs=2, max_steps=70).batches) == 5
    with pytest.raises(ValueError, match="12 of 12 examples are too long"):
        open_data([(50, 4)] * 12, epochs=10**9, max_steps=1)


def test_sizes_that_cannot_be_written_name_their_file(open_data, tmp_path):
    (tmp_path / "file").write_text("in the way")
    told = r"cannot be written \(.*\): free space there, or give another --run_dir"
    with pytest.raises(OSError, match=f"{tmp_path}/file/sizes.npy {told}"):
        open_data(SIZES, sizes_file=tmp_path / "file" / "sizes.npy")
    with full_disk(), pytest.raises(OSError, match=f"{tmp_path}/sizes.npy {told}"):
        cached(tmp_path / "sizes.npy", lambda: np.zeros((1000, 2), np.int32))
    assert not (tmp_path / "sizes.npy").exists()


def test_too_long_examples_are_counted_or_refused(open_data):
    sizes = [(5, 4), (99, 4), (5, 99), (5, 4)]
    data = open_data(sizes, batch_size=2)
    assert sorted(data.batches[0].ids) == [0, 3]
    assert "2 examples are too long" in data.report
    with pytest.raises(
        ValueError, match=r"2 examples fit no bucket, the first is .*data.jsonl:2 with 99 tokens"
    ):
        open_data(sizes, batch_size=2, too_long="error")


def test_a_last_batch_is_completed_by_smaller_examples_or_given_up(open_data):
    data = open_data([(5, 4)] * 8 + [(15, 4)] * 5)
    batches = [data.batches[step] for step in range(len(data.batches))]
    assert sorted(batch.shape for batch in batches) == [(10, 4), (20, 16), (20, 16)]
    large = [example for batch in batches if batch.shape == (20, 16) for example in batch.ids]
    assert sum(example < 8 for example in large) == 3
    assert "1 readings fill no batch" in data.report
    data = open_data(
        [(5, 4)] * 2 + [(15, 4)] * 5
    )  # too few to complete: they are tried in their own bucket
    assert len(data.batches) == 1
    assert min(data.batches[0].ids) >= 2
    assert "3 readings fill no batch" in data.report


def test_max_steps_cuts_the_run(read):
    assert [batch.rows for batch in read(SIZES, max_steps=3)] == [
        batch.rows for batch in read(SIZES)
    ][:3]


def test_too_few_examples_for_a_batch_is_an_error(read):
    with pytest.raises(ValueError, match="no bucket has the 64 rows of one batch"):
        read(SIZES[:10], batch_size=64)


def test_the_iterator_starts_at_any_step(open_data):
    data = open_data(SIZES)
    whole = [batch.rows for batch in data.iterator(0, threads=2, prefetch=4)]
    assert [batch.rows for batch in data.iterator(5, threads=2, prefetch=4)] == whole[5:]
    assert list(data.iterator(len(whole), threads=2, prefetch=4)) == []


def test_a_step_names_the_examples_of_its_whole_batch(open_data):
    data = open_data(SIZES, rows=(0, 1), packing=True)
    for step in range(len(data.batches)):
        names = [
            [int(name.rpartition("data.jsonl:")[2]) - 1 for name in row]
            for row in data.examples(step)
        ]
        assert len(names) == 4
        assert names[:2] == data.batches[step].rows


def test_packed_rows_hold_several_whole_examples(read):
    batches = read([(5, 4)] * 42 + [(12, 0)] * 18, packing=True, buckets=((16, 12),))
    assert sorted(np.concatenate([batch.ids for batch in batches])) == list(range(60))
    tokens = [
        [5 if example < 42 else 12 for example in row] for batch in batches for row in batch.rows
    ]
    assert all(
        sum(row) <= 16 and len(row) <= 3 for row in tokens
    )  # a third of 5 tokens fits, its patches too
    assert len(batches) == (42 // 3 + 18) // 4


def test_filling_the_last_batch_leaves_nothing_over(read):
    batches = read([(5, 4)] * 6 + [(15, 4)] * 5, fill_last=True)
    assert sorted(np.concatenate([batch.ids for batch in batches])) == list(range(11))
    assert sorted(len(row) for batch in batches for row in batch.rows) == [0] * 5 + [1] * 11


def test_a_weight_says_how_often_an_epoch_reads_a_source(write):
    mixture = [Source("a", 2), Source("b", 0.5), Source("c", 1.5)]
    epochs = [epoch_readings(mixture, [4, 10, 6], seed=0, epoch=epoch) for epoch in range(2)]
    for readings in epochs:
        counts = np.bincount(readings, minlength=20)
        assert (counts[:4] == 2).all()
        assert sorted(counts[4:14]) == [0] * 5 + [1] * 5
        assert sorted(counts[14:]) == [1] * 3 + [2] * 3
    halves = [set(readings[(readings >= 4) & (readings < 14)]) for readings in epochs]
    assert halves[0] != halves[1]
    with pytest.raises(ValueError, match=r"weight 0\.001 of the 10 examples of b is none"):
        epoch_readings([Source("b", 0.001)], [10], seed=0, epoch=0)
    paths = [write([(5, 4)] * 4, "a.jsonl"), write([(5, 4)] * 8, "b.jsonl", first=100)]
    config = DataConfig([Source(paths[0], 3), paths[1]], [Bucket(10, 4)], packing=False)
    data = load_training_data(config, FakeProcessor(), None, batch_size=4)
    ids = np.concatenate([data.batches[step].ids for step in range(len(data.batches))])
    assert sorted(ids) == sorted([*range(4)] * 3 + [*range(100, 108)])
    assert {name.rpartition("/")[2][:7] for row in data.examples(0) for name in row} <= {
        "a.jsonl",
        "b.jsonl",
    }


def test_an_example_that_is_refused_is_named(read):
    with pytest.raises(ValueError, match=r"data.jsonl:2: invalid literal"):
        read([(5, 4), (5, "many")], batch_size=1)


def test_an_example_without_an_assistant_turn_is_refused(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"messages": [{"role": "user", "content": "0 1 4"}]}')
    with pytest.raises(ValueError, match=r"data.jsonl:1: there is no assistant turn"):
        measure(
            open_conversations(path), partial(size_of, count=FakeProcessor().count), 1, videos=False
        )


def test_samples_are_the_first_conversations_that_fit(open_data, write):
    def first(data, count):
        return [
            int(messages[0]["content"].split()[0]) for messages in first_conversations(data, count)
        ]

    sizes = [(99, 4), (5, 4), (5, 99), (15, 4), (5, 4)]
    data = open_data(sizes, fill_last=True)
    assert [first(data, count) for count in (0, 2, 9)] == [[], [1, 3], [1, 3, 4]]
    more = write([(5, 4)], "more.jsonl", first=100)
    config = DataConfig([write(sizes), more], [Bucket(10, 4)], packing=False)
    data = load_training_data(config, FakeProcessor(), None, batch_size=4, fill_last=True)
    assert first(data, 9) == [1, 4]


def test_a_sample_shows_all_texts_and_images():
    red, blue = (
        Image.new("RGB", size, colour) for size, colour in (((3, 2), "red"), ((1, 4), "blue"))
    )
    video = {"type": "video", "video": [blue, red], "fps": 2}
    messages = [
        {
            "role": "user",
            "content": [video, {"type": "text", "text": "a"}, {"type": "image", "image": red}],
        },
        {"role": "assistant", "tool_calls": [{"name": "zoom"}]},
        {"role": "tool", "content": "b"},
        {"role": "assistant", "content": None, "tool_calls": [{"name": "zoom"}]},
        {"role": "user", "content": [{"type": "image", "image": red}]},
    ]
    assert text_of(messages) == "a\n\nb"
    shown = images_of(messages)
    assert shown is not None
    expected = np.zeros((4, 7, 3))
    expected[:2, :6] = red.getpixel((0, 0))
    expected[:, 6] = blue.getpixel((0, 0))
    np.testing.assert_array_equal(shown, expected)
    assert images_of(messages[1:4]) is None
