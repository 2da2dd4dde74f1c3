"""Checkpoints, data and answers in a bucket: as on a local disk, bit for bit."""

import json
import tarfile
from contextlib import suppress
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from convert import dataset, hf_to_orbax, orbax_to_hf
from pvm_jax import load, save
from pvm_jax.apps.answer import answer_file, open_questions
from pvm_jax.checkpoint.checksums import CHECKSUMS
from pvm_jax.checkpoint.directory import UNFINISHED, CheckpointError, write_aside
from pvm_jax.data.conversations import open_conversations
from pvm_jax.data.processor import Processor
from pvm_jax.files.bucket import BucketError
from pvm_jax.measure.report.page import write_report
from tests.bucket_server import both_buckets
from tests.conftest import GOLDEN
from tests.tiny import CONFIG, make_model
from tests.train.runs import write_workplace
from train.data.contents import contents_of
from train.mixture import Source, mixture_of


def put(source: Path, target: Path) -> None:
    """Copies a file or a directory into a bucket."""
    for file in [source] if source.is_file() else source.rglob("*"):
        if file.is_file():
            (target / file.relative_to(source).as_posix()).write_bytes(file.read_bytes())


def same(one, other) -> bool:
    leaves = [jax.tree.leaves(nnx.state(model)) for model in (one, other)]
    return all(a.dtype == b.dtype and np.array_equal(a, b) for a, b in zip(*leaves, strict=True))


@pytest.fixture(scope="module")
def model():
    return make_model(CONFIG)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    write_workplace(root, examples=6)
    return root


@both_buckets
class TestCheckpoint:
    def test_is_written_and_read(self, model, bucket, server):
        save(bucket / "ck", model)
        assert same(load(bucket / "ck"), model)
        keys = server.keys(bucket.name)
        assert not {f"ck/{UNFINISHED}", f"ck/{CHECKSUMS}"} & {*keys}
        assert [key for key in keys if not key.startswith("ck/")] == []
        with pytest.raises(FileExistsError, match=f"{bucket}/ck exists and is not empty"):
            save(bucket / "ck", model)

    def test_half_of_one_is_none(self, model, bucket, server):
        with suppress(KeyboardInterrupt), write_aside(bucket / "no") as directory:
            (directory / "config.json").write_text("{}")
            raise KeyboardInterrupt
        assert not (bucket / "no").exists()
        save(bucket / "ck", model)
        (bucket / "ck" / UNFINISHED).write_text("")  # as a kill leaves it
        (bucket / "ck" / "stale").write_text("")
        with pytest.raises(
            CheckpointError, match=f"{bucket}/ck was never finished: .*{UNFINISHED}"
        ):
            load(bucket / "ck")
        save(bucket / "ck", model)
        assert not (bucket / "ck" / "stale").exists()
        assert same(load(bucket / "ck"), model)
        gone = next(key for key in server.keys(bucket.name) if "/d/" in key or "/c/" in key)
        (bucket / gone).unlink()
        with pytest.raises(CheckpointError, match=f"{bucket}/ck/params cannot be read"):
            load(bucket / "ck")

    def test_closed_to_us(self, bucket, server):
        server.fault = lambda method, path: 403
        with pytest.raises(BucketError, match=f"{bucket}/ck/.* is closed to this user"):
            load(bucket / "ck")

    def test_converted_there_and_back(self, bucket, tmp_path):
        put(GOLDEN / "shape_8b", bucket / "hf")
        hf_to_orbax.convert(bucket / "hf", bucket / "ck")
        hf_to_orbax.convert(GOLDEN / "shape_8b", tmp_path / "ck")
        assert same(load(bucket / "ck"), load(tmp_path / "ck"))
        orbax_to_hf.convert(bucket / "ck", bucket / "back")
        orbax_to_hf.convert(tmp_path / "ck", tmp_path / "back")
        for file in (tmp_path / "back").iterdir():
            assert (bucket / "back" / file.name).read_bytes() == file.read_bytes()


class TestData:
    @pytest.fixture
    def there(self, workplace, bucket):
        """The data beside their pictures, in the bucket."""
        for file in [*workplace.glob("*.jsonl"), *workplace.glob("*.png")]:
            (bucket / "data" / file.name).write_bytes(file.read_bytes())
        put(workplace / "hf", bucket / "hf")
        return bucket / "data"

    def test_json_lines_and_shards(self, workplace, there, bucket, tmp_path):
        processor = Processor.from_pretrained(bucket / "hf")
        here = Processor.from_pretrained(workplace / "hf")
        assert processor.fingerprint == here.fingerprint
        lines, local = (open_conversations(at / "data.jsonl") for at in (there, workplace))
        assert lines.where(2) == f"{there}/data.jsonl:3"
        for mine, other in zip(lines, local, strict=True):
            mine, other = processor.encode(mine), here.encode(other)
            assert np.array_equal(mine.input_ids, other.input_ids)
            assert np.array_equal(mine.pixel_values, other.pixel_values)
        assert contents_of(lines, 2) == contents_of(local, 2)
        assert len(open_conversations(there / "d*.jsonl")) == len(open_conversations(there)) == 6
        dataset.convert(there / "data.jsonl", bucket / "shards", processor)
        dataset.convert(workplace / "data.jsonl", tmp_path / "shards", here)
        shards, local = (
            open_conversations(bucket / "shards"),
            open_conversations(tmp_path / "shards"),
        )
        assert list(shards) == list(local)
        assert np.array_equal(shards.sizes, local.sizes)
        (there / "0.png").unlink()
        gone = f"{there}/data.jsonl:1: .*{there}/0.png does not exist"
        with pytest.raises(ValueError, match=gone), lines.naming(0):
            processor.encode(lines[0])

    def test_a_picture_that_is_not_given_is_no_reject(self, there, bucket, storage):
        storage.fault = lambda method, path: 403 if path.endswith("3.png") else None
        with pytest.raises(BucketError, match=f"{there}/data.jsonl:4: .*/3.png is closed to this"):
            dataset.convert(there / "data.jsonl", bucket / "shards", max_rejected=1)
        storage.fault = lambda method, path: None
        assert not (bucket / "shards").exists()

    def test_tables(self, workplace, bucket, tmp_path):
        datasets = pytest.importorskip("datasets")
        rows = [
            {
                "messages": [
                    {"role": "user", "content": f"{n}"},
                    {"role": "assistant", "content": "a"},
                ]
            }
            for n in range(5)
        ]
        table = datasets.Dataset.from_list(rows)
        table.save_to_disk(tmp_path / "saved")
        table.to_parquet(tmp_path / "table.parquet")
        put(tmp_path / "saved", bucket / "saved")
        (bucket / "table.parquet").write_bytes((tmp_path / "table.parquet").read_bytes())
        for name in ("saved", "table.parquet"):
            assert list(open_conversations(bucket / name)) == list(
                open_conversations(tmp_path / name)
            )

    def test_tar_files_that_a_mixture_names(self, workplace, bucket, tmp_path):
        lines = (workplace / "data.jsonl").read_text().splitlines()
        for number, line in enumerate(lines):
            with tarfile.open(tmp_path / f"{number % 2}.tar", "a") as tar:
                (tmp_path / "record.json").write_text(line)
                tar.add(tmp_path / "record.json", f"{number}.json")
                tar.add(workplace / f"{number}.png", f"{number}.png")
        for name in ("0.tar", "1.tar"):
            (bucket / "data" / name).write_bytes((tmp_path / name).read_bytes())
        named = f"[{{path: ../data/0.tar, weight: 2}}, '{bucket}/data/1.tar', b/*.tar, /here.tar]"
        (bucket / "mix" / "all.yaml").write_text(f"sources: {named}")
        tars, local = open_conversations(bucket / "data"), open_conversations(tmp_path / "*.tar")
        assert list(tars) == list(local)
        assert contents_of(tars, 2) == contents_of(local, 2)
        assert tars.where(0) == f"{bucket}/data/0.tar:0"
        assert mixture_of([Source(f"{bucket}/mix/all.yaml", 3)]) == [
            Source(f"{bucket}/data/0.tar", 6),
            Source(f"{bucket}/data/1.tar", 3),
            Source(f"{bucket}/mix/b/*.tar", 3),
            Source("/here.tar", 3),
        ]

    def test_no_shards_of_a_conversion_that_was_killed(self, there, bucket, storage):
        (bucket / "shards" / UNFINISHED).write_text("")
        (bucket / "shards" / "shard-00000.array_record").write_text("half")
        with pytest.raises(ValueError, match=f"{bucket}/shards is no directory of conversations"):
            open_conversations(bucket / "shards")
        dataset.convert(there / "data.jsonl", bucket / "shards")
        assert len(open_conversations(bucket / "shards")) == 6


class Echo:
    """In place of a model: answers every question with itself."""

    class processor:
        count = staticmethod(lambda messages, **_: len(messages))
        encode = staticmethod(lambda messages, **_: messages)
        decode = staticmethod(str)

    def __init__(self, answers: int = 100):
        self.left = answers

    def written(self, examples, seeds):
        if not self.left:
            raise KeyboardInterrupt
        self.left -= 1
        return [[f"answer {seed}"] for seed in seeds]


def test_answers_go_on_where_they_ended(bucket):
    line = {"messages": [{"role": "user", "content": "q"}]}
    (bucket / "q.jsonl").write_text(f"{json.dumps(line)}\n" * 5)
    target = bucket / "answers.jsonl"

    def questions():
        return open_questions(Echo.processor, bucket / "q.jsonl", target, made_by={"a": 1})

    with pytest.raises(KeyboardInterrupt):
        answer_file(Echo(2), questions(), 2)
    first = target.read_bytes()
    assert first.count(b"\n") == 4
    target.write_bytes(first + b'{"source": ')
    answer_file(Echo(), questions(), 2)
    assert target.read_bytes().startswith(first)
    indices = [json.loads(line)["index"] for line in target.read_bytes().splitlines()]
    assert indices == list(range(5))


def test_a_report(bucket, tmp_path):
    pytest.importorskip("matplotlib")
    page = write_report([], bucket / "report", title="t")
    local = write_report([], tmp_path / "report", title="t")
    assert page.read_text() == local.read_text()
