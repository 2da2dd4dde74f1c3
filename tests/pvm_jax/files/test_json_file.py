"""The one reader of JSON that others wrote: what it takes, and that every error names file and
key."""

import pytest

from pvm_jax.files.json_file import JsonObject, read_json


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "is not JSON"),
        (b"", "is not JSON"),
        (b"\xff\xfe{}", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b'{"a": ' + b"1" * 5000 + b"}", "is not JSON"),
        (b"[1]", r"must hold a JSON object, got \[1\]"),
        (b"null", "must hold a JSON object, got null"),
    ],
)
def test_a_file_that_holds_no_object_is_named(tmp_path, content, message):
    file = tmp_path / "a.json"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=rf"^{file} {message}"):
        read_json(file)


def test_a_missing_file_and_a_directory_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_json(tmp_path / "a.json")
    with pytest.raises(ValueError, match="is no regular file"):
        read_json(tmp_path)


VALUES = JsonObject({"part": {"one": 1, "half": 0.5, "no": None, "list": [1, 2]}}, "a.json")
PART = VALUES.object("part")


def test_values_of_the_kind_asked_for():
    assert (PART.integer("one"), PART.number("one"), PART.number("half")) == (1, 1.0, 0.5)
    assert PART.integers("list") == (1, 2)
    assert (PART.integer("absent", 3), PART.text("no", None)) == (3, None)
    assert dict(PART) == {"one": 1, "half": 0.5, "no": None, "list": [1, 2]}


@pytest.mark.parametrize(
    ("read", "message"),
    [
        (lambda: PART.integer("absent"), "absent is missing"),
        (lambda: PART.integer("half"), "half must be a whole number of at least 0, got 0.5"),
        (lambda: PART.integer("one", least=2), "one must be a whole number of at least 2, got 1"),
        (lambda: PART.number("one", above=1), "one must be a finite number above 1, got 1"),
        (lambda: PART.integer("no"), "no must be a whole number of at least 0, got null"),
        (lambda: PART.flag("one"), "one must be true or false, got 1"),
        (lambda: PART.text("list"), r"list must be a text, got \[1, 2\]"),
        (lambda: PART.integers("one"), "one must be a list of whole numbers of at least 0"),
        (lambda: PART.object("one"), "one must be an object, got 1"),
    ],
)
def test_another_kind_is_refused(read, message):
    with pytest.raises(ValueError, match=rf"^a\.json: part\.{message}"):
        read()
