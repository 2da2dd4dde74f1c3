"""What a GRPO run is put together from: its config, prompts with solutions, and rows of completions
by length."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from pvm_jax.config import ModelConfig
from pvm_jax.data.conversations import open_conversations
from pvm_jax.data.example import Example
from pvm_jax.options import parse
from pvm_jax.presets import PRESETS
from pvm_jax.sharding import make_mesh
from tests.train.reward_functions import letters
from train.config import Bucket, ExamplesConfig, MeshConfig
from train.fit.__main__ import FitConfig, FitGRPOConfig, recipe
from train.grpo.config import GRPOConfig
from train.grpo.grading import reward_values
from train.grpo.held_out import joined
from train.grpo.loop import describe
from train.grpo.prompts import Prompt, PromptBatch, read_prompt
from train.grpo.rollout import Completions, rollout_mesh
from train.grpo.update import parts_of, rows_of, weigh
from train.rewards.pool import RewardConfig, RewardTable

ROOT = Path(__file__).parents[2]
DATA = ExamplesConfig("data.jsonl", [Bucket(16, 16)])


def config(**options) -> GRPOConfig:
    return GRPOConfig(
        "base",
        "run",
        DATA,
        **{"prompts_per_step": 2, "group_size": 2, "max_completion_tokens": 16} | options,
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"group_size": 1}, "group_size must be at least 2"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\]"),
        ({"num_iterations": 0}, "num_iterations must be at least 1"),
        ({"clip_low": 1.5}, r"clip_low in \[0, 1\]"),
        ({"beta": -1.0}, "beta >= 0"),
        ({"rewards": []}, "rewards: needs at least one"),
        (
            {"rewards": [RewardConfig("format"), RewardConfig("format")]},
            "each of them once, got format, format",
        ),
        ({"rollout_parts": 3}, "prompts_per_step 2 must be a multiple of rollout_parts 3"),
        (
            {"accumulation": 3},
            "prompts_per_step x group_size = 4 must be a multiple of accumulation 3",
        ),
        ({"max_steps": 0}, "max_steps must be at least 1"),
    ],
)
def test_what_is_wrong_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        config(**options)


@pytest.mark.parametrize("size", PRESETS)
def test_shipped_recipes_are_the_published_one(size):
    """Those of 2B and 32B, which the paper does not have, by the same settings."""
    read, _ = parse(
        GRPOConfig,
        [f"--config={ROOT}/configs/grpo_qwen3_vl_{size}.yaml"],
        prog="",
        description="",
        examples="",
    )
    assert (read.trainable, read.prompts_per_step * read.group_size, read.group_size) == (
        "decoder",
        64,
        8,
    )
    assert (read.max_completion_tokens, read.mask_truncated, read.temperature, read.top_p) == (
        16384,
        True,
        1.0,
        1.0,
    )
    assert (read.beta, read.clip_low, read.clip_high, read.num_iterations) == (0, 0.2, 0.2, 1)
    assert (read.loss, read.scale_rewards, read.epochs, read.dtype) == (
        "dapo",
        "group",
        1,
        "bfloat16",
    )
    assert [(reward.function, reward.weight) for reward in read.rewards] == [
        ("format", 0.1),
        ("accuracy", 0.9),
    ]
    optimizer = read.optimizer
    assert (optimizer.learning_rate, optimizer.schedule, optimizer.warmup) == (1e-6, "constant", 0)


def test_fit_tells_the_recipes_apart_by_their_keys():
    assert (
        recipe(["--config", f"{ROOT}/configs/grpo_qwen3_vl_8b.yaml", "--topology", "v5p:2x2x2"])
        is FitGRPOConfig
    )
    assert (
        recipe([f"--config={ROOT}/configs/sft_qwen3_vl_8b.yaml", "--group_size=4"]) is FitGRPOConfig
    )
    assert (
        recipe(["--config", f"{ROOT}/configs/sft_qwen3_vl_8b.yaml", "--data.packing", "true"])
        is FitConfig
    )


@pytest.fixture
def graded(golden_config):
    """Two prompts, one with an image, with two completions each, of lengths 3, 16, 1 and 5; the
    second did not stop."""
    rng, model_config = np.random.default_rng(0), golden_config
    image = [
        model_config.vision_start_token_id,
        model_config.image_token_id,
        model_config.vision_end_token_id,
    ]
    pixels, grid = (
        rng.normal(size=(4, model_config.vision.patch_dim)).astype(np.float32),
        np.array([[1, 2, 2]]),
    )
    examples = [Example(np.array([*image, 5, 6]), pixels, grid), Example(np.array([7, 8, 9]))]
    prompts = [Prompt([], example, {"solution": "navy"}) for example in examples]
    lengths = np.array([3, 16, 1, 5])
    mask = np.arange(16) < lengths[:, None]
    tokens = np.where(mask, rng.integers(10, 99, mask.shape), 0)
    completions = Completions(
        tokens, np.where(mask, -rng.random(mask.shape), 0), lengths, np.array([0, 1, 0, 0], bool)
    )
    batch = PromptBatch(Bucket(16, 16), prompts)
    return weigh(config(accumulation=2), batch, completions, np.array([1.0, 0.0, 0.25, 0.25]))


@pytest.fixture(scope="module")
def golden_config() -> ModelConfig:
    return ModelConfig.from_hf(ROOT / "tests" / "golden" / "shape_8b")


def test_short_completions_do_not_pay_for_long_ones(graded):
    assert config().completion_lengths == [2, 4, 8, 16]
    short, long = parts_of(config(accumulation=2), graded)
    assert (short.completions.tolist(), short.shape) == ([2, 0], Bucket(16 + 4, 16))
    assert (long.completions.tolist(), long.shape) == ([3, 1], Bucket(16 + 16, 16))


def test_rows_hold_each_completion_behind_its_prompt(graded, golden_config):
    rows = rows_of(graded, np.array([0, 3]), Bucket(24, 16), golden_config, videos=False)
    for row, (number, start) in enumerate([(0, 5), (3, 3)]):
        length = graded.completions.lengths[number]
        columns = slice(start, start + length)
        np.testing.assert_array_equal(
            rows.batch.tokens[row, columns], graded.completions.tokens[number, :length]
        )
        np.testing.assert_allclose(
            rows.old_logprobs[row, columns], graded.completions.logprobs[number, :length]
        )
        assert (rows.advantages[row, columns] == graded.advantages[number]).all()
        assert (rows.batch.loss_weights[row] > 0).sum() == length
        assert (rows.batch.segment_ids[row] > 0).sum() == start + length
    assert (rows.batch.visual_index[0] >= 0).sum() == 1
    assert (rows.batch.visual_index[1] < 0).all()


def test_a_group_without_spread_and_a_truncated_completion_teach_nothing(graded):
    assert graded.advantages[0] > 0 > graded.advantages[1]
    assert (graded.advantages[2:] == 0).all()
    assert (graded.weights[1] == 0).all()
    assert graded.weights.sum() == pytest.approx((25 - 16) / 25)


def test_the_log_tells_what_was_drawn_and_what_it_is_worth(graded):
    rewards = np.array([1, 0, 0.25, 0.25])
    told = {
        "completion/length": 6.25,
        "completion/longest": 16,
        "completion/truncated": 0.25,
        "reward/zero_spread": 0.5,
    }
    assert describe(graded, rewards, 2) == told
    assert describe(graded, np.full(4, 0.1), 2)["reward/zero_spread"] == 1
    table = RewardTable(
        ("format", "accuracy"),
        np.array([[1, 0], [1, 1.0]]),
        np.array([0.1, 1.0]),
        {"format": 0, "accuracy": 1},
        {},
    )
    sums, parts = (
        {"reward/mean": 0.55, "reward/std": 0.45},
        {"reward/format": 1, "reward/accuracy": 0.5},
    )
    failures = {"reward/format/failures": 0, "reward/accuracy/failures": 1}
    assert reward_values("reward", table) == pytest.approx(sums | parts | failures)


def record(folder, **columns):
    content = [{"type": "image", "image": "0.png"}, {"type": "text", "text": "?"}]
    messages = [{"role": "user", "content": content}, *columns.pop("more", [])]
    Image.new("RGB", (32, 32)).save(folder / "0.png")
    (folder / "data.jsonl").write_text(json.dumps({"messages": messages, **columns}) + "\n")
    return open_conversations(folder / "data.jsonl", every_column=True)


class FakeProcessor:
    def encode(self, messages, *, add_generation_prompt):
        assert add_generation_prompt
        return [message["role"] for message in messages]


ANSWER = {"role": "assistant", "content": "navy"}


def test_the_solution_is_a_column_or_the_last_answer(tmp_path):
    prompt = read_prompt(record(tmp_path, solution="7", subject="counting"), 0, FakeProcessor())
    assert (prompt.columns, prompt.example) == ({"solution": "7", "subject": "counting"}, ["user"])
    prompt = read_prompt(record(tmp_path, more=[ANSWER]), 0, FakeProcessor())
    assert (prompt.columns, prompt.example) == ({"solution": "navy"}, ["user"])
    prompt = read_prompt(record(tmp_path, more=[ANSWER], solution="blue"), 0, FakeProcessor())
    assert (prompt.columns, prompt.example) == ({"solution": "blue"}, ["user"])
    for nothing in ({"tool_calls": []}, {"content": ""}, {"content": " "}):
        answer = {"role": "assistant"} | nothing
        with pytest.raises(ValueError, match=r"data.jsonl:1: the assistant turn .* has no text"):
            read_prompt(record(tmp_path, more=[answer]), 0, FakeProcessor())
    with pytest.raises(ValueError, match=r"data.jsonl:1: there is no solution"):
        read_prompt(record(tmp_path), 0, FakeProcessor())
    for solution in ("", " ", [], {"a": 1}, float("nan")):
        with pytest.raises(
            ValueError, match=r"data.jsonl:1: the solution must be a text or a number"
        ):
            read_prompt(record(tmp_path, solution=solution), 0, FakeProcessor())
    with pytest.raises(ValueError, match=r"data.jsonl:1: the conversation has no turn to answer"):
        read_prompt(record(tmp_path, more=[ANSWER, ANSWER], solution="7"), 0, FakeProcessor())


def test_columns_of_tables_are_read_where_they_are_asked_for(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = [
        {"messages": [{"role": "user", "content": "?"}], "solution": str(number)}
        for number in range(3)
    ]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "data.parquet")
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    for path in (tmp_path / "data.parquet", tmp_path / "saved"):
        assert open_conversations(path, every_column=True).columns(2) == {"solution": "2"}
        assert open_conversations(path).columns(2) == {}


def test_the_rollouts_mesh_has_the_same_devices_in_the_same_order():
    mesh = make_mesh(1, 8, 1)
    place = rollout_mesh(MeshConfig(data=-1, fsdp=1, tensor=2), mesh)
    assert dict(place.shape) == {"data": 4, "fsdp": 1, "tensor": 2}
    assert place.devices.ravel().tolist() == mesh.devices.ravel().tolist() == jax.devices()
    assert rollout_mesh(None, mesh) is mesh
    with pytest.raises(ValueError, match="does not cover the 8 devices"):
        rollout_mesh(MeshConfig(data=3, fsdp=1), mesh)
    with pytest.raises(ValueError, match="does not cover the 8 devices"):
        rollout_mesh(MeshConfig(data=-1, fsdp=0), mesh)
    with pytest.raises(
        ValueError, match="mesh data=-1 fsdp=0 tensor=1 does not cover the 8 devices"
    ):
        make_mesh(-1, 0)


def test_tables_of_several_batches_are_one():
    tables = [
        RewardTable(
            ("a",), np.array([[1.0], [0.0]]), np.array([2.0, 0.0]), {"a": 1}, {"a": "first"}
        ),
        RewardTable(("a",), np.array([[3.0]]), np.array([6.0]), {"a": 2}, {"a": "second"}),
    ]
    table = joined(tables)
    assert (table.totals.tolist(), table.values.ravel().tolist()) == ([2, 0, 6], [1, 0, 3])
    assert (table.failures, table.errors) == ({"a": 3}, {"a": "first"})


def test_letters_of_the_solution_are_counted():
    assert letters("navy!", {"solution": "ground navy"}) == pytest.approx(4 / 5)
