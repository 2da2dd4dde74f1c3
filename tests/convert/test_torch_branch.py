"""The branch in PyTorch that an export brings along, run by transformers, against our own model."""

import dataclasses
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from convert import hf_to_orbax, orbax_to_hf
from pvm_jax import Batch, generate, load, save
from pvm_jax.data.example import Example
from tests.close import assert_close
from tests.convert.directories import read_tensors
from tests.convert.in_torch import read, tensors
from tests.tiny import CONFIG, EXAMPLES, example, randomized

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.usefixtures("run_by_transformers")

BAR = 3e-5
LONG = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
SHORT = LONG | {"max_new_tokens": 8}


def export(model: Any, directory: Path) -> Path:
    save(directory / "orbax", model)
    orbax_to_hf.convert(directory / "orbax", directory / "hf")
    return directory / "hf"


def rows_of(examples: list[Example], *, left: bool) -> dict[str, np.ndarray]:
    """The examples one a row, padded on one side, as the processor gives them."""
    length = max(len(one.input_ids) for one in examples)
    ids = np.zeros((len(examples), length), np.int64)
    mask = np.zeros_like(ids)
    for row, one in enumerate(examples):
        size = len(one.input_ids)
        columns = slice(length - size, length) if left else slice(size)
        ids[row, columns], mask[row, columns] = one.input_ids, 1
    shown = [one for one in examples if one.image_grid_thw is not None]
    arrays = {"input_ids": ids, "attention_mask": mask}
    if shown:
        arrays["pixel_values"] = np.concatenate([one.pixel_values for one in shown])
        arrays["image_grid_thw"] = np.concatenate([one.image_grid_thw for one in shown])
    return arrays


def projections(model: Any) -> Counter:
    """Counts, from now on, how often each branch projects visual tokens."""
    counts: Counter = Counter()
    for name, module in model.named_modules():
        if name.endswith("pvm_block.vision_reducer"):
            module.register_forward_hook(lambda *_, name=name: counts.update([name]))
    return counts


def cache_of(output: Any) -> dict[str, Any]:
    """The cache, by the name that this transformers has for it."""
    name = "cache" if "cache" in output else "past_key_values"
    return {name: output[name]}


def written(model: Any, inputs: dict[str, Any], **options: Any) -> np.ndarray:
    tokens = model.generate(**inputs, **LONG | options)
    return tokens[:, inputs["input_ids"].shape[1] :].numpy()


@pytest.fixture
def exported(golden, golden_checkpoints, tmp_path) -> Path:
    orbax_to_hf.convert(golden_checkpoints[golden.name], tmp_path / "exported")
    return tmp_path / "exported"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Callable[..., tuple[Any, Any]]:
    """(our model, the same in PyTorch), with `text` changed in the tiny config."""

    def make(**text: Any) -> tuple[Any, Any]:
        config = dataclasses.replace(CONFIG, text=dataclasses.replace(CONFIG.text, **text))
        model = randomized(config)
        return model, read(export(model, tmp_path_factory.mktemp("tiny")))

    return make


def test_logits(golden, golden_model, exported):
    model, arrays = read(exported), load_file(golden / "forward_inputs.safetensors")
    with torch.no_grad():
        got = model(**tensors(arrays, model.config)).logits.numpy()
    valid = arrays["attention_mask"].astype(bool)
    want = np.asarray(golden_model(Batch.from_hf(arrays, golden_model.config)))
    want = want[:, : valid.shape[1]][valid]
    assert_close(got[valid], want, BAR)
    assert np.abs(got[valid] - want).max() < 1e-4


def test_greedy_tokens_and_an_image_is_projected_once(golden, golden_model, exported):
    """40 tokens, with the cache and without."""
    model, arrays = read(exported), load_file(golden / "generate_inputs.safetensors")
    inputs, batch = tensors(arrays, model.config), Batch.from_hf(arrays, golden_model.config)
    want = generate(golden_model, batch, max_new_tokens=40, temperature=0.0, stop_tokens=()).tokens
    counts = projections(model)
    np.testing.assert_array_equal(written(model, inputs), want)
    assert set(counts.values()) == {1}
    assert len(counts) == len(golden_model.config.text.pvm_layers)
    np.testing.assert_array_equal(written(model, inputs, use_cache=False), want)


@pytest.mark.parametrize("golden", ["shape_8b"], indirect=True)
def test_loss_and_gradients(golden, exported):
    """Those of the authors' code, with every layer computed anew for the backward pass too."""
    model, arrays = read(exported), load_file(golden / "forward_inputs.safetensors")
    want = load_file(golden / "grad_outputs.safetensors")
    labels = torch.from_numpy(np.array(want["labels"], np.int64))
    parameters = dict(model.named_parameters())
    for train in (False, True):
        model.zero_grad()
        if train:
            model.gradient_checkpointing_enable()
            model.train()
        loss = model(**tensors(arrays, model.config), labels=labels).loss
        loss.backward()
        assert_close(loss.item(), want["loss"].item(), BAR)
        for name, gradient in want.items():
            if name.startswith("grad."):
                found = parameters[name.removeprefix("grad.")].grad.numpy()
                assert_close(found, gradient, BAR, what=name)


@pytest.mark.parametrize(
    "text",
    [{}, {"pvm_visibility": "preceding"}, {"pvm_gate": "token"}, {"attention_bias": True}],
    ids=str,
)
@pytest.mark.parametrize("left", [True, False])
def test_rows_with_one_image_none_and_two(tiny, text, left):
    ours, model = tiny(**text)
    arrays = rows_of(EXAMPLES, left=left)
    with torch.no_grad():
        got = model(**tensors(arrays, model.config)).logits.numpy()
    valid = arrays["attention_mask"].astype(bool)
    want = np.asarray(ours(Batch.from_hf(arrays, ours.config)))[:, : valid.shape[1]]
    assert_close(got[valid], want[valid], BAR)


def test_what_is_written_does_not_depend_on_padding(tiny):
    _, model = tiny()
    together = written(model, tensors(rows_of(EXAMPLES, left=True), model.config))
    for row, one in enumerate(EXAMPLES):
        alone = written(model, tensors(rows_of([one], left=True), model.config))
        np.testing.assert_array_equal(together[row : row + 1], alone)


@pytest.mark.parametrize("golden", ["shape_8b"], indirect=True)
def test_bfloat16(golden, exported):
    arrays = load_file(golden / "generate_inputs.safetensors")
    wide, narrow = read(exported), read(exported, dtype=torch.bfloat16)
    inputs = tensors(arrays, wide.config)
    assert written(narrow, inputs).shape == (2, 40)
    with torch.no_grad():
        want, got = wide(**inputs).logits, narrow(**inputs).logits
    assert got.dtype == torch.bfloat16
    valid = inputs["attention_mask"].bool()
    error = (got.float() - want)[valid].abs().max() / want[valid].abs().max()
    assert 1e-5 < error < 0.05


@pytest.mark.parametrize("golden", ["shape_8b"], indirect=True)
def test_layers_on_a_disk(golden, exported, tmp_path):
    """Weights that are only there while their layer is called, and arguments that are moved."""
    pytest.importorskip("accelerate")
    arrays = load_file(golden / "generate_inputs.safetensors")
    want = load_file(golden / "generate_outputs.safetensors")["new_tokens"]
    parts = ("visual", "language_model.embed_tokens", "language_model.norm")
    parts += ("language_model.rotary_emb",)
    places = {"lm_head": "cpu"} | {f"model.{part}": "cpu" for part in parts}
    places |= {f"model.language_model.layers.{layer}": "disk" for layer in range(5)}
    model = read(exported, device_map=places, offload_folder=tmp_path / "offloaded")
    np.testing.assert_array_equal(written(model, tensors(arrays, model.config)), want)


def test_a_later_image_joins_those_before_it(tiny):
    """A conversation that goes on with its cache, and the same read at once."""
    _, model = tiny(pvm_visibility="preceding")
    first = example(5, text=(5, 9), grids=((4, 6),))
    more = example(6, text=(4, 6), grids=((2, 8),))
    whole = Example(
        np.concatenate([first.input_ids, more.input_ids]),
        pixel_values=np.concatenate([first.pixel_values, more.pixel_values]),
        image_grid_thw=np.concatenate([first.image_grid_thw, more.image_grid_thw]),
    )
    inputs = tensors(rows_of([whole], left=True), model.config)
    counts, read_before = projections(model), len(first.input_ids)
    with torch.no_grad():
        want = model(**inputs)
        positions, _ = model.model.get_rope_index(
            **{key: inputs[key] for key in inputs if key != "pixel_values"}
        )
        kept = model(**tensors(rows_of([first], left=True), model.config))
        later = tensors(rows_of([more], left=True), model.config)
        later |= {"attention_mask": inputs["attention_mask"]} | cache_of(kept)
        later |= {"position_ids": positions[..., read_before:]}
        got = model(**later)
    assert set(counts.values()) == {3}
    assert_close(got.logits.numpy(), want.logits[:, read_before:].numpy(), BAR)


@pytest.mark.parametrize(
    "options", [{"cache_implementation": "static"}, {"prompt_lookup_num_tokens": 3}], ids=str
)
def test_other_ways_to_decode(tiny, options):
    """With a cache of a fixed size; with tokens that are guessed, and cropped where guessed
    wrong."""
    _, model = tiny()
    inputs = tensors(rows_of(EXAMPLES[2:3], left=True), model.config)
    np.testing.assert_array_equal(written(model, inputs, **options), written(model, inputs))


def test_beams_and_repeated_rows(tiny):
    _, model = tiny()
    inputs = tensors(rows_of(EXAMPLES[::2], left=True), model.config)
    with_cache = model.generate(**inputs, **SHORT, num_beams=3)
    without = model.generate(**inputs, **SHORT, num_beams=3, use_cache=False)
    np.testing.assert_array_equal(with_cache.numpy(), without.numpy())
    next_token = {"input_ids": torch.tensor([[1], [2]])}
    with torch.no_grad():
        want = model(**next_token, **cache_of(model(**inputs))).logits.numpy()
        kept = cache_of(model(**inputs))
        for cache in kept.values():
            cache.batch_repeat_interleave(2)
        next_token["input_ids"] = next_token["input_ids"].repeat_interleave(2, 0)
        got = model(**next_token, **kept).logits.numpy()
    assert_close(got, want.repeat(2, 0), BAR)


def test_what_it_does_not_understand_it_refuses(tiny):
    _, model = tiny()
    inputs = tensors(rows_of(EXAMPLES[:1], left=True), model.config)
    length = inputs["input_ids"].shape[1]
    packed = {key: value for key, value in inputs.items() if key != "attention_mask"}
    restarting = (torch.arange(length) % (length - 3))[None]
    with torch.no_grad():
        with pytest.raises(ValueError, match="packed rows"):
            model(**packed, position_ids=restarting)
        own = {"attention_mask": torch.ones(1, 1, length, length).bool()}
        own["position_ids"] = torch.arange(length).expand(3, 1, -1)
        with pytest.raises(ValueError, match="packed rows"):
            model(**inputs | own)
        with pytest.raises(ValueError, match="prefill_chunk_size 8"):
            model.generate(**inputs, **SHORT, prefill_chunk_size=8)
        kept = cache_of(model(**tensors(rows_of(EXAMPLES[:2], left=True), model.config)))
        ones = torch.ones(3, 3, 1, dtype=torch.long)
        with pytest.raises(ValueError, match="images of 2 rows, the input has 3"):
            model(input_ids=ones[0], position_ids=ones, **kept)
        kept = cache_of(model(**inputs))
        for cache in kept.values():
            cache.crop(5 - length)
        with pytest.raises(ValueError, match="was cropped to 5 tokens"):
            model(input_ids=ones[0, :1], **kept)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"pvm_layers": [1, 3]}, r"pvm_layers must be some ascending layers in \[0, 3\)"),
        ({"pvm_hidden_size": 24}, "pvm_hidden_size must be a multiple of head_dim 16, got 24"),
        ({"pvm_visibility": "none"}, "must be 'all' or 'preceding', got 'none'"),
        ({"pvm_gate": "row"}, "must be 'scalar' or 'token', got 'row'"),
        ({"pvm_gates": 2}, "pvm_gates: this branch is not known here"),
    ],
    ids=str,
)
def test_a_branch_that_it_does_not_know(tiny, changed, said):
    from transformers import Qwen3VLConfig

    _, model = tiny()
    settings = CONFIG.to_hf()
    settings["text_config"] |= changed
    with pytest.raises(ValueError, match=said):
        type(model)(Qwen3VLConfig(**settings))


@pytest.mark.parametrize("golden", ["shape_8b"], indirect=True)
def test_without_the_flag_it_says_that_the_branch_is_left_out(exported, caplog, monkeypatch):
    from transformers import Qwen3VLForConditionalGeneration
    from transformers.utils import logging

    monkeypatch.setattr(logging.get_logger("transformers"), "propagate", True)
    model = read(exported, trust_remote_code=False)
    assert type(model) is Qwen3VLForConditionalGeneration
    assert "pvm_block.gate_alpha" in caplog.text
    assert "UNEXPECTED" in caplog.text


def test_what_transformers_saves_is_read_back(golden, exported, tmp_path):
    """As is a fresh branch, which is silent."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    read(exported).save_pretrained(tmp_path / "saved")
    hf_to_orbax.convert(tmp_path / "saved", tmp_path / "orbax")
    assert load(tmp_path / "orbax").config.text == load_config(golden)
    want, got = read_tensors(golden), read_tensors(tmp_path / "saved")
    got.pop("lm_head.weight", None), want.pop("lm_head.weight", None)
    assert got.keys() == want.keys()
    assert all(got[name].tobytes() == want[name].tobytes() for name in want)
    fresh = AutoModelForImageTextToText.from_config(
        AutoConfig.from_pretrained(exported), trust_remote_code=True
    )
    gates = [weight for name, weight in fresh.named_parameters() if name.endswith("gate_alpha")]
    assert [gate.item() for gate in gates] == [0.0] * len(load_config(golden).pvm_layers)


def load_config(directory: Path) -> Any:
    from pvm_jax import ModelConfig

    return ModelConfig.from_hf(directory).text
