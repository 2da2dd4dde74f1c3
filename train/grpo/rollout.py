"""Completions from the weights as they stand: a group of each prompt, generated on the mesh, its
images encoded once."""

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial, reduce
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from pvm_jax.config import ModelConfig
from pvm_jax.data.batch import Batch
from pvm_jax.generation import generate
from pvm_jax.model.qwen3_vl import Qwen3VL, abstract_model
from pvm_jax.sharding import (
    MESH_AXES,
    batch_sharding,
    local_rows,
    mesh_sizes,
    param_shardings,
    place_rows,
)
from train.config import Bucket, MeshConfig
from train.grpo.config import GRPOConfig
from train.grpo.prompts import Prompt, PromptBatch
from train.step.program import Program, abstract_batch, placed, rows_per_shard
from train.step.state import TrainState, cast


class Completions(NamedTuple):
    """N = P x G completions, on every host alike; row p * G + n is completion n of prompt p.

    Attributes:
        tokens: [completions, tokens] int32, 0 after a row's end.
        logprobs: [completions, tokens] float32 of each token when it was drawn, at the sampling's
            temperature.
        lengths: [completions] int32: tokens of each row, its stop token included.
        truncated: [completions] bool: the row was not ended by a stop token.
    """

    tokens: np.ndarray
    logprobs: np.ndarray
    lengths: np.ndarray
    truncated: np.ndarray

    @property
    def mask(self) -> np.ndarray:
        """[completions, tokens] bool, true at the tokens that were generated."""
        return np.arange(self.tokens.shape[1]) < self.lengths[:, None]


class Sampler:
    """Generates on the devices that train, with the trained weights in the compute dtype, as the
    rollout's mesh splits them."""

    def __init__(self, config: GRPOConfig, program: Program, mesh: Mesh):
        """Raises ValueError if a part's prompts do not divide over the rollout's mesh, or it does
        not cover the devices."""
        self.config, self.program = config, program
        self.mesh = rollout_mesh(config.rollout_mesh, mesh)
        self.model_config: ModelConfig = program.model_config
        self.sharding = batch_sharding(self.mesh)
        self._at_once = config.prompts_per_step // config.rollout_parts
        check_prompts(config, self.mesh)
        self._stop_tokens = self.model_config.stop_tokens
        shardings = jax.tree.map(lambda x: x.sharding, self.abstract_weights)
        graphdef = program.graphdef

        def move(trained: Any, frozen: Any) -> Any:
            return cast(
                nnx.as_pure(nnx.split(nnx.merge(graphdef, trained, frozen))[1]), config.dtype
            )

        # Jitted: (trained, frozen) -> all parameters, as `abstract_weights` has them.
        self.move = jax.jit(move, out_shardings=shardings)

    @property
    def abstract_weights(self) -> nnx.State:
        """All parameters where they lie while they generate: ShapeDtypeStructs, in the compute
        dtype."""
        _, params = nnx.split(abstract_model(self.model_config))
        shapes = jax.eval_shape(partial(cast, dtype=self.config.dtype), nnx.as_pure(params))
        return placed(shapes, param_shardings(params, self.mesh))

    def abstract_batch(self, bucket: Bucket) -> Batch:
        """ShapeDtypeStructs of the prompts of a part, with their shardings."""
        return abstract_batch(
            self.model_config,
            bucket,
            self._at_once,
            self.sharding,
            videos=self.config.data.videos,
        )

    def model(self, state: TrainState, frozen: Any) -> Qwen3VL:
        """The model as it stands; valid until the next step donates the state."""
        if self.config.rollout_mesh is None:
            return nnx.merge(
                self.program.graphdef, *cast((state.params, frozen), self.config.dtype)
            )
        return nnx.merge(
            nnx.graphdef(abstract_model(self.model_config)), self.move(state.params, frozen)
        )

    def __call__(
        self,
        model: Qwen3VL,
        batch: PromptBatch,
        *,
        draw: Sequence[int],
        seeds: Sequence[int],
        samples: int,
        temperature: float,
    ) -> Completions:
        """`samples` completions of every prompt.

        Args:
            model: from `model`.
            batch: any number of prompts.
            draw: numbers that tell this rollout from others; with a prompt's seed and a
                completion's place in its group they decide all that is drawn.
            seeds: one for each prompt.
        """
        parts = []
        for start in range(0, len(batch.prompts), self._at_once):
            chosen = range(start, min(start + self._at_once, len(batch.prompts)))
            # A part with fewer prompts repeats its own: empty rows would never stop.
            full = [chosen[place % len(chosen)] for place in range(self._at_once)]
            part = self._generate(
                model,
                [batch.prompts[place] for place in full],
                batch.bucket,
                draw,
                [seeds[place] for place in full],
                samples,
                temperature,
            )
            parts.append([x[: len(chosen) * samples] for x in part])
        tokens, logprobs, lengths = map(np.concatenate, zip(*parts, strict=True))
        last = tokens[np.arange(len(tokens)), lengths - 1]
        return Completions(tokens, logprobs, lengths, ~np.isin(last, self._stop_tokens))

    def _generate(
        self,
        model: Qwen3VL,
        prompts: Sequence[Prompt],
        bucket: Bucket,
        draw: Sequence[int],
        seeds: Sequence[int],
        samples: int,
        temperature: float,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tokens and log-probabilities [prompts * samples, tokens], and lengths, gathered from all
        hosts."""
        config = self.config
        rows = [[prompts[row].example] for row in local_rows(self.sharding, len(prompts))]
        mine = Batch.from_rows(
            rows,
            self.model_config,
            length=bucket.tokens,
            patches=bucket.patches,
            videos=config.data.videos,
        )
        with jax.set_mesh(self.mesh):
            rng = reduce(jax.random.fold_in, draw[1:], jax.random.key(draw[0]))
            got = generate(
                model,
                place_rows(mine, self.sharding, len(prompts)),
                max_new_tokens=config.max_completion_tokens,
                num_samples=samples,
                temperature=temperature,
                top_p=config.top_p if config.top_p < 1 else None,
                stop_tokens=self._stop_tokens,
                seeds=seeds,
                rng=rng,
            )
            return multihost_utils.process_allgather(tuple(got), tiled=True)


def rollout_mesh(config: MeshConfig | None, mesh: Mesh) -> Mesh:
    """The devices of `mesh`, in its order, as `config` shares them out; `mesh` itself for None.

    Raises:
        ValueError: if the sizes do not multiply to the number of devices.
    """
    if config is None:
        return mesh
    sizes = mesh_sizes(**asdict(config), devices=mesh.size, name="rollout_mesh")
    return Mesh(mesh.devices.reshape(sizes), MESH_AXES, axis_types=mesh.axis_types)


def check_prompts(config: GRPOConfig, mesh: Mesh) -> int:
    """Prompts that a device (a group of `tensor` devices) of the rollout's `mesh` answers at a
    time.

    Raises:
        ValueError: if they do not divide evenly.
    """
    return rows_per_shard(
        config.prompts_per_step,
        config.rollout_parts,
        mesh,
        name="prompts_per_step",
        parts_name="rollout_parts",
    )
