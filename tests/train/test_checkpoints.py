"""The steps of a run on disk: restored on any mesh, whole and of this very run, or not at all."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from pvm_jax import ModelConfig, Qwen3VL, load
from pvm_jax.checkpoint.directory import CheckpointError
from pvm_jax.sharding import make_mesh, param_shardings
from train.run.checkpoints import TrainCheckpoints

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(scope="module")
def model(golden_checkpoints) -> Qwen3VL:
    return load(golden_checkpoints["shape_8b"])


class TestTrainCheckpoints:
    """A run of the branch with AdamW ."""

    transformation = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(optax.cosine_decay_schedule(1e-3, 10))
    )

    def state(self, model, mesh):
        trained = nnx.State({"pvm": {"1": nnx.state(model)["pvm"]["1"]}})
        params = jax.device_get(nnx.as_pure(trained))
        params = jax.device_put(params, param_shardings(trained, mesh))
        begin = jax.jit(lambda x: jax.tree.map(lambda x: x + 1, self.transformation.init(x)))
        return {"params": params, "optimizer": begin(params)}

    def two_devices(self):
        """Orbax cuts what devices hold alike into a part for each, by a program for each cut."""
        return make_mesh(1, 2, 1, devices=jax.devices()[:2])

    def abstract(self, state):
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
        )

    def steps(self, path, model, backbone="abc", **options):
        return TrainCheckpoints(path, model.config, backbone, **options)

    def test_restores_on_another_mesh(self, model, tmp_path):
        state = self.state(model, self.two_devices())
        with self.steps(tmp_path, model) as steps:
            steps.save(1, state)
        target = self.abstract(self.state(model, make_mesh(2, 2, 2)))
        with self.steps(tmp_path, model) as steps:
            restored = steps.restore(target)
        assert jax.tree.structure(restored) == jax.tree.structure(state)
        for saved, loaded, wanted in zip(
            *map(jax.tree.leaves, (state, restored, target)), strict=True
        ):
            np.testing.assert_array_equal(*jax.device_get((saved, loaded)))
            assert loaded.sharding == wanted.sharding

    def test_retention(self, model, tmp_path):
        state = self.state(model, self.two_devices())
        with self.steps(tmp_path, model, keep=1, best="accuracy", maximize=True) as steps:
            for step, accuracy in enumerate((0.1, 0.9, 0.3, 0.2)):
                steps.save(step, state, {"accuracy": accuracy})
            with pytest.raises(ValueError, match="accuracy"):
                steps.save(9, state, {"loss": 1.0})
        with self.steps(tmp_path, model, keep=1) as steps:
            assert (steps.steps, steps.latest) == ([1, 3], 3)

    def test_a_flipped_bit_is_noticed(self, model, tmp_path):
        """In whatever file, it is told or changes nothing."""
        state = self.state(model, self.two_devices())
        with self.steps(tmp_path, model) as steps:
            steps.save(1, state)
        files = [file for file in tmp_path.rglob("*") if file.is_file()]
        values = max(files, key=lambda file: file.stat().st_size)
        rng, told = np.random.default_rng(0), []
        for file in [*files, *[values] * 8]:
            content = file.read_bytes()
            damaged = bytearray(content)
            # The middle, since the end of the values' file holds what nothing reads.
            damaged[rng.integers(len(content) // 4, len(content) * 3 // 4)] ^= 1 << rng.integers(8)
            file.write_bytes(damaged)
            try:
                with self.steps(tmp_path, model) as steps:
                    restored = steps.restore(self.abstract(state))
            except CheckpointError as error:
                told.append("it was saved as " in str(error))
            else:
                jax.tree.map(np.testing.assert_array_equal, restored, state)
            file.write_bytes(content)
        assert len(told) > 8
        assert sum(told) > 6

    def test_any_values_are_what_was_saved(self, model, tmp_path):
        """Also those that equal others or nothing."""
        nothing = np.full((64, 64), np.nan, np.float32)
        nothing.view(np.uint32)[0] = 0x7FC12345
        state = {
            "zeros": np.full((64, 64), -0.0, np.float32),
            "nothing": nothing,
            "short": np.ones(3, jnp.bfloat16),
            "yes": np.array([True, False]),
            "step": np.int32(-1),
        }
        arrays = jax.tree.map(jnp.asarray, state)
        with self.steps(tmp_path, model) as steps:
            steps.save(1, arrays)
        with self.steps(tmp_path, model) as steps:
            restored = steps.restore(self.abstract(arrays))
        assert {k: np.asarray(v).tobytes() for k, v in restored.items()} == {
            k: v.tobytes() for k, v in state.items()
        }

    def test_interrupted_save_does_not_exist(self, model, tmp_path):
        state = self.state(model, self.two_devices())
        with self.steps(tmp_path, model) as steps:
            steps.save(1, state)
            steps.save(2, state)
        (tmp_path / "2").rename(tmp_path / "2.orbax-checkpoint-tmp")
        with self.steps(tmp_path, model) as steps:
            assert steps.steps == [1]
            steps.restore(self.abstract(state))
            with pytest.raises(FileNotFoundError, match=r"no step 2; there are \[1\]"):
                steps.restore(self.abstract(state), step=2)
            steps.save(2, state)

    def test_other_runs_steps(self, model, tmp_path):
        state = self.state(model, self.two_devices())
        with self.steps(tmp_path, model) as steps:
            steps.save(1, state)
        with (
            self.steps(tmp_path, model, "def") as steps,
            pytest.raises(CheckpointError, match="another backbone: abc"),
        ):
            steps.restore(self.abstract(state))
        other = ModelConfig.from_hf(GOLDEN / "shape_4b")
        with (
            TrainCheckpoints(tmp_path, other, "abc") as steps,
            pytest.raises(CheckpointError, match="another model"),
        ):
            steps.restore(self.abstract(state))

    def test_nothing_saved(self, model, tmp_path):
        with self.steps(tmp_path, model) as steps:
            assert steps.latest is None
            with pytest.raises(FileNotFoundError, match="no step None"):
                steps.restore({})
