"""What a run is told, as frozen dataclasses; YAML files and the command line fill them in."""

import re
from dataclasses import KW_ONLY, dataclass, field
from typing import Literal, TypeVar

from pvm_jax.config import LoRAConfig
from pvm_jax.files.paths import checkpoint_path, make_paths
from train.mixture import Source, in_place, mixture_of

Config = TypeVar("Config")
Trainable = Literal["pvm", "lora", "decoder", "all"]
TrackerName = Literal["tensorboard", "wandb", "trackio", "mlflow"]


@dataclass(frozen=True)
class Bucket:
    """One static shape of a row: every example of the bucket is padded to it.

    Attributes:
        tokens: text positions of a row, visual tokens included.
        patches: image patches of a row (four of them become one visual token).
    """

    tokens: int
    patches: int

    def __post_init__(self):
        if self.tokens < 1 or self.patches < 0 or self.patches % 4:
            raise ValueError(
                f"data.buckets: needs tokens >= 1 and patches a multiple of 4, got {self.tokens}"
                f" tokens, {self.patches} patches"
            )


@dataclass(frozen=True)
class ExamplesConfig:
    """Examples, and the shapes that they are padded to.

    Attributes:
        sources: a path, or several; {path: ..., weight: ...} for one that an epoch reads more or
            less often than once.
        buckets: shapes that rows are padded to; an example goes to the smallest that holds it. One
            compilation each.
        videos: whether examples may show videos. A patch of theirs has two frames, and then every
            patch of a batch has room for two: images take twice the memory.
        too_long: an example that no bucket holds is left out ("drop": the count is logged) or stops
            the run ("error").
        threads: batches read at the same time.
        prefetch: batches kept ready.
        measure_anew: a run goes on although its sources no longer hold what it began with: it
            measures them again, and lays out what is left of its steps by what they hold now.
    """

    sources: str | list[str | Source]
    buckets: list[Bucket]
    _: KW_ONLY
    videos: bool = False
    too_long: Literal["drop", "error"] = "drop"
    threads: int = 4
    prefetch: int = 8
    measure_anew: bool = False

    def __post_init__(self):
        object.__setattr__(self, "sources", in_place(self.sources))
        if not self.mixture:
            raise ValueError("data.sources: needs at least one path")
        if not self.buckets:
            raise ValueError("data.buckets: needs at least one bucket")
        if self.threads < 1 or self.prefetch < 1:
            raise ValueError(
                f"data: threads {self.threads} and prefetch {self.prefetch} must be at least 1"
            )

    @property
    def mixture(self) -> list[Source]:
        """The sources, each with its weight."""
        return mixture_of(self.sources)


@dataclass(frozen=True)
class HideSchedule:
    """Which share of a batch's rows have their images hidden, over a run: first one, then another.

    Attributes:
        until: share of the run's steps after which `then` holds.
        share: before that, of the rows.
        then: from there on.
    """

    until: float
    share: float = 1.0
    then: float = 0.0

    def step(self, steps: int) -> int:
        """The first of a run's `steps` in which `then` holds."""
        return round(self.until * steps)


@dataclass(frozen=True)
class DataConfig(ExamplesConfig):
    """Examples, and the rows that they are laid out in.

    Attributes:
        packing: several examples share a row, as many as it holds of tokens and of patches; none
            sees another, and batch_size counts rows. Without it a row is one example.
        hide_images: share of a batch's rows whose images the decoder does not see, only the
            branch's memory: what the decoder can still find itself, a fresh branch is slow to learn
            (docs/compare.md). 0, as published, hides none; {until: 0.5} hides all of them in the
            first half of the run, and none after it.
    """

    _: KW_ONLY
    packing: bool = True
    hide_images: float | HideSchedule = 0.0

    def __post_init__(self):
        super().__post_init__()
        hide = self.hide_images
        # Checked here: what a member of a union refuses itself, the parser buries in its own words.
        if isinstance(hide, HideSchedule):
            shares = {".share": hide.share, ".then": hide.then}
            if not 0 < hide.until < 1:
                raise ValueError(
                    f"data.hide_images.until is a share of the steps in (0, 1), got {hide.until}"
                )
        else:
            shares = {"": hide}
        for name, share in shares.items():
            if not 0 <= share <= 1:
                raise ValueError(
                    f"data.hide_images{name} is a share of the rows in [0, 1], got {share}"
                )

    def hidden_share(self, step: int, steps: int) -> float:
        """Of `hide_images`, what holds at `step` of a run of `steps`."""
        hide = self.hide_images
        if not isinstance(hide, HideSchedule):
            return hide
        return hide.share if step < hide.step(steps) else hide.then


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW.

    Attributes:
        learning_rate: peak rate.
        schedule: "cosine" falls to 0 at the last step, "constant" stays; both after the warm-up.
        warmup: share of the run's steps in which the rate climbs from 0.
        weight_decay: decoupled decay of matrices; norms, biases and gates never decay.
        clip_norm: the gradient is scaled down to this global norm.
        b1: decay of the first moment.
        b2: decay of the second moment.
        eps: added to the root of the second moment.
    """

    learning_rate: float = 1e-4
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup: float = 0.1
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8

    def __post_init__(self):
        if not 0 <= self.warmup < 1:
            raise ValueError(
                f"optimizer.warmup is a share of the steps in [0, 1), got {self.warmup}"
            )
        for name in ("clip_norm", "eps"):
            if getattr(self, name) <= 0:
                raise ValueError(f"optimizer.{name} must be positive, got {getattr(self, name)}")
        for name in ("learning_rate", "weight_decay"):
            if getattr(self, name) < 0:
                raise ValueError(
                    f"optimizer.{name} must not be negative, got {getattr(self, name)}"
                )
        for name in ("b1", "b2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"optimizer.{name} must be in [0, 1), got {getattr(self, name)}")


@dataclass(frozen=True)
class LogConfig:
    """Where a run's curves and sample answers go; process 0 writes them.

    Attributes:
        to: "tensorboard" writes event files into run_dir/log; "wandb", "trackio" and "mlflow" need
            the extra of their name, and are told where to log by their own environment variables.
            What is tracked there is one run, however often it is stopped and goes on.
        project: of the run there (MLflow's experiment).
        name: of the run there; None: the directory's, of run_dir.
    """

    to: list[TrackerName] = field(default_factory=lambda: ["tensorboard"])
    project: str = "pvm-jax"
    name: str | None = None

    def __post_init__(self):
        if len(set(self.to)) < len(self.to):
            raise ValueError(f"log.to names a tracker twice: {', '.join(self.to)}")
        if not self.project or self.name == "":
            raise ValueError("log.project and log.name must not be empty")


@dataclass(frozen=True)
class MeshConfig:
    """Devices by kind of parallelism; -1 (at most once) takes what the others leave.

    Attributes:
        data: copies of the model, each with its part of the batch.
        fsdp: parts of the batch between which parameters are split too.
        tensor: parts of every matrix product.
    """

    data: int = 1
    fsdp: int = -1
    tensor: int = 1


@dataclass(frozen=True)
class DistributedConfig:
    """How this process finds the others of its run: on one machine, on a TPU slice and under SLURM
    nothing needs to be said.

    Attributes:
        coordinator_address: host:port of process 0, which all others can reach; None leaves it to
            the cluster.
        num_processes: of the run; 1 stays alone, whatever the cluster says.
        process_id: of this process, from 0.
        timeout: seconds that the processes wait for each other at the start.
    """

    coordinator_address: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    timeout: int = 300

    def __post_init__(self):
        count, process = self.num_processes, self.process_id
        if self.timeout < 1 or (count is not None and count < 1):
            raise ValueError(
                f"distributed: num_processes {count} and timeout {self.timeout} must be at least 1"
            )
        if self.coordinator_address is None:
            if (count or 1) > 1 or process:
                raise ValueError(
                    "distributed.coordinator_address is missing (host:port of process 0; got"
                    f" processes {count}, id {process})"
                )
        elif not re.fullmatch(r".+:\d+", self.coordinator_address):
            raise ValueError(
                f"distributed.coordinator_address is host:port, got {self.coordinator_address!r}"
            )
        elif count is None or process is None:
            raise ValueError(
                f"distributed.coordinator_address needs num_processes and process_id, got {count}"
                f" and {process}"
            )
        elif not 0 <= process < count:
            raise ValueError(
                f"distributed.process_id counts from 0 to num_processes - 1 = {count - 1}, got"
                f" {process}"
            )


@dataclass(frozen=True)
class RunConfig:
    """What every training run is told.

    Attributes:
        checkpoint: Orbax directory written by convert.hf_to_orbax.
        run_dir: receives step checkpoints, TensorBoard events and the result; a run found there is
            continued.
        data: what it learns from.
        branch: checkpoint to take the PVM branch from (None: the one in `checkpoint`).
        trainable: "pvm" (the branch alone), "lora" (fresh adapters alone), "decoder" (decoder, head
            and branch) or "all" (the vision tower too).
        lora: the adapters, with trainable "lora".
        tags_as_text: added tokens of the tokenizer, as ["<think>", "</think>"], that prompts and
            answers hold in letters: Qwen3-VL-Instruct was never trained on these two.
        accumulation: parts that a batch is computed in, one after the other, to save memory.
        epochs: passes over the data.
        max_steps: ends the run (and its schedule) early.
        dtype: of activations and frozen weights; trained weights and optimizer state are float32.
        remat: what the backward pass recomputes: "full" (keeps layer inputs alone), "attention"
            (and what attention's kernels gave; "xla" is none), "dots" (and matrix products) or
            "none".
        attention: attention kernel; None picks by platform.
        loss_chunk: positions of a row whose logits exist at the same time.
        seed: order of the examples, and whatever else is drawn.
        not_finite: whether a step whose loss or gradient is not finite ends the run ("stop"), or is
            reported with its examples and leaves the parameters as they were ("skip"; ten in a row
            end the run).
        log_every: steps between two reads of the metrics; every step's values are written then.
        checkpoint_every: steps between two checkpoints.
        keep: step checkpoints kept, newest first.
        log: where the metrics and sample answers go.
        optimizer: AdamW and its schedule.
        mesh: how devices share the work.
        distributed: how the processes of a run on several hosts find each other.
    """

    checkpoint: str
    run_dir: str
    data: ExamplesConfig
    _: KW_ONLY
    branch: str | None = None
    trainable: Trainable = "pvm"
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    tags_as_text: list[str] = field(default_factory=list)
    accumulation: int = 1
    epochs: int = 1
    max_steps: int | None = None
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    remat: Literal["none", "dots", "attention", "full"] = "full"
    attention: Literal["xla", "splash", "cudnn"] | None = None
    loss_chunk: int = 512
    seed: int = 0
    log_every: int = 10
    checkpoint_every: int = 500
    keep: int = 2
    not_finite: Literal["stop", "skip"] = "stop"
    log: LogConfig = field(default_factory=LogConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)

    def __post_init__(self):
        make_paths(self, "checkpoint", "run_dir", "branch", of=checkpoint_path)
        for name in (
            "accumulation",
            "epochs",
            "loss_chunk",
            "log_every",
            "checkpoint_every",
            "keep",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.max_steps is not None and self.max_steps < 1:
            raise ValueError(f"max_steps must be at least 1, got {self.max_steps}")
        if not 0 <= self.seed < 2**31:
            raise ValueError(f"seed must be in [0, 2^31), got {self.seed}")
