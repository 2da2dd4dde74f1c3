"""What each model wrote, side by side with the image."""

from pvm_jax.data.example import visual_runs
from pvm_jax.measure.accuracy import prompt_of
from pvm_jax.measure.pictures import picture
from pvm_jax.measure.report.section import AnswerSample, Section
from pvm_jax.measure.report.task import Models, Task, written

SAMPLES, PICTURES = 4, 4
"""Conversations, and pictures of each, at most."""


def sample_answers(models: Models, task: Task) -> Section:
    """The first few conversations: pictures, prompt, true answer and what each model wrote."""
    answers = {name: written(name, model, task).tokens for name, model in models.items()}
    config, pixels = next(iter(models.values())).config, task.processor.image_settings
    samples = []
    for number, example in enumerate(task.examples[:SAMPLES]):
        prompt, true = prompt_of(example)
        texts = {"true": true} | {name: tokens[number] for name, tokens in answers.items()}
        seen = visual_runs(example, config)[:PICTURES]
        samples.append(
            AnswerSample(
                [picture(f.pixels, f.rows, f.columns, pixels, config.vision) for f in seen],
                task.processor.decode(prompt.input_ids).strip(),
                {name: task.processor.decode(ids).strip() for name, ids in texts.items()},
            )
        )
    return Section("samples", "What was written", [], samples=samples)
