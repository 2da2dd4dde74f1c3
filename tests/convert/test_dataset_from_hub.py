"""Data sets of the Hub, by their ids: a server on localhost."""

import json
import shutil
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import constants

from convert import dataset, hub_dataset
from demo.task import Mixture, make_example, write
from pvm_jax.data.conversations import open_conversations
from tests.hub_server import REVISION, TOKEN, Hub, hub

__all__ = ["hub"]
ID = "someone/talks"


def turns(answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}]


def write_lines(file: Path, *answers: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps({"messages": turns(answer)}) + "\n" for answer in answers)
    file.write_text("".join(lines))


def write_table(file: Path, *answers: str) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    file.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"messages": turns(answer)} for answer in answers]
    parquet.write_table(pyarrow.Table.from_pylist(rows), file)


@pytest.fixture
def served(hub, tmp_path, monkeypatch) -> Path:
    """The folder of the data set, in a working directory of its own."""
    folder = tmp_path / "served"
    folder.mkdir()
    hub.repositories[f"datasets/{ID}"] = folder
    monkeypatch.chdir(tmp_path)
    return folder


def converted(*arguments: str) -> tuple[list[str], str]:
    """The answers in the shards, and what these say of their source."""
    shutil.rmtree("shards", ignore_errors=True)
    dataset.main([arguments[0], "shards", *arguments[1:]])
    source = json.loads(Path("shards/dataset.json").read_text())["source"]
    return [talk[-1]["content"] for talk in open_conversations("shards")], source


def test_the_card_says_what_subsets_and_splits_are(hub, served, refused):
    write_table(served / "short" / "train-0.parquet", "a", "b")
    write_table(served / "short" / "train-1.parquet", "c")
    write_table(served / "short" / "old" / "train-2.parquet", "none")
    write_table(served / "short" / "test-0.parquet", "d")
    write_lines(served / "long" / "all.jsonl", "e")
    (served / "README.md").write_text("""---
configs:
- config_name: short
  data_files:
  - split: train
    path: short/train-*
  - split: test
    path: [short/test-0.parquet]
- config_name: long
  data_files: long/**/*.jsonl
---
""")
    source = f"hf://datasets/{ID}@{REVISION} (subset short, split train)"
    assert converted(ID, "--subset=short", "--split=train") == (["a", "b", "c"], source)
    assert hub.files_given() == {"README.md", "train-0.parquet", "train-1.parquet"}
    assert converted(f"{ID}@main", "--subset=long")[0] == ["e"]
    uri = f"hf://datasets/{ID}/short/test-*.parquet"
    assert converted(uri) == (["d"], f"hf://datasets/{ID}@{REVISION}/short/test-*.parquet")
    several = refused(dataset.main, [ID, "dst", "--split", "train"])
    assert several.endswith(f"{ID} has the subsets short, long: choose one with --subset")
    assert "has the splits train, test: choose" in refused(
        dataset.main, [ID, "dst", "--subset", "short"]
    )
    assert "says which files" in refused(dataset.main, [uri, "dst", "--split", "test"])


def test_without_a_card_the_names_of_files_say_it(served, refused):
    write_lines(served / "data" / "train.jsonl", "a")
    write_lines(served / "data" / "eval.jsonl", "b")
    assert converted(ID, "--split", "train")[0] == ["a"]
    assert converted(ID, "--split", "test")[0] == ["b"]
    assert "splits train, test: choose one" in refused(dataset.main, [ID, "dst"])
    assert "names no subsets" in refused(dataset.main, [ID, "dst", "--subset", "x"])


def test_pictures_beside_lines_come_along(served):
    write([make_example(Mixture(sizes=(1,), lines=(1, 1)), 0)], served)
    dataset.main([ID, "shards"])
    (picture,) = served.rglob("*.png")
    source = open_conversations("shards")[0][0]["content"][0]["image"]
    assert source["bytes"] == picture.read_bytes()


class TestStream:
    @pytest.fixture(autouse=True)
    def room(self, served, tmp_path, monkeypatch) -> Path:
        """Where temporary files are, of a data set of three tables."""
        for number, answers in enumerate(("ab", "cd", "ef")):
            write_table(served / f"train-{number}.parquet", *answers)
        room = tmp_path / "room"
        room.mkdir()
        monkeypatch.setattr(tempfile, "tempdir", str(room))
        return room

    def test_one_file_is_here_at_a_time(self, hub, room, tmp_path, monkeypatch):
        seen = []

        def look(*given, **options):
            seen.append(sorted(file.name for file in room.rglob("*.parquet")))
            return open_conversations(*given, **options)

        monkeypatch.setattr(dataset, "open_conversations", look)
        streamed = converted(ID, "--stream")
        assert seen == [[f"train-{number}.parquet"] for number in range(3)]
        assert not list(room.iterdir())
        assert not list((tmp_path / "hub_cache").rglob("*.parquet"))
        assert streamed == converted(ID)
        assert streamed[0] == list("abcdef")

    def test_what_is_not_counted_is_not_fetched(self, hub):
        assert converted(ID, "--stream", "--count", "3")[0] == list("abc")
        assert hub.files_given() == {"train-0.parquet", "train-1.parquet"}
        assert converted(ID, "--count", "5")[0] == list("abcde")

    def test_it_goes_on_where_the_connection_was_cut(self, hub, monkeypatch):
        monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 100)
        hub.cut = {"train-1.parquet"}
        assert converted(ID, "--stream")[0] == list("abcdef")
        assert any(start for line, start in hub.asked if line.endswith("train-1.parquet"))

    def test_later_files_are_asked_for_again(self, hub, room, refused, monkeypatch, capsys):
        def pausing(sleep):
            monkeypatch.setattr(hub_dataset, "time", SimpleNamespace(sleep=sleep))

        pauses = []
        pausing(pauses.append)
        hub.gated = {"train-1.parquet"}
        said = refused(dataset.main, [ID, "shards", "--stream"])
        assert f"{ID}: train-1.parquet is not here, and as a dataset of" in said
        assert "Nothing is kept of the 1 of 3 files that were read: the same command" in said
        assert pauses == [10, 60, 300]
        assert [file.name for file in Path().iterdir() if file.name.startswith("shards")] == []
        assert not list(room.iterdir())
        pausing(lambda seconds: hub.gated.clear())
        assert converted(ID, "--stream")[0] == list("abcdef")
        assert "asking again in 10 s" in capsys.readouterr().err
        hub.gated = {"train-0.parquet"}
        pausing(lambda seconds: pytest.fail("the first is not"))
        refused(dataset.main, [ID, "dst", "--stream"])

    def test_pictures_that_lie_beside_are_refused(self, served, refused):
        for file in served.iterdir():
            file.unlink()
        write([make_example(Mixture(sizes=(1,), lines=(1, 1)), 0)], served)
        said = refused(dataset.main, [ID, "dst", "--stream"])
        assert "may show the pictures that lie beside it" in said


def test_each_refusal_is_one_line(
    hub: Hub, served: Path, refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def said(*arguments: str) -> str:
        line = refused(dataset.main, [arguments[0], "dst", *arguments[1:]])
        assert not [file.name for file in tmp_path.iterdir() if file.name.startswith("dst")]
        return line

    (served / "data.csv").write_text("a,b")
    assert "has no split that is read here: choose" in said(ID)
    assert "data.csv is not read: .parquet, .jsonl" in said(f"hf://datasets/{ID}/data.csv")
    cards = ("configs: [", "configs: [a]", "configs: [{config_name: a, data_files: [{a: b}]}]")
    for number, card in enumerate(cards, 2):
        hub.revision = str(number) * 40
        (served / "README.md").write_text(f"---\n{card}\n---\n")
        assert "the configs of its README.md are not understood: give files" in said(ID)
    assert "no file is there" in said(f"hf://datasets/{ID}/none.jsonl")
    assert "is no dataset: give hf://datasets/OWNER/NAME" in said("hf://someone/model")
    assert "of data sets of the Hub, and" in said(str(served), "--split", "train")
    assert "of data sets of the Hub, and" in said(str(served), "--stream")
    assert "--count must be at least 1" in said(ID, "--count", "0")
    assert "no such file" in said("someone/missing.jsonl")
    assert "does not exist, or not for everyone" in said("someone/missing")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert "as a dataset of" in said("someone/other")
    assert "is closed to this token" in said("someone/other")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set, and" in said("someone/other")


def test_nothing_is_fetched_for_a_place_that_cannot_be_written(hub, served, refused, tmp_path):
    write_lines(served / "talks.jsonl", "a")
    (tmp_path / "file").touch()
    assert "File exists" in refused(dataset.main, [ID, "file/dst"])
    assert hub.files_given() == set()


def test_offline_reads_what_was_read_before(hub, served, monkeypatch):
    write_lines(served / "talks.jsonl", "a")
    hub.private.add(f"datasets/{ID}")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    once = converted(ID)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert converted(ID) == once
