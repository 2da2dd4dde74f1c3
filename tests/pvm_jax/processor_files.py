"""A checkpoint's side files, for the tests of what reads them: a small tokenizer that splits words
as Qwen's does, chat templates, settings of images and videos."""

import json

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Qwen3-VL's template without its tools: the parts that place turns, images and videos.
TEMPLATE = """\
{%- for message in messages %}
    {%- if message.role in ['system', 'user', 'assistant'] %}
        {{- '<|im_start|>' + message.role + '\\n' }}
        {%- if message.content is string %}
            {{- message.content }}
        {%- else %}
            {%- for content in message.content %}
                {%- if message.role == 'user' and (content.type == 'image' or 'image' in content) %}
                    {{- '<|vision_start|><|image_pad|><|vision_end|>' }}
                {%- elif message.role == 'user' and
                        (content.type == 'video' or 'video' in content) %}
                    {{- '<|vision_start|><|video_pad|><|vision_end|>' }}
                {%- elif 'text' in content %}
                    {{- content.text }}
                {%- endif %}
            {%- endfor %}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- else %}
        {{- raise_exception('unknown role ' + message.role) }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
THINKING_TEMPLATE = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {{- '<think>\\n\\n</think>\\n\\n' if message.role == 'assistant' and loop.last else '' }}
    {{- message.content + '<|im_end|>\\n' }}
{%- endfor %}
{{- '<|im_start|>assistant\\n' if add_generation_prompt else '' }}
"""
PIXELS = {
    "patch_size": 16,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}
IMAGES = PIXELS | {
    "size": {"shortest_edge": 4096, "longest_edge": 65536},
    "image_processor_type": "Qwen2VLImageProcessorFast",
    "processor_class": "Qwen3VLProcessor",
}
VIDEOS = PIXELS | {
    "size": {"shortest_edge": 4096, "longest_edge": 262144},
    "video_processor_type": "Qwen3VLVideoProcessor",
}


def write_checkpoint(folder, template=TEMPLATE):
    """A byte-level BPE tokenizer with Qwen's word splitting, and the side files of a Qwen3-VL
    directory."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[AddedToken(token, normalized=False, special=True) for token in SPECIAL],
        show_progress=False,
    )
    tokenizer.train_from_iterator(
        ["user\n\n assistant\n\n system\n\n <0.0 seconds> what is this picture"] * 3, trainer
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
        },
    )
    (folder / "chat_template.jinja").write_text(template)
    write_json(folder / "preprocessor_config.json", IMAGES)
    write_json(folder / "video_preprocessor_config.json", VIDEOS)
    return folder


def write_json(path, value):
    path.write_text(json.dumps(value))


def learned_runs(example, processor):
    """The text of each run of learned tokens."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], example.loss_mask, [0]])))
    runs = zip(edges[::2], edges[1::2], strict=True)
    return [processor.decode(example.input_ids[a:b], skip_special_tokens=False) for a, b in runs]
