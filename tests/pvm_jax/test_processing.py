"""Conversations -> arrays, against transformers' Qwen3VLProcessor (its text part, which runs
without torchvision)."""

import pickle
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from skimage import data
from transformers import AutoTokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor
from transformers.video_utils import VideoMetadata

from pvm_jax.config import ModelConfig, TextConfig, VisionConfig
from pvm_jax.data.batch import Batch
from pvm_jax.data.pixels import as_floats
from pvm_jax.data.processor import Processor
from tests.pvm_jax.processor_files import (
    IMAGES,
    TEMPLATE,
    THINKING_TEMPLATE,
    learned_runs,
    write_checkpoint,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def processor(folder):
    return Processor.from_pretrained(folder)


class Reference(Qwen3VLProcessor):
    """transformers' processor with the PIL image processor, and prepared videos in place of its
    video processor."""

    def check_argument_for_proper_class(self, argument_name, argument):
        pass


@pytest.fixture(scope="module")
def reference(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    image_processor = Qwen2VLImageProcessorPil(
        **{key: value for key, value in IMAGES.items() if "proc" not in key}
    )
    return Reference(
        image_processor, tokenizer, SimpleNamespace(merge_size=2, temporal_patch_size=2), TEMPLATE
    )


def image(part, **also):
    return {"type": "image", "image": part} | also


def text(words):
    return {"type": "text", "text": words}


ASTRONAUT, CAMERA = Image.fromarray(data.astronaut()), Image.fromarray(data.camera()[:100])
LONG = [
    {"role": "system", "content": [text("You are brief.")]},
    {
        "role": "user",
        "content": [image(ASTRONAUT), text("What is this?\nAnd this: "), image(CAMERA)],
    },
    {"role": "assistant", "content": "An astronaut, and a man with a camera."},
    {"role": "user", "content": "And this? Größe 漢字 🙂"},
    {"role": "user", "content": [text("this:"), image(CAMERA)]},
    {"role": "assistant", "content": [text("<think>\nhm\n</think>\n\n"), text("The same man.\n")]},
]
SHORT = [{"role": "user", "content": "Hello"}]
TURNS = [
    "An astronaut, and a man with a camera.<|im_end|>",
    "<think>\nhm\n</think>\n\nThe same man.\n<|im_end|>",
]


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_batch_equals_transformers(processor, reference, padding_side):
    conversations = [SHORT, LONG, [{"role": "user", "content": [image(CAMERA), text("?")]}]]
    ours = processor(conversations, padding_side=padding_side)
    theirs = reference.apply_chat_template(
        conversations,
        tokenize=True,
        return_dict=True,
        add_generation_prompt=True,
        return_tensors="np",
        processor_kwargs={"padding": True, "padding_side": padding_side},
    )
    assert ours.keys() == theirs.keys() - {"mm_token_type_ids"}
    for key, value in ours.items():
        assert value.dtype == theirs[key].dtype
        assert np.array_equal(value, theirs[key])


def test_encode_equals_a_batch_of_one(processor):
    example = processor.encode(LONG)
    arrays = processor([LONG], add_generation_prompt=False)
    assert np.array_equal(example.input_ids, arrays["input_ids"][0])
    assert example.pixel_values.dtype == np.uint8
    pixels = as_floats(example.pixel_values, example.image_scale, 1536)
    assert np.array_equal(pixels, arrays["pixel_values"])
    assert np.array_equal(example.image_grid_thw, arrays["image_grid_thw"])
    assert example.pixel_values_videos is None
    assert example.video_grid_thw is None


def test_goes_to_worker_processes(processor):
    copy = pickle.loads(pickle.dumps(processor))
    assert np.array_equal(copy.encode(LONG).input_ids, processor.encode(LONG).input_ids)


def test_text_alone_has_no_pixels(processor):
    assert processor([SHORT]).keys() == {"input_ids", "attention_mask"}
    assert processor.encode(SHORT).pixel_values is None
    assert not processor.encode(SHORT).loss_mask.any()


@pytest.mark.parametrize("add_generation_prompt", [False, True])
def test_loss_mask_is_the_assistants_turns(processor, add_generation_prompt):
    example = processor.encode(LONG, add_generation_prompt=add_generation_prompt)
    assert example.loss_mask.dtype == bool
    assert example.loss_mask.shape == example.input_ids.shape
    assert learned_runs(example, processor) == TURNS
    decoded = processor.decode(example.input_ids, skip_special_tokens=False)
    assert decoded.endswith("<|im_start|>assistant\n" if add_generation_prompt else "<|im_end|>\n")


def test_loss_mask_of_turns_that_repeat_others(processor):
    """Turns whose text is the user's, or a role's name, or empty, are found by their place and not
    by their words."""
    messages = [
        {"role": role, "content": "assistant\nHello"}
        for role in ("user", "assistant", "assistant", "user")
    ]
    messages.append({"role": "assistant", "content": ""})
    example = processor.encode(messages)
    assert learned_runs(example, processor) == ["assistant\nHello<|im_end|>"] * 2 + ["<|im_end|>"]


def test_template_that_rewrites_turns_is_refused(tmp_path):
    processor = Processor.from_pretrained(write_checkpoint(tmp_path, THINKING_TEMPLATE))
    one = [*SHORT, {"role": "assistant", "content": "Hi."}]
    assert learned_runs(processor.encode(one), processor) == [
        "<think>\n\n</think>\n\nHi.<|im_end|>"
    ]
    with pytest.raises(ValueError, match=r"messages\[1\]: what is learned has no exact place"):
        processor.encode(one * 2)
    assert processor([one * 2])["input_ids"].shape[0] == 1


@pytest.mark.parametrize("method", ["encode", "count"])
@pytest.mark.parametrize(
    "template",
    [
        TEMPLATE.replace("{%- if add_generation_prompt %}", "{%- if false %}"),
        TEMPLATE.replace("<|im_end|>", "").replace("<|im_start|>", "##"),
    ],
    ids=["no prompt", "no end"],
)
def test_template_without_borders_is_refused(tmp_path, template, method):
    processor = Processor.from_pretrained(write_checkpoint(tmp_path, template))
    with pytest.raises(ValueError, match=r"messages\[1\]: what is learned has no exact place"):
        getattr(processor, method)([*SHORT, {"role": "assistant", "content": "Hi."}])


@pytest.mark.parametrize("method", ["encode", "count"])
def test_turn_whose_first_token_is_shared_with_the_header_is_refused(processor, method):
    assert processor.tokenizer.tokenize("assistant\n\n")[-1] == "ĊĊ"
    with pytest.raises(
        ValueError, match="merges characters across the border of an assistant turn"
    ):
        getattr(processor, method)([*SHORT, {"role": "assistant", "content": "\nHi."}])


FRAMES = [Image.fromarray(np.roll(data.astronaut()[:64, :96], 10 * i, axis=1)) for i in range(5)]


def video(**also):
    return {"type": "video", "video": FRAMES} | also


def film(**also):
    return [
        {"role": "user", "content": [video(**also), text("What?")]},
        {"role": "assistant", "content": "A face."},
    ]


def test_video_layout(processor):
    example = processor.encode(film(fps=2))
    written = processor.decode(example.input_ids, skip_special_tokens=False)
    run = "<|vision_start|>" + "<|video_pad|>" * 6 + "<|vision_end|>"
    assert (
        written == f"<|im_start|>user\n<0.2 seconds>{run}<1.2 seconds>{run}<2.0"
        f" seconds>{run}What?<|im_end|>\n"
        "<|im_start|>assistant\nA face.<|im_end|>\n"
    )
    assert np.array_equal(example.video_grid_thw, [[3, 4, 6]])
    assert example.pixel_values_videos.shape == (72, 1536)
    assert example.pixel_values is None
    assert example.pixel_values_videos.dtype == np.uint8
    assert learned_runs(example, processor) == ["A face.<|im_end|>"]
    same = processor.encode(film(timestamps=np.arange(5) / 2))
    assert np.array_equal(same.input_ids, example.input_ids)
    with pytest.warns(UserWarning, match="24 frames a second"):
        fast = processor.encode(film())
    assert "<0.0 seconds>" in processor.decode(fast.input_ids)


def test_video_text_equals_transformers(processor, reference):
    example = processor.encode(film(fps=3.7))
    metadata = VideoMetadata(total_num_frames=5, fps=3.7, frames_indices=list(range(5)))
    inputs = {"video_grid_thw": example.video_grid_thw, "video_metadata": [metadata]}
    expected = reference.replace_video_token(inputs, 0)
    assert expected in processor.decode(example.input_ids, skip_special_tokens=False)


def test_images_and_videos_keep_their_order(processor):
    parts = [image(CAMERA), video(fps=1), image(ASTRONAUT), video(fps=5)]
    arrays = processor([[{"role": "user", "content": parts}], SHORT])
    assert len(arrays["image_grid_thw"]) == len(arrays["video_grid_thw"]) == 2
    single = [processor([[{"role": "user", "content": [part]}]]) for part in parts]
    for key, kinds in (("pixel_values", (0, 2)), ("pixel_values_videos", (1, 3))):
        assert np.array_equal(arrays[key], np.concatenate([single[i][key] for i in kinds]))
    config = ModelConfig(
        text=TextConfig(vocab_size=len(processor.tokenizer), hidden_size=128),
        vision=VisionConfig(out_hidden_size=128),
        **{
            f"{name}_token_id": processor.tokenizer.convert_tokens_to_ids(f"<|{token}|>")
            for name, token in (
                ("image", "image_pad"),
                ("video", "video_pad"),
                ("vision_start", "vision_start"),
                ("vision_end", "vision_end"),
            )
        },
    )
    batch = Batch.from_hf(arrays, config)
    assert (
        int((batch.visual_index >= 0).sum())
        == (len(arrays["pixel_values"]) + len(arrays["pixel_values_videos"])) // 4
    )


@pytest.mark.parametrize("messages", [SHORT, LONG, film(fps=2)], ids=["text", "images", "video"])
def test_count_is_what_encode_gives(processor, messages):
    example = processor.encode(messages)
    assert processor.count(messages) == (len(example.input_ids), example.num_patches)


def test_count_decodes_no_pixels(processor, tmp_path):
    path = tmp_path / "photo.png"
    ASTRONAUT.save(path)
    messages = [{"role": "user", "content": [image(str(path)), text("?")]}]
    expected = processor.count(messages)
    path.write_bytes(path.read_bytes()[:200])
    assert processor.count(messages) == expected
    with pytest.raises(
        ValueError, match=r"messages\[0\]: content\[0\]: .*photo\.png cannot be decoded"
    ):
        processor.encode(messages)


def test_tables_of_messages_fill_their_columns_with_none(processor):
    parts = [image(CAMERA, text=None, url=None), text("?") | {"image": None, "video": None}]
    filled = [{"role": "user", "content": parts, "tool_calls": None}]
    plain = [{"role": "user", "content": [image(CAMERA), text("?")]}]
    assert np.array_equal(processor.encode(filled).input_ids, processor.encode(plain).input_ids)


def user(*parts):
    return [{"role": "user", "content": list(parts)}]


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "at least one message"),
        ("Hello", "must be a list"),
        ({"role": "user", "content": "Hello"}, "must be a list"),
        (["Hello"], r"messages\[0\]: a message must be"),
        ([{"content": "Hello"}], r"messages\[0\]: a message must be"),
        (
            [{"role": "user", "content": None}],
            r"messages\[0\]: content must be a string or a list of parts",
        ),
        ([{"role": "user", "content": 3}], r"messages\[0\]: content must be"),
        (user("Hello"), r"messages\[0\]: content\[0\]: a part must be"),
        (
            user({"type": "audio", "audio": "a.wav"}),
            r"unknown part type 'audio': there are text, image and video",
        ),
        (user(text("a"), {"type": "text"}), r"content\[1\]: a text part needs a string"),
        (user({"type": "image"}), "an image part needs one source, .* got none"),
        (
            user({"type": "image", "image": "a.png", "url": "b.png"}),
            r"one source, .* got \['image', 'url'\]",
        ),
        (user(image("a.png", max_pixels=100)), "image parts have no max_pixels"),
        (
            user(image("https://example.org/a.png")),
            r"messages\[0\]: content\[0\]: .*a\.png: images are not fetched",
        ),
        (
            user(image(Image.new("RGB", (1000, 4)))),
            r"messages\[0\]: content\[0\]: absolute aspect ratio",
        ),
        (user(text("a <|image_pad|> b")), r"messages\[0\]: the text holds <\|image_pad\|>"),
        (
            [*SHORT, {"role": "assistant", "content": "Yes.<|im_end|>"}],
            r"messages\[1\]: the text holds <\|im_end\|>",
        ),
        ([{"role": "user", "content": "<|vision_start|>"}], r"the text holds <\|vision_start\|>"),
        (
            [{"role": "system", "content": [image(CAMERA)]}, *SHORT],
            "wrote 0 placeholders for 1 images",
        ),
        (
            [{"role": "poet", "content": "Hello"}],
            r"messages\[0\]: unknown role 'poet': there are system, user, assistant, tool",
        ),
        ([{"role": "assistant", "content": "Hello"}], "cannot begin with the assistant"),
        (user({"type": "video", "video": "a.mp4", "fps": 0}), "fps must be a positive number"),
        (user({"type": "video", "video": "a.mp4", "fps": 1, "num_frames": 9}), "not both"),
        (user({"type": "video", "video": "a.mp4", "num_frames": 1}), "num_frames must be a whole"),
        (user({"type": "video", "video": "a.mp4", "timestamps": [0]}), "have no timestamps"),
        (user({"type": "video", "video": []}), "needs its file or its list of frames"),
        (user(video(fps=0)), "fps must be a positive number, got 0"),
        (user(video(fps=1, timestamps=[0, 1, 2, 3, 4])), "fps or timestamps, not both"),
        (user(video(timestamps=[0, 1])), "timestamps must be 5 ascending seconds"),
        (user(video(timestamps=[0, 1, 3, 2, 4])), "timestamps must be 5 ascending seconds"),
        (user({"type": "video", "video": FRAMES[:1], "fps": 1}), "a video needs 2 frames or more"),
        (
            user({"type": "video", "video": [FRAMES[0], CAMERA], "fps": 1}),
            r"content\[0\]: the frames .* one size",
        ),
    ],
)
def test_bad_messages_are_named(processor, messages, message):
    with pytest.raises(ValueError, match=message):
        processor.encode(messages)


def test_missing_image_is_named(processor):
    messages = [*SHORT, {"role": "user", "content": [text("a"), image("gone/away.jpg")]}]
    for use in (processor.encode, processor.count, lambda messages: processor([messages])):
        with pytest.raises(
            FileNotFoundError, match=r"messages\[1\]: content\[1\]: gone/away\.jpg does not exist"
        ):
            use(messages)
    with pytest.raises(FileNotFoundError, match="conversation 1: "):
        processor([SHORT, messages])


def test_bad_calls_are_refused(processor):
    for conversations in ([], SHORT):
        with pytest.raises(ValueError, match="list of conversations"):
            processor(conversations)
    with pytest.raises(ValueError, match="padding_side"):
        processor([SHORT], padding_side="middle")


def test_loading_warns_of_nothing(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Processor.from_pretrained(folder).encode(LONG)
