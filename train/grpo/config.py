"""What a run of GRPO is told, beside what every run is."""

from dataclasses import KW_ONLY, dataclass, field

from train.config import (
    ExamplesConfig,
    MeshConfig,
    OptimizerConfig,
    RunConfig,
    Source,
    Trainable,
    mixture_of,
)
from train.grpo.objective import LossType, ScaleRewards
from train.rewards.pool import RewardConfig, reward_names

_SHORTEST = 8
"""The longest completion is this many times the shortest that rows are made for."""


@dataclass(frozen=True)
class EvaluationConfig:
    """Prompts that are answered and graded, and not trained on, in the buckets of the training
    data.

    Attributes:
        sources: as data.sources.
        every: steps between two measurements; the first is before step 0, the last after the last
            step.
        temperature: 0 answers greedily; else as in training, always with the same seeds.
        samples: answers a prompt, which at temperature 0 are all alike.
        shown: answers, to the first prompts, that are written to TensorBoard.
    """

    sources: str | list[str | Source]
    every: int = 50
    temperature: float = 0.0
    samples: int = 1
    shown: int = 4

    def __post_init__(self):
        if (
            not mixture_of(self.sources)
            or self.every < 1
            or self.samples < 1
            or self.shown < 0
            or self.temperature < 0
        ):
            raise ValueError(
                "held_out: needs sources, every >= 1, samples >= 1, shown >= 0 and temperature >= 0"
            )


@dataclass(frozen=True)
class GRPOConfig(RunConfig):
    """Group-relative policy optimisation. The defaults are the paper's refinement stage.

    A step of the run is a rollout (`group_size` completions of each of `prompts_per_step` prompts,
    from the current weights), its rewards, and `num_iterations` optimizer updates on all of it.

    Attributes:
        data: the prompts; buckets are of prompts, which none of the completions' tokens count in.
        trainable: as in RunConfig; published: "decoder".
        prompts_per_step: prompts of a rollout, over all devices.
        group_size: completions of a prompt, which are compared with each other.
        num_iterations: optimizer updates on each rollout.
        max_completion_tokens: a completion that has not stopped by then is truncated.
        temperature: of the sampling, and folded into the log-probabilities.
        top_p: samples among the smallest set of tokens with this probability.
        rollout_mesh: how devices share the rollout, where it should differ from `mesh`: whole
            weights on each device decode fastest (data: -1, fsdp: 1), where they and the cache fit.
            The weights are resharded on the devices.
        rollout_parts: parts that a rollout is generated in, one after the other, to save memory.
        rewards: functions of (completion, example), and their weights in the sum.
        reward_time_limit: seconds after which a reward function is given up: the completion gets 0
            from it.
        reward_memory: GiB of memory of a process that grades; a function that asks for more gives
            the completion 0.
        reward_workers: processes that grade.
        scale_rewards: what the difference to the group's mean is divided by: the standard deviation
            of the "group", of the whole "batch", or nothing ("none").
        loss: how tokens are averaged: "dapo" (all alike), "grpo" (in each completion first) or
            "dr_grpo" (by the longest possible length).
        clip_low: how far the ratio of a token's probabilities, new to old, may fall below 1 before
            its gradient stops.
        clip_high: how far it may rise above 1.
        beta: weight of the divergence from the policy that the run starts from, which is kept
            beside it where it is not 0.
        mask_truncated: truncated completions are no part of the loss.
        held_out: what is measured while the run goes on; nothing by default.
    """

    data: ExamplesConfig
    _: KW_ONLY
    trainable: Trainable = "decoder"
    prompts_per_step: int = 8
    group_size: int = 8
    num_iterations: int = 1
    max_completion_tokens: int = 16384
    temperature: float = 1.0
    top_p: float = 1.0
    rollout_mesh: MeshConfig | None = None
    rollout_parts: int = 1
    rewards: list[RewardConfig] = field(
        default_factory=lambda: [RewardConfig("format", 0.1), RewardConfig("accuracy", 0.9)],
    )
    reward_time_limit: float = 10.0
    reward_memory: float = 4.0
    reward_workers: int = 4
    scale_rewards: ScaleRewards = "group"
    loss: LossType = "dapo"
    clip_low: float = 0.2
    clip_high: float = 0.2
    beta: float = 0.0
    mask_truncated: bool = True
    held_out: EvaluationConfig | None = None
    log_every: int = 1
    checkpoint_every: int = 50
    optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(1e-6, "constant", 0.0)
    )

    def __post_init__(self):
        super().__post_init__()
        counts = (
            "prompts_per_step",
            "num_iterations",
            "rollout_parts",
            "reward_workers",
            "max_completion_tokens",
        )
        for name in counts:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.group_size < 2:
            raise ValueError(
                f"group_size must be at least 2, got {self.group_size}: a completion is compared"
                " with its group"
            )
        if not self.temperature > 0:
            raise ValueError(
                f"temperature must be positive, got {self.temperature}: greedy completions are all"
                " alike"
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")
        if not 0 <= self.clip_low <= 1 or self.clip_high < 0 or self.beta < 0:
            raise ValueError(
                f"needs clip_low in [0, 1], clip_high >= 0 and beta >= 0, got {self.clip_low},"
                f" {self.clip_high} and {self.beta}"
            )
        reward_names(self.rewards)  # refuses none, and one twice
        for name in ("reward_time_limit", "reward_memory"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.prompts_per_step % self.rollout_parts:
            raise ValueError(
                f"prompts_per_step {self.prompts_per_step} must be a multiple of rollout_parts"
                f" {self.rollout_parts}"
            )
        if self.rows % self.accumulation:
            raise ValueError(
                f"prompts_per_step x group_size = {self.rows} must be a multiple of accumulation"
                f" {self.accumulation}"
            )

    @property
    def rows(self) -> int:
        """Completions of an optimizer update, over all devices."""
        return self.prompts_per_step * self.group_size

    @property
    def completion_lengths(self) -> list[int]:
        """Room for a completion in the rows of a part, ascending: short ones do not pay for the
        longest there may be."""
        lengths, length = [], self.max_completion_tokens
        while length * _SHORTEST >= self.max_completion_tokens and length:
            lengths.insert(0, length)
            length //= 2
        return lengths
