"""LoRA: what a fresh adapter is, where it goes, and how it is stored."""

import re
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pvm_jax import (
    LoRAConfig,
    ModelConfig,
    Qwen3VL,
    abstract_model,
    add_lora,
    generate,
    load,
    load_lora,
    save,
    save_lora,
)
from pvm_jax.checkpoint.directory import CheckpointError
from pvm_jax.checkpoint.store import save_branch
from pvm_jax.data.batch import Batch
from pvm_jax.measure.report.provenance import provenance
from pvm_jax.model.layers import Linear
from pvm_jax.model.lora import LowRank, is_adapter
from pvm_jax.model.parameters import by_path, part_of
from pvm_jax.sharding import make_mesh, param_shardings
from tests import tiny
from tests.close import assert_close
from train.step.state import split_model

EVERYWHERE = LoRAConfig(rank=3, alpha=6, targets=".*")


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A small model with every part in it, its gate open."""
    config = tiny.cut(ModelConfig.from_hf(tiny.GOLDEN, remat="none"), layers=2)
    rng, path = np.random.default_rng(0), tmp_path_factory.mktemp("base") / "base"
    random = tiny.filled(abstract_model(config), lambda _, shape: rng.normal(0, 0.2, shape))
    save(path, random)
    return path


@pytest.fixture(scope="module")
def model(base) -> Qwen3VL:
    return load(base)


@pytest.fixture(scope="module")
def trained(model) -> Qwen3VL:
    """With updates about as large as the weights they belong to."""
    return with_updates(add_lora(model, EVERYWHERE))


@pytest.fixture(scope="module")
def adapter(trained, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("lora") / "lora"
    save_lora(path, trained)
    return path


def with_updates(model: Qwen3VL) -> Qwen3VL:
    """Every B random in place of 0."""
    graphdef, params = nnx.split(model)

    def fill(path, leaf):
        if not (is_adapter(path) and path[-1] == "b"):
            return leaf
        noise = np.random.default_rng(leaf.size).normal(0, 0.05, leaf.shape)
        return leaf.replace(jax.device_put(noise.astype(leaf.dtype)))

    return nnx.merge(graphdef, nnx.map_state(fill, params))


def changed(leaf: nnx.Param, factor: float, term: float) -> nnx.Param:
    value = factor * np.asarray(leaf[...]) + term
    return leaf.replace(jax.device_put(value.astype(leaf.dtype)))


def dense(model: Qwen3VL) -> Qwen3VL:
    """The model without adapters that computes the same: W + alpha / rank B A."""
    params = jax.device_get(by_path(nnx.state(model)))
    plain, scale = abstract_model(replace(model.config, lora=None)), model.config.lora.scale
    graphdef, state = nnx.split(plain)

    def weight(path, _):
        name = "/".join(map(str, path))
        a, b = (params.get(f"{name.removesuffix('/weight')}/lora/{part}") for part in "ab")
        return (
            params[name]
            if a is None
            else jax.device_put(params[name] + scale * np.einsum("...or,...ri->...oi", b, a))
        )

    return nnx.merge(graphdef, nnx.map_state(weight, state))


def has(name: str):
    """An NNX filter: parameters of that name."""
    return lambda path, _: name in path


def parameters(model: Qwen3VL) -> dict[str, jax.Array]:
    return by_path(nnx.state(model))


def batch(config: ModelConfig) -> Batch:
    """Two rows: an image and text; text alone."""
    rng = np.random.default_rng(0)
    image = [config.vision_start_token_id, *[config.image_token_id] * 4, config.vision_end_token_id]
    ids = np.stack([np.concatenate([image, rng.integers(0, 400, 10)]), rng.integers(0, 400, 16)])
    arrays = {
        "input_ids": ids,
        "attention_mask": np.ones_like(ids),
        "pixel_values": rng.normal(size=(16, config.vision.patch_dim)).astype(np.float32),
        "image_grid_thw": np.array([[1, 4, 4]]),
    }
    return Batch.from_hf(arrays, config)


class TestAdapters:
    def test_fresh_ones_change_nothing(self, model):
        """Not a bit of any logit, whatever they are beside."""
        inputs = batch(model.config)
        np.testing.assert_array_equal(add_lora(model, EVERYWHERE)(inputs), model(inputs))

    def test_without_lora_the_tree_is_as_it_was(self, model):
        backbone, adapted = parameters(model), parameters(add_lora(model, EVERYWHERE))
        assert not any(part_of(path) == "lora" for path in backbone)
        assert {path for path in adapted if part_of(path) != "lora"} == backbone.keys()

    def test_compute_what_dense_weights_would(self, trained):
        """Stacks that are scanned, the mergers that are mapped over, single Linears; read and
        written."""
        inputs = batch(trained.config)
        expected = dense(trained)
        assert_close(trained(inputs), expected(inputs), 1e-5)
        written = [
            generate(model, inputs, max_new_tokens=6, temperature=0.0).tokens
            for model in (trained, expected)
        ]
        np.testing.assert_array_equal(*written)

    def test_are_beside_what_the_pattern_names(self, model):
        paths = parameters(
            add_lora(
                model,
                LoRAConfig(targets=r"language_model/layers/self_attn/[qv]_proj|visual/merger/.*"),
            )
        )
        linears = {path.removesuffix("/lora/a") for path in paths if path.endswith("/lora/a")}
        attention = {f"language_model/layers/self_attn/{name}_proj" for name in "qv"}
        assert linears == attention | {"visual/merger/linear_fc1", "visual/merger/linear_fc2"}

    def test_default_is_all_seven_projections_of_the_decoder(self, model):
        paths = parameters(add_lora(model, LoRAConfig()))
        layers, width = model.config.text.num_hidden_layers, model.config.text.hidden_size
        adapters = [path for path in paths if path.endswith("/lora/a")]
        assert len(adapters) == 7
        assert all(path.startswith("language_model/layers/") for path in adapters)
        assert paths["language_model/layers/self_attn/q_proj/lora/a"].shape == (layers, 16, width)
        assert paths["language_model/layers/self_attn/k_proj/lora/b"].shape[1:] == (
            model.config.text.num_key_value_heads * model.config.text.head_dim,
            16,
        )

    def test_lie_on_the_mesh_as_their_weights_do(self, base):
        mesh = make_mesh(2, 2, 2)
        adapted = add_lora(load(base, mesh=mesh), EVERYWHERE, mesh=mesh)
        expected = by_path(param_shardings(nnx.state(adapted), mesh))
        for path, leaf in parameters(adapted).items():
            assert leaf.sharding.is_equivalent_to(expected[path], leaf.ndim), path
        b = parameters(adapted)["language_model/layers/mlp/up_proj/lora/b"]
        assert b.sharding.spec[1] == "tensor"

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            (
                {"targets": "layers/self_attn"},
                "matches no Linear of the backbone; there are language_model/layers/mlp/",
            ),
            ({"targets": "pvm/.*|lm_head"}, "matches no Linear"),
            ({"targets": "("}, r"lora.targets '\(' is no regular expression"),
            ({"rank": 0}, "rank must be at least 1, got 0"),
            ({"alpha": 0.0}, "alpha must be a finite number above 0"),
        ],
    )
    def test_refusals(self, model, values, message):
        with pytest.raises(ValueError, match=message):
            add_lora(model, LoRAConfig(**values))


class TestJoined:
    """On a TPU W and B are multiplied with at once, where neither is split over tensor."""

    @pytest.fixture
    def joins(self, monkeypatch) -> list[LowRank]:
        """Those that were, from now on."""
        found, joined = [], LowRank.joined
        monkeypatch.setattr("pvm_jax.model.lora.platform", lambda: "tpu")
        monkeypatch.setattr("pvm_jax.model.lora.WIDE", 1)
        monkeypatch.setattr(LowRank, "joined", lambda *a: found.append(a[0]) or joined(*a))
        return found

    def test_changes_nothing_that_a_model_computes(self, trained, request):
        """In a scan, mapped over, of the adapters' gradients."""
        graphdef, chosen, rest = split_model(trained, "lora")
        inputs, mesh = batch(trained.config), make_mesh(2, 4, 1)
        placed = [
            jax.device_put(nnx.as_pure(params), param_shardings(params, mesh))
            for params in (chosen, rest)
        ]

        def run():
            def values(chosen, rest):
                hidden = nnx.merge(graphdef, chosen, rest).hidden(inputs)
                return jnp.sin(hidden[inputs.segment_ids > 0]).sum(), hidden

            with jax.set_mesh(mesh):
                return jax.jit(jax.grad(values, has_aux=True))(*placed)

        apart = run()
        joins = request.getfixturevalue("joins")
        assert_close(run(), apart, 1e-5)
        assert len(joins) > 3

    @pytest.mark.parametrize("named", ["weight", ""])
    @pytest.mark.parametrize("sizes", [(2, 4, 1), (2, 2, 2)])
    def test_changes_no_gradient(self, named, sizes, request):
        """Of what is read, and of W where that is trained."""
        rngs, mesh = nnx.Rngs(0), make_mesh(*sizes)
        linear = Linear(16, 24, ("mlp", "embed"), bias=True, dtype="float32", rngs=rngs)
        linear.lora = nnx.data(LowRank(linear, LoRAConfig(rank=3, alpha=5), rngs=rngs))
        linear.lora.b[...] = jax.random.normal(jax.random.key(0), (24, 3))
        graphdef, chosen, rest = nnx.split(linear, nnx.Any(is_adapter, has(named)), ...)
        x = jax.random.normal(jax.random.key(1), (8, 5, 16))

        def run():
            def values(x, chosen):
                y = nnx.merge(graphdef, chosen, nnx.as_pure(rest))(x)
                return jnp.sin(y).sum(), y

            with jax.set_mesh(mesh):
                grad = jax.jit(jax.grad(values, argnums=(0, 1), has_aux=True))
                return grad(np.asarray(x), jax.device_get(nnx.as_pure(chosen)))

        apart = run()
        joins = request.getfixturevalue("joins")
        assert_close(run(), apart, 1e-5)
        assert bool(joins) == (sizes[2] == 1)


class TestStored:
    def test_round_trip(self, base, adapter, trained):
        loaded = load(base, lora=adapter, mesh=make_mesh(2, 2, 2))
        assert loaded.config.lora == EVERYWHERE
        expected = parameters(trained)
        assert parameters(loaded).keys() == expected.keys()
        for path, leaf in parameters(loaded).items():
            np.testing.assert_array_equal(leaf, expected[path], err_msg=path)

    def test_holds_the_adapter_alone(self, base, adapter, trained, model, tmp_path):
        values = sum(
            leaf.nbytes for path, leaf in parameters(trained).items() if part_of(path) == "lora"
        )
        assert (
            sum(file.stat().st_size for file in adapter.rglob("*") if file.is_file()) < 2 * values
        )
        with pytest.raises(
            CheckpointError, match=r"a LoRA adapter alone: load its backbone, with lora="
        ):
            load(adapter)
        with pytest.raises(CheckpointError, match="no PVM branch"):
            load(base, branch=adapter)
        with pytest.raises(CheckpointError, match="is no LoRA adapter"):
            load(base, lora=base)
        with pytest.raises(ValueError, match=r"save_lora; python -m convert\.orbax_to_hf --lora"):
            save(tmp_path / "whole", trained)
        with pytest.raises(ValueError, match="no LoRA adapter to save"):
            save_lora(tmp_path / "none", model)

    def test_a_report_names_it(self, base, adapter, trained, model):
        fresh = dict(provenance({"x": add_lora(model, EVERYWHERE), "none": model}, []))
        stored = dict(provenance({"x": load(base, lora=adapter)}, []))
        assert stored["x"] == dict(provenance({"x": trained}, []))["x"]
        assert re.fullmatch(r".*, LoRA [0-9a-f]{16}", stored["x"])
        assert stored["x"] != fresh["x"]
        assert "LoRA" not in fresh["none"]

    def test_another_backbone_is_refused(self, adapter, model):
        graphdef, params = nnx.split(model)
        other = nnx.map_state(
            lambda path, leaf: changed(leaf, 1, 0.5) if path[-2] == "pos_embed" else leaf, params
        )
        with pytest.raises(CheckpointError, match="was trained on the backbone"):
            load_lora(adapter, nnx.merge(graphdef, other))

    def test_another_branch_is_refused_unless_it_was_silent(self, base, adapter, model, tmp_path):
        graphdef, params = nnx.split(model)
        other = nnx.map_state(
            lambda path, leaf: changed(leaf, 1, 1) if path[0] == "pvm" else leaf, params
        )
        save_branch(tmp_path / "other", nnx.merge(graphdef, other))
        with pytest.raises(CheckpointError, match="was trained on the branch"):
            load(base, branch=tmp_path / "other", lora=adapter)
        silent = nnx.map_state(
            lambda path, leaf: changed(leaf, 0, 0) if path[-1] == "gate_alpha" else leaf, params
        )
        save_lora(tmp_path / "lora", add_lora(nnx.merge(graphdef, silent), EVERYWHERE))
        assert (
            load(base, branch=tmp_path / "other", lora=tmp_path / "lora").config.lora == EVERYWHERE
        )
