"""Against transformers' own Qwen3-VL in PyTorch: random weights, no branch, through the exported
checkpoint."""

import json

import jax
import numpy as np
import pytest

from convert.hf_to_orbax import convert
from pvm_jax import Batch, load
from tests.tiny import CONFIG

torch = pytest.importorskip("torch")


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}


def two_rows() -> dict[str, np.ndarray]:
    """As a processor gives them: two images in more than 500 tokens, and text alone."""
    rng = np.random.default_rng(0)
    grids = np.array([[1, 8, 12], [1, 4, 6]])
    images = [[92, *[90] * (rows * columns // 4), 93] for _, rows, columns in grids]
    first = np.concatenate(
        [
            rng.integers(1, 80, 40),
            images[0],
            rng.integers(1, 80, 440),
            images[1],
            rng.integers(1, 80, 60),
        ]
    )
    second = rng.integers(1, 80, 530)
    length = max(len(first), len(second))
    ids, mask = np.zeros((2, length), np.int64), np.zeros((2, length), np.int64)
    for row, tokens in enumerate((first, second)):
        ids[row, length - len(tokens) :], mask[row, length - len(tokens) :] = tokens, 1
    patches = rng.normal(size=(int(grids.prod(1).sum()), CONFIG.vision.patch_dim)).astype(
        np.float32
    )
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "pixel_values": patches,
        "image_grid_thw": grids,
    }


@pytest.mark.parametrize(
    ("tied", "text"),
    [(True, {}), (False, {"attention_bias": True, "max_position_embeddings": 512} | YARN)],
    ids=["tied", "untied, biases, YaRN"],
)
def test_logits_and_tokens(tmp_path, tied, text):
    """A prompt of more than 500 tokens, two images and a row without any: KL, the five likeliest,
    and greedy tokens."""
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    settings = CONFIG.without_pvm().to_hf() | {"tie_word_embeddings": tied}
    text = dict(text)
    settings["text_config"]["rope_scaling"] |= {key: text.pop(key) for key in YARN if key in text}
    settings["text_config"] |= text
    settings["text_config"]["initializer_range"] = settings["vision_config"][
        "initializer_range"
    ] = 0.2
    torch.manual_seed(0)
    reference = Qwen3VLForConditionalGeneration(Qwen3VLConfig(**settings)).float().eval()
    for name, weight in reference.named_parameters():
        if name.endswith("_proj.bias"):
            torch.nn.init.normal_(weight)
    reference.save_pretrained(tmp_path / "hf")
    saved = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert saved["model_type"] == "qwen3_vl"
    convert(tmp_path / "hf", tmp_path / "orbax")
    model = load(tmp_path / "orbax")

    arrays = two_rows()
    ids, mask = arrays["input_ids"], arrays["attention_mask"]
    with torch.no_grad():
        kinds = torch.from_numpy((ids == CONFIG.image_token_id).astype(np.int64))
        want = reference(
            **{name: torch.from_numpy(array) for name, array in arrays.items()},
            mm_token_type_ids=kinds,
        ).logits
    got = np.asarray(model(Batch.from_hf(arrays, model.config)))[:, : ids.shape[1]]
    valid = mask.astype(bool)
    want, got = want.numpy()[valid], got[valid]
    p, q = jax.nn.log_softmax(want, -1), jax.nn.log_softmax(got, -1)
    assert float((np.exp(p) * (p - q)).sum(-1).max()) < 1e-6
    np.testing.assert_array_equal(np.argsort(want, -1)[:, -5:], np.argsort(got, -1)[:, -5:])
