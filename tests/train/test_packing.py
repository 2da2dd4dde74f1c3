"""Plans of rows, and that packing, accumulation and padding change no loss and no gradient, on real
images of many sizes."""

from dataclasses import replace
from functools import partial

import jax
import numpy as np
import pytest
from flax import nnx

from demo.checkpoint import write_assets
from demo.mixed_images import BUCKETS, make_processor, write_mix
from pvm_jax.data.conversations import open_conversations
from pvm_jax.data.processor import Processor
from tests import tiny
from tests.close import assert_close
from train.config import Bucket, DataConfig
from train.data.loading import load_training_data
from train.data.packing import make_plan, pack, padding, padding_of_single_examples
from train.data.sizes import measure
from train.step.state import loss_and_gradient, make_loss, split_model


@pytest.fixture(scope="module")
def mix(tmp_path_factory):
    """400 conversations about real and synthetic images, and their sizes."""
    folder = tmp_path_factory.mktemp("mix")
    file = write_mix(folder / "data", 400)
    processor, _ = make_processor(folder / "model")
    return file, measure(open_conversations(file), processor.count, threads=2, videos=False)


def plan_of(sizes, buckets=BUCKETS, *, epochs=1, batch_size=4, packing=True, seed=0, **options):
    rng = np.random.default_rng(seed)
    readings = [rng.permutation(len(sizes)).astype(np.int32) for _ in range(epochs)]
    return make_plan(
        sizes, readings, buckets, batch_size=batch_size, packing=packing, seed=seed, **options
    )


@pytest.mark.parametrize("buckets", [BUCKETS, BUCKETS[-1:]], ids=["five buckets", "one bucket"])
def test_under_a_tenth_of_packed_rows_is_padding(mix, buckets):
    sizes = mix[1]
    packed, single = (
        padding(plan_of(sizes, buckets), sizes, buckets),
        padding_of_single_examples(sizes, buckets),
    )
    assert max(packed) < 0.1
    assert min(single) > 0.45


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("batch_size", [1, 4, 7])
def test_a_plan_reads_every_example_once_an_epoch_and_overfills_no_row(mix, packing, batch_size):
    sizes = mix[1]
    plan = plan_of(sizes, epochs=2, packing=packing, batch_size=batch_size)
    rows = [plan.rows(step) for step in range(len(plan))]
    assert {len(batch) for batch in rows} == {batch_size}
    for step, batch in enumerate(rows):
        bucket = BUCKETS[plan.bucket(step)]
        for row in batch:
            assert row
            assert (sizes[row].sum(0) <= (bucket.tokens, bucket.patches)).all()
            assert packing or len(row) == 1
    readings = np.bincount(
        [example for batch in rows for row in batch for example in row], minlength=len(sizes)
    )
    held = (sizes <= (BUCKETS[-1].tokens, BUCKETS[-1].patches)).all(1)
    assert held.sum() < len(sizes)
    assert readings.max() <= 2
    assert (readings[~held] == 0).all()
    assert (2 - readings[held]).sum() == plan.left_over < 2 * batch_size * (20 if packing else 1)


def test_a_plan_is_the_same_for_the_same_seed(mix):
    def rows(**options):
        plan = plan_of(mix[1], **options)
        return [plan.rows(step) for step in range(len(plan))]

    assert rows() == rows()
    assert rows() != rows(seed=1)
    assert rows(max_steps=3) == rows()[:3]


def test_large_rows_are_filled_up_with_small_examples():
    sizes = np.array([(60, 0)] * 8 + [(5, 0)] * 64)
    plan = plan_of(sizes, [Bucket(10, 4), Bucket(100, 4)])
    assert [plan.bucket(step) for step in range(len(plan))] == [1, 1]
    assert all(
        sum(example < 8 for example in row) == 1 for step in (0, 1) for row in plan.rows(step)
    )
    assert plan.left_over == 0


def test_rows_take_what_leaves_least_of_tokens_and_patches():
    sizes = np.array([(50, 40), (50, 0), (50, 60), (50, 90), (50, 10)])
    assert pack(sizes, Bucket(100, 100), begin=5) == [[0, 2], [1, 3], [4]]
    assert pack(sizes, Bucket(100, 100), begin=2) == [[0, 2], [1, 3]]
    assert pack(sizes, Bucket(100, 100), begin=5, limit=1) == [[0, 2]]


TOKENS, PATCHES = 448, 256


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The smallest model that reads the demo's tokens, its gate open, a processor, and ten short
    conversations of the mix."""
    folder = tmp_path_factory.mktemp("exact")
    config = tiny.cut(write_assets(folder / "model").with_pvm((0,), 64))
    model = tiny.make_model(replace(config, remat="none"), gate=1)
    processor, file = (
        Processor.from_pretrained(folder / "model"),
        write_mix(folder / "data", 24, seed=3),
    )
    sizes = measure(open_conversations(file), processor.count, threads=1, videos=False)
    short = np.flatnonzero((sizes <= (TOKENS, PATCHES)).all(1))[:10]
    lines = file.read_text().splitlines()
    file.write_text("\n".join(lines[place] for place in short))
    return model, processor, file


def batch_of(world, bucket, *, packing, batch_size):
    """The ten conversations in one batch; rows that none is left for are all padding."""
    model, processor, file = world
    data = DataConfig(str(file), [bucket], packing=packing, too_long="error")
    data = load_training_data(data, processor, model.config, batch_size=batch_size, fill_last=True)
    assert len(data.batches) == 1
    assert sum(map(len, data.examples(0))) == 10
    return data.batches[0]


@pytest.fixture(scope="module")
def packed(world):
    return batch_of(world, Bucket(2 * TOKENS, 2 * PATCHES), packing=True, batch_size=4)


@pytest.fixture(scope="module")
def loss_and_branch_gradient(world):
    graphdef, trained, frozen = split_model(world[0], "pvm")
    step = jax.jit(
        partial(loss_and_gradient, make_loss(graphdef, chunk=128)), static_argnames="accumulation"
    )

    def run(batch, accumulation=4):
        mean, gradients = step(
            nnx.as_pure(trained), nnx.as_pure(frozen), batch, accumulation=accumulation
        )
        return float(mean), jax.tree.map(np.asarray, gradients)

    return run


def test_packed_rows_have_the_loss_and_gradients_of_single_examples(
    world, packed, loss_and_branch_gradient
):
    single = batch_of(world, Bucket(TOKENS, PATCHES), packing=False, batch_size=10)
    assert packed.segment_ids.max() > 2
    assert not packed.segment_ids.any(1).all()  # a row is all padding
    assert (
        len({(frames > 0).sum() for frames in single.patch_segment_ids}) > 5
    )  # images of many sizes
    assert len(set(single.loss_weights.sum(1))) > 5
    assert_close(loss_and_branch_gradient(packed), loss_and_branch_gradient(single, 1), 2e-5)


def test_the_comparison_would_notice_an_example_that_sees_its_neighbour(
    packed, loss_and_branch_gradient
):
    merged = replace(packed, segment_ids=np.minimum(packed.segment_ids, 1))
    assert loss_and_branch_gradient(merged)[0] != pytest.approx(
        loss_and_branch_gradient(packed)[0], rel=1e-3
    )
