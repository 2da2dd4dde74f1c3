"""What a run of supervised fine-tuning is told, beside what every run is."""

from dataclasses import KW_ONLY, dataclass

from train.config import DataConfig, RunConfig, Source, mixture_of


@dataclass(frozen=True)
class HeldOutConfig:
    """Conversations that are measured and not trained on, in the buckets of the training data.

    Attributes:
        sources: as data.sources.
        every: steps between two measurements; the first is before step 0, the last after the last
            step.
        samples: conversations whose answers are generated and written to TensorBoard: the first of
            the first source that fit a bucket.
        max_new_tokens: of each of these answers.
    """

    sources: str | list[str | Source]
    every: int = 500
    samples: int = 4
    max_new_tokens: int = 128

    def __post_init__(self):
        if (
            not mixture_of(self.sources)
            or self.every < 1
            or self.samples < 0
            or self.max_new_tokens < 1
        ):
            raise ValueError(
                "held_out: needs sources, every >= 1, samples >= 0 and max_new_tokens >= 1"
            )


@dataclass(frozen=True)
class SFTConfig(RunConfig):
    """Supervised fine-tuning. The defaults are the paper's alignment stage.

    Attributes:
        data: the training examples.
        batch_size: rows of one optimizer step, over all devices; a row is one example, or several
            with data.packing.
        held_out: what is measured while the run goes on; nothing by default.
    """

    data: DataConfig
    _: KW_ONLY
    batch_size: int = 64
    held_out: HeldOutConfig | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}")
        if self.batch_size % self.accumulation:
            raise ValueError(
                f"batch_size {self.batch_size} must be a multiple of accumulation"
                f" {self.accumulation}"
            )
