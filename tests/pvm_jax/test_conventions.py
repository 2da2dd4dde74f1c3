"""Records in the conventions that people have: each reads as the same conversation, or is refused
with what to do."""

import base64
import io
import json

import msgpack
import numpy as np
import pytest
from PIL import Image

from pvm_jax.data.conventions import record_messages
from pvm_jax.data.conversations import check_learnable
from pvm_jax.data.image_files import read_image
from pvm_jax.data.messages import is_learned, parse
from pvm_jax.data.shards import pack_record, unpack_record

USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
PLACE = {"type": "image"}


def read(record, root):
    """[(role, what is shown and said)] of a record's messages."""

    def said(part):
        if part["type"] != "image":
            return part.get("text", part.get("video"))
        (source,) = [part[key] for key in ("image", "path", "url", "image_url") if key in part]
        return str(source).replace(f"{root}/", "IMAGE ")

    def content(message):
        given = message["content"]
        return given if isinstance(given, str) else [said(part) for part in given]

    return [(message["role"], content(message)) for message in record_messages(record, root)]


def asks(*content, answer="a"):
    return [
        {"role": "user", "content": content[0] if isinstance(content[0], str) else list(content)},
        {"role": "assistant", "content": answer},
    ]


def text(words):
    return {"type": "text", "text": words}


SHOWN = [("user", ["IMAGE a.png", "\nq"]), ("assistant", "a")]
LLAVA = [{"from": "human", "value": "<image>\nq"}, {"from": "gpt", "value": "a"}]


@pytest.mark.parametrize(
    "record",
    [
        {"messages": asks("<image>\nq"), "images": ["a.png"]},
        {"messages": asks("<image>\nq"), "image": "a.png"},
        {"messages": asks("<image>\nq"), "image": ["a.png"], "images": []},
        {"messages": asks(text("<image>"), text("\nq")), "images": ["a.png"]},
        {"messages": asks(PLACE, text("\nq")), "images": ["a.png"]},
        {"messages": asks(PLACE | {"index": 0, "text": None}, text("\nq")), "images": ["a.png"]},
        {"messages": asks("\nq"), "images": ["a.png"]},
        {"id": "7", "image": "a.png", "conversations": LLAVA},
        {"conversations": LLAVA, "images": ["a.png"], "system": "", "tools": "[]"},
        {"conversations": [LLAVA[0] | {"content": None, "role": None}, ANSWER], "image": "a.png"},
        {"prompt": asks("<image>\nq")[:1], "completion": asks("")[1:], "images": ["a.png"]},
        {"messages": json.dumps(asks("<image>\nq")), "images": ["a.png"]},
        {"messages": list(map(json.dumps, asks("<image>\nq"))), "images": ["a.png"]},
    ],
)
def test_every_convention_is_the_same_conversation(tmp_path, record):
    assert read(record, tmp_path) == SHOWN
    messages = record_messages(record, tmp_path)
    again = record_messages(unpack_record(pack_record(messages)), tmp_path)
    assert again == messages


def test_pictures_stand_where_tags_and_indices_say(tmp_path):
    messages = [*asks("a <image> b<image>", answer="<image>?"), *asks("c")]
    images = ["1.png", "2.png", "3.png"]
    assert read({"messages": messages, "images": images}, tmp_path) == [
        ("user", ["a ", "IMAGE 1.png", " b", "IMAGE 2.png"]),
        ("assistant", ["IMAGE 3.png", "?"]),
        *[("user", "c"), ("assistant", "a")],
    ]
    places = [PLACE | {"index": index} for index in (2, 0, 1)]
    shown = read({"messages": asks(*places), "images": images}, tmp_path)
    assert shown[0] == ("user", ["IMAGE 3.png", "IMAGE 1.png", "IMAGE 2.png"])


def test_videos_stand_where_their_tags_and_parts_are(tmp_path):
    frames = [["1.png", "2.png"], {"video": ["3.png", "4.png"], "fps": 2}]
    for messages in (
        asks("<video>q<video>"),
        asks({"type": "video"}, text("q"), {"type": "video"}),
    ):
        first, said, second = record_messages({"messages": messages, "videos": frames}, tmp_path)[
            0
        ]["content"]
        assert first["video"] == [str(tmp_path / name) for name in ("1.png", "2.png")]
        assert (said["text"], second["fps"]) == ("q", 2)
        assert second["video"] == [str(tmp_path / name) for name in ("3.png", "4.png")]


@pytest.mark.parametrize(
    "nothing",
    [
        *({"image": ""}, {"images": [""]}, {"images": [None]}, {"images": []}, {"image": None}),
        *({"image": {"bytes": None, "path": None}}, {"images": [None], "videos": [], "video": ""}),
    ],
)
def test_an_empty_picture_is_none(tmp_path, nothing):
    assert read({"messages": [USER, ANSWER], **nothing}, tmp_path) == read(
        {"messages": [USER, ANSWER]}, tmp_path
    )


def test_tags_are_words_where_no_picture_is_meant(tmp_path):
    spoken = [
        {"messages": asks("q", answer="<video> is a tag, and <image>")},
        {"messages": asks(text("what is <image>?"), text("q"))},
    ]
    for record in spoken:
        said = record_messages(record, tmp_path)
        assert said == record["messages"]


def png(mode="RGB"):
    file = io.BytesIO()
    Image.linear_gradient("L").resize((32, 32)).convert(mode).save(file, "PNG")
    return file.getvalue()


def test_a_column_about_pictures_is_the_records_own(tmp_path):
    own = {"image_id": 7, "image_caption": "a.png of boats", "media_type": "png", "label": False}
    record = {"messages": asks(PLACE), "image": "a.png", "image_path": "a.png"}
    assert read({"messages": [USER, ANSWER], **own}, tmp_path) == [
        ("user", "q"),
        ("assistant", "a"),
    ]
    assert read(record, tmp_path)[0] == ("user", ["IMAGE a.png"])


def test_pictures_as_base64_are_read(tmp_path):
    encoded = base64.b64encode(png()).decode()
    url = f"data:image/png;base64,{encoded}"
    content = [
        {"type": "image_url", "image_url": {"url": url, "detail": "auto"}},
        {"type": "image_url", "image_url": url},
        {"type": "image", "base64": encoded},
        {"type": "image", "image": encoded},
        {"type": "image", "image": url},
        PLACE,
    ]
    messages = record_messages({"messages": asks(*content), "image": encoded}, tmp_path)
    sources = [source for _, source in parse(messages, ()).images]
    assert len(sources) == 6
    for source in sources:
        assert np.array_equal(read_image(source), Image.open(io.BytesIO(png())))


def test_a_completion_alone_is_learned_and_a_prompt_alone_is_asked(tmp_path):
    prompt = [USER, ANSWER, USER]
    messages = record_messages({"prompt": prompt, "completion": [ANSWER]}, tmp_path)
    assert [is_learned(message) for message in messages] == [False, False, False, True]
    assert read({"prompt": prompt, "solution": "3"}, tmp_path) == read(
        {"messages": prompt}, tmp_path
    )


def test_shareGPT_has_a_system_column_tools_and_marks(tmp_path):
    record = {
        "system": "s",
        "conversations": [
            {"from": "human", "value": "q"},
            {"from": "gpt", "value": "a", "weight": 0},
            {"from": "observation", "value": "r"},
            {"from": "gpt", "value": "b"},
        ],
        "tools": json.dumps([{"name": "f"}]),
        "chat_template_kwargs": {"enable_thinking": False},
    }
    messages = record_messages(record, tmp_path)
    assert [message["role"] for message in messages] == [
        "system",
        "user",
        "assistant",
        "tool",
        "assistant",
    ]
    assert list(map(is_learned, messages)) == [False] * 4 + [True]
    assert messages[1:].variables == {"tools": [{"name": "f"}], "enable_thinking": False}
    again = record_messages(msgpack.unpackb(pack_record(messages)), tmp_path)
    assert (again, again.variables) == (messages, messages.variables)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"text": "a"}, "it has none of messages, conversations, prompt"),
        ({"messages": [USER], "prompt": [USER]}, "both 'messages' and 'prompt'"),
        ({"messages": [USER], "completion": [ANSWER]}, "'completion' belongs to 'prompt'"),
        ({"prompt": "The sky is", "completion": " blue."}, "prompt: a text here must be JSON"),
        ({"conversations": [{"from": ["human"], "value": "q"}]}, "'from' must be a text"),
        ({"conversations": [LLAVA[0] | {"content": "r"}]}, "both 'value' and 'content'"),
        ({"messages": [{"role": "user"}, ANSWER], "image": "a"}, "content must be a string"),
        ({"messages": [USER], "system": ["s"]}, "'system' must be a text"),
        ({"messages": [{"role": "system", "content": "s"}], "system": "s"}, "leave one out"),
        ({"messages": [USER, ANSWER], "imagess": ["a"]}, "reads 'imagess': did you mean 'images'"),
        ({"messages": [USER, ANSWER], "Image": "a"}, "did you mean 'image'"),
        ({"messages": [USER, ANSWER], "tool": [{}]}, "did you mean 'tools'"),
        ({"messages": [USER, ANSWER], "audios": ["a"]}, "'audios' is not read here"),
        ({"messages": [USER], "chosen": [ANSWER], "rejected": [ANSWER]}, "'chosen' is not read"),
        ({"messages": [USER, ANSWER], "weight": 0}, "'weight' marks a turn and not a record"),
        ({"messages": [USER, ANSWER], "tools": {"name": "f"}}, "'tools' must be a list"),
        ({"messages": [USER, ANSWER], "tools": ["f"]}, "tools: a text here must be JSON"),
        ({"messages": [USER, ANSWER], "chat_template_kwargs": [1]}, "must be an object"),
        (
            {"messages": [USER], "tools": [{}], "chat_template_kwargs": {"tools": []}},
            "'chat_template_kwargs' has tools, and so has the record",
        ),
        ({"messages": [USER, ANSWER], "image_path": "a.png"}, "'image_path', which seems to hold"),
        ({"messages": [USER, ANSWER], "img": [{"bytes": b"x", "path": None}]}, "reads 'img'"),
        ({"messages": [USER, ANSWER], "loss_mask": [0, 1]}, "'loss_mask' is not read here"),
        ({"messages": [USER, ANSWER], "system_prompt": "s"}, "it belongs in 'system'"),
        ({"messages": [USER], "enable_thinking": False}, "belongs in 'chat_template_kwargs'"),
        ({"prompt": [USER], "completion": [ANSWER], "label": False}, "'label' marks the compl"),
        ({"messages": asks("see <image_1>"), "images": ["a"]}, "<image_1>, which is no place"),
        ({"messages": asks("<IMAGE>q"), "image": "a"}, "<IMAGE>, which is no place"),
        ({"messages": asks("<image> <|image_2|>"), "image": "a"}, r"image_2\|>, which is no place"),
        ({"messages": asks("<img>a.png</img> q")}, "<img>a.png</img>, which is no place"),
        ({"messages": asks("<image><image>q"), "images": ["a"]}, "2 <image> tags for the 1 "),
        ({"messages": asks("<image>q"), "images": ["a", "b"]}, "1 <image> tags for the 2 pictures"),
        ({"messages": asks("<image>q"), "images": [""]}, "1 <image> tags for the 0 pictures"),
        ({"messages": asks("<image>q")}, "1 <image> tags for the 0 pictures"),
        ({"messages": asks("<video>q"), "images": ["a"]}, "1 <video> tags for the 0 videos"),
        ({"messages": asks(PLACE, text("<image>q")), "images": ["a"]}, "and there are image parts"),
        (
            {"messages": asks(PLACE | {"image": "a"}, text("<image>q"))},
            "1 <image> tags for .*, and there are image parts",
        ),
        (
            {"messages": asks({"type": "image_url", "image_url": "a"}, text("<image>q"))},
            "1 <image> tags for .*, and there are image parts",
        ),
        (
            {"messages": asks({"type": "image_url", "image_url": "a"}), "images": ["b"]},
            "0 image parts for the 1 pictures",
        ),
        ({"messages": asks("q"), "images": ["a", None]}, r"images\[1\] is empty"),
        ({"messages": asks(PLACE, PLACE), "images": ["a"]}, "2 image parts for the 1 pictures"),
        (
            {"messages": asks(PLACE | {"index": 1}, text("q")), "images": ["a"]},
            r"'index' of image parts must be 0 to 0, each once, got \[1\]",
        ),
        (
            {"messages": asks(PLACE | {"index": 0}, PLACE), "images": ["a", "b"]},
            r"each once, got \[0, None\]",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_understood_is_refused(tmp_path, record, message):
    with pytest.raises(ValueError, match=message):
        record_messages(record, tmp_path)


def test_a_record_whose_turns_are_all_marked_teaches_nothing():
    with pytest.raises(ValueError, match="every assistant turn is marked as not to be learned"):
        check_learnable([USER, ANSWER | {"train": False}])
    check_learnable([USER, ANSWER | {"train": False}, USER, ANSWER])


@pytest.mark.parametrize("content", ["", " \n", None, [], [text("")], [text(" "), text("\t")]])
def test_an_empty_answer_is_not_learned_without_a_word(content):
    empty = {"role": "assistant", "content": content, "tool_calls": [], "name": "Ann"}
    with pytest.raises(ValueError, match=r"^messages\[3\]: the answer is empty: leave .*weight: 0"):
        check_learnable([USER, ANSWER, USER, empty])
    check_learnable([USER, empty | {"weight": 0}, USER, ANSWER])
    for key, value in (("tool_calls", [{"name": "f"}]), ("reasoning_content", "So?")):
        check_learnable([USER, empty | {key: value}])
    check_learnable([USER, empty | {"content": [text(" "), text("a")]}])


@pytest.mark.parametrize("content", [1, 0, False, {}])
def test_an_answer_of_no_kind_is_not_called_empty(content):
    """Who parses it says what it should be."""
    check_learnable([USER, {"role": "assistant", "content": content}])


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"type": "image_url", "image_url": {"url": "a", "path": "b"}}, "image_url: nothing reads"),
        ({"type": "video", "video": ["a", "b"], "fps": 5e-324}, "fps 5e-324 is too small"),
    ],
)
def test_a_part_that_says_too_much_or_nonsense_is_refused(part, message):
    with pytest.raises(ValueError, match=message):
        parse(asks(part), ())


def test_a_shard_holds_whole_numbers_of_any_size_and_no_other_things():
    turns = [USER, ANSWER | {"tool_calls": [{"name": "f", "arguments": {"x": 10**30, "y": -1}}]}]
    assert unpack_record(pack_record(turns))["messages"] == turns
    with pytest.raises(ValueError, match="a shard holds no object"):
        pack_record([USER | {"content": object()}])


def test_an_empty_path_is_no_image():
    with pytest.raises(ValueError, match="path is empty"):
        read_image("")
    with pytest.raises(ValueError, match=r"URL cannot be read as an image: it is in no format"):
        read_image("data:image/png;base64,AAAA")
