"""What a checkpoint's tokenizer files may be, and that none of a checkpoint's code is run."""

import io
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer

import convert.dataset
import convert.hf_to_orbax
import convert.orbax_to_hf
import pvm_jax.__main__
import train.grpo.__main__
import train.sft.__main__
from pvm_jax.data.processor import Processor
from pvm_jax.data.side_files import read_stop_tokens
from pvm_jax.data.tokenizer import read_chat_template, read_tokenizer

ROOT = Path(__file__).parents[2]
END = 2  # <|im_end|>


@pytest.fixture
def base(tmp_path) -> Path:
    """A copy of the demo's base, without its weights."""
    ignore = shutil.ignore_patterns("*.safetensors")
    return Path(shutil.copytree(ROOT / "demo" / "base", tmp_path / "base", ignore=ignore))


def change(file: Path, **keys: object) -> None:
    values = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(values | keys))


COMMANDS = {
    "hf_to_orbax": (convert.hf_to_orbax.main, "{source} {tmp}/orbax --plain"),
    "orbax_to_hf": (convert.orbax_to_hf.main, "{taken} {tmp}/back"),
    "dataset": (convert.dataset.main, "{tmp}/data.jsonl {tmp}/shards --checkpoint {taken}"),
    "generate": (pvm_jax.__main__.main, "generate --checkpoint {taken} --max-new-tokens 1 hi"),
    "measure": (
        pvm_jax.__main__.main,
        "measure --checkpoint {taken} --data {tmp}/data.jsonl --output {tmp}/report",
    ),
    "sft": (
        train.sft.__main__.main,
        "--config demo/branch.yaml --checkpoint {taken} --data.sources {tmp}/data.jsonl"
        " --run_dir {tmp}/run --dry-run --distributed.num_processes 1",
    ),
    "grpo": (
        train.grpo.__main__.main,
        "--config demo/grpo.yaml --checkpoint {taken} --data.sources {tmp}/data.jsonl"
        " --run_dir {tmp}/run --dry-run --distributed.num_processes 1",
    ),
}


@pytest.fixture(scope="module")
def converted(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("converted") / "checkpoint"
    convert.hf_to_orbax.convert(ROOT / "demo" / "base", path, plain=True)
    return path


class TestHostile:
    """A checkpoint whose files name classes of its own code, and a user who says yes to all."""

    @pytest.fixture
    def mark(self, tmp_path, monkeypatch) -> Path:
        """The file that the checkpoint's code would write."""
        monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 100))
        monkeypatch.chdir(ROOT)
        conversation = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hi"}]
        (tmp_path / "data.jsonl").write_text(json.dumps({"messages": conversation}) + "\n")
        return tmp_path / "mark"

    @pytest.fixture
    def source(self, tmp_path, mark) -> Path:
        return self.armed(shutil.copytree(ROOT / "demo" / "base", tmp_path / "source"), mark)

    @pytest.fixture
    def taken(self, converted, tmp_path, mark) -> Path:
        """The same, converted."""
        return self.armed(shutil.copytree(converted, tmp_path / "taken"), mark)

    def armed(self, folder: Path, mark: Path) -> Path:
        (folder / "evil.py").write_text(f"open({str(mark)!r}, 'w').close()\nclass Evil: ...\n")
        names = ("AutoConfig", "AutoModel", "AutoProcessor", "AutoImageProcessor")
        classes = dict.fromkeys(names, "evil.Evil") | {"AutoTokenizer": ["evil.Evil"] * 2}
        for name in ("config", "tokenizer_config", "preprocessor_config", "processor_config"):
            change(folder / f"{name}.json", auto_map=classes)
        return folder

    @pytest.mark.parametrize("command", ["hf_to_orbax", "orbax_to_hf", "dataset", "generate"])
    def test_its_code_is_left_alone(self, source, taken, mark, tmp_path, command):
        main, arguments = COMMANDS[command]
        main(arguments.format(source=source, taken=taken, tmp=tmp_path).split())
        assert not mark.exists()

    def test_a_model_type_of_its_own_is_refused(self, source, taken, mark, tmp_path, capsys):
        """By every command; transformers would ask for leave to run the code."""
        for folder in (source, taken):
            change(folder / "config.json", model_type="evil")
            change(folder / "tokenizer_config.json", tokenizer_class=None)
        for main, arguments in COMMANDS.values():
            with pytest.raises(SystemExit, match="2"):
                main(arguments.format(source=source, taken=taken, tmp=tmp_path).split())
            assert "model_type must be 'qwen3_vl'" in capsys.readouterr().err
        assert not mark.exists()

    def test_a_tokenizer_alone_is_read_without_it(self, taken, mark):
        (taken / "config.json").unlink()
        change(taken / "tokenizer_config.json", tokenizer_class=None)
        with pytest.raises(ValueError, match="the tokenizer cannot be read"):
            read_tokenizer(taken)
        assert not mark.exists()

    def test_one_file_alone_asks_transformers_for_a_class(self):
        asking = re.compile(
            r"^(from|import) [^)\"]*\bAuto(?!Axis)[A-Z]|\.Auto[A-Z]|trust_remote_code=True[,)]|"
            r"^import pickle",
            re.MULTILINE,
        )
        files = [
            file.relative_to(ROOT).as_posix()
            for package in ("pvm_jax", "convert", "train", "demo")
            for file in (ROOT / package).rglob("*.py")
            if file.name != "modeling_pvm_qwen3_vl.py"  # runs in transformers, never here
            and asking.search(file.read_text())
        ]
        assert files == ["pvm_jax/data/tokenizer.py"]


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "tokenizer_config.json", "preprocessor_config.json", "config.json"]
)
@pytest.mark.parametrize("content", ["{", "[]"])
def test_malformed_json_is_named(base, name, content):
    (base / name).write_text(content)
    with pytest.raises(ValueError, match=rf"{name}( is not JSON| must hold a JSON object)"):
        Processor.from_pretrained(base)


def test_json_that_is_no_tokenizer_is_named(base):
    change(base / "tokenizer.json", model={"type": "Nothing"})
    with pytest.raises(ValueError, match=rf"^{base}: the tokenizer cannot be read \(tokenizer"):
        read_tokenizer(base)


def test_another_reader_is_refused(base):
    change(base / "tokenizer_config.json", tokenizer_class="RagTokenizer")
    with pytest.raises(ValueError, match=r"tokenizer_class must be .*, got 'RagTokenizer'"):
        read_tokenizer(base)


def test_more_ids_than_rows_are_refused(base):
    change(base / "config.json", text_config={"vocab_size": 500})
    with pytest.raises(ValueError, match=r"vocab_size is 500, but the tokenizer's '.*' is \d+"):
        read_tokenizer(base)


class TestChatTemplate:
    @pytest.mark.parametrize(
        "several",
        [
            {"tool_use": "b", "default": "a"},
            [{"name": "tool_use", "template": "b"}, {"name": "default", "template": "a"}],
        ],
    )
    @pytest.mark.parametrize("name", ["chat_template.json", "tokenizer_config.json"])
    def test_of_several_the_default(self, base, name, several):
        change(base / name, chat_template=several)
        assert read_chat_template(base, read_tokenizer(base)) == "a"

    def test_several_without_a_default_are_named(self, base):
        change(base / "chat_template.json", chat_template={"rag": "a", "tool_use": "b"})
        with pytest.raises(ValueError, match=r"none of 'rag', 'tool_use' is named 'default'"):
            read_chat_template(base, read_tokenizer(base))

    def test_no_text_is_refused(self, base):
        change(base / "chat_template.json", chat_template=3)
        with pytest.raises(ValueError, match=r"chat_template must be a text"):
            read_chat_template(base, read_tokenizer(base))


class TestStopTokens:
    def test_of_each_file_in_turn(self, base):
        """generation_config.json, config.json, the tokenizer."""
        text = json.loads((base / "config.json").read_text())["text_config"]
        assert read_stop_tokens(base) == (END, 0)
        (base / "generation_config.json").unlink()
        assert read_stop_tokens(base) == (END,)
        change(base / "config.json", eos_token_id=7)
        assert read_stop_tokens(base) == (7,)
        change(base / "config.json", text_config=text | {"eos_token_id": [8, 9]})
        assert read_stop_tokens(base) == (8, 9)

    def test_no_text_may_hold_one(self, base):
        """Whichever file says that it is one."""
        (base / "generation_config.json").unlink()
        tag, tokenizer = "<think>", Tokenizer.from_file(str(base / "tokenizer.json"))
        tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False)])
        tokenizer.save(str(base / "tokenizer.json"))
        messages = [{"role": "user", "content": f"a {tag}"}, {"role": "assistant", "content": "b"}]
        Processor.from_pretrained(base).encode(messages)
        change(base / "config.json", eos_token_id=tokenizer.token_to_id(tag))
        with pytest.raises(ValueError, match=f"holds {tag}, which only the chat template"):
            Processor.from_pretrained(base).encode(messages)

    def test_of_weights_alone_none(self, base):
        for name in ("generation_config.json", "tokenizer.json"):
            (base / name).unlink()
        assert read_stop_tokens(base) == ()

    @pytest.mark.parametrize("value", ["<|im_end|>", -1, True, [1, "2"], 2.0, 640])
    def test_what_is_no_token_is_named(self, base, value):
        change(base / "generation_config.json", eos_token_id=value)
        with pytest.raises(ValueError, match=r"generation_config\.json: eos_token_id "):
            read_stop_tokens(base)


@pytest.mark.parametrize("token", ["<|imend|>", ""])
def test_a_special_token_that_is_none_is_named(base, token):
    change(base / "tokenizer_config.json", eos_token=token)
    with pytest.raises(ValueError, match=rf"config.json: eos_token '{re.escape(token)}' is no"):
        read_tokenizer(base)


@pytest.mark.parametrize(
    ("file", "keys", "message"),
    [
        ("preprocessor_config.json", {"merge_size": 1}, "merge_size of images is 1 "),
        ("preprocessor_config.json", {"temporal_patch_size": 1}, "temporal_patch_size of"),
        ("preprocessor_config.json", {"patch_size": 14}, "patch_size of images is 14"),
        ("preprocessor_config.json", {"patch_size": 2**20}, "a visual token has"),
        ("preprocessor_config.json", {"min_pixels": 2**40}, "would make every picture larger"),
        (
            "config.json",
            {"image_token_id": 1},
            "image_token_id is 1, but the",
        ),
        ("config.json", {"vision_end_token_id": 1}, "vision_end_token_id is 1, but"),
    ],
)
def test_inputs_that_the_model_does_not_read_are_refused(base, file, keys, message):
    change(base / file, **keys)
    with pytest.raises(ValueError, match=message):
        Processor.from_pretrained(base)
