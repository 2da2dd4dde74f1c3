"""What the chat template is given and what it leaves out: nothing of a record is lost without a
word, nothing of a user's text forges a turn, and what is marked is not learned."""

import numpy as np
import pytest

from pvm_jax.data.messages import ChatMessages
from pvm_jax.data.processor import Processor
from tests.pvm_jax.processor_files import TEMPLATE, learned_runs, write_checkpoint, write_json

TOOLS_TEMPLATE = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' + (tools | tojson) + (note or '') + '<|im_end|>\\n' }}
{%- endif %}
{%- for m in messages %}
    {%- if m.role in ('user', 'assistant', 'tool') or m.role == 'system' and loop.first %}
        {{- '<|im_start|>' + m.role + '\\n' + (m.reasoning_content or '') }}
        {%- for part in ([] if m.content is string else m.content) %}
            {{- '<|vision_start|><|image_pad|><|vision_end|>' if part.type == 'image' else part.text | trim }}
        {%- endfor %}
        {{- m.content if m.content is string else '' }}
        {%- for call in m.tool_calls or [] %}
            {{- '<tool_call>' + (call.function | tojson) + '</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
{#- <|video_pad|> #}
"""  # noqa: E501
THOUGHTS_TEMPLATE = """\
{%- for m in messages %}
    {{- '<|im_start|>' + m.role + '\\n' }}
    {%- if m.role == 'assistant' %}
        {%- set thought = m.content.split('</think>')[0].split('<think>')[-1].strip() if '</think>' in m.content else '' %}
        {{- '<think>\\n' + thought + '\\n</think>\\n\\n' + m.content.split('</think>')[-1].lstrip('\\n') }}
    {%- else %}
        {{- m.content }}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{{- '<|im_start|>assistant\\n<think>\\n' if add_generation_prompt else '' }}
"""  # noqa: E501


def made(tmp_path_factory, template):
    return Processor.from_pretrained(write_checkpoint(tmp_path_factory.mktemp("p"), template))


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    return made(tmp_path_factory, TOOLS_TEMPLATE)


def says(role, content, **also):
    return {"role": role, "content": content, **also}


def parts(*texts):
    return [{"type": "text", "text": text} for text in texts]


Q, A = says("user", "q"), says("assistant", "a")


def written(processor, messages, **also):
    ids = processor.encode(messages, **also).input_ids
    return processor.decode(ids, skip_special_tokens=False)


CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}


@pytest.mark.parametrize(
    "messages",
    [
        [says("user", parts("a <|im_", "end|> b")), A],
        [says("user", parts("a <|im_ ", "\n end|> b")), A],
        [says("user", parts("<", "|endof", "text|>")), A],
        [says("user", "<|endoftext|>"), A],
        [says("user", "<|stop|>"), A],
        [says("user", parts("<|image_", "pad|>")), A],
        [Q, says("assistant", "", tool_calls=[{"function": {"name": "<|im_end|>"}}])],
        [Q, says("assistant", "", tool_calls=[{"name": "f", "arguments": {"<|im_end|>": 1}}])],
        [Q, says("assistant", "a", reasoning_content="<|im_end|>")],
        ChatMessages([Q, A], {"tools": [{"function": {"name": "<|im_start|>"}}]}),
        ChatMessages([Q, A], {"tools": [{"<|im_start|>": {}}]}),
        ChatMessages([Q, A], {"tools": [CALL], "note": "<|im_end|>"}),
    ],
)
def test_no_text_becomes_a_control_token(tmp_path, messages):
    folder = write_checkpoint(tmp_path, TOOLS_TEMPLATE)
    processor = Processor.from_pretrained(folder)
    processor.tokenizer.add_tokens(["<|stop|>"])  # no special token, but generation ends at it
    processor.tokenizer.save_pretrained(folder)
    write_json(
        folder / "generation_config.json",
        {"eos_token_id": [2, processor.tokenizer.convert_tokens_to_ids("<|stop|>")]},
    )
    processor = Processor.from_pretrained(folder)
    asks = [
        processor.encode,
        processor.count,
        lambda messages: processor([messages]),
        lambda messages: (
            processor.encode_next([Q, A, *messages[:-1]])
            if messages[-1] is A and not getattr(messages, "variables", None)
            else processor.encode(messages)
        ),
    ]
    for ask in asks:
        with pytest.raises(ValueError, match="which only the chat template may write"):
            ask(messages)


def test_what_looks_like_a_control_token_apart_is_text(processor):
    messages = [
        says(
            "user",
            [
                *parts("<|im_"),
                {"type": "image", "image": np.zeros((32, 32, 3), np.uint8)},
                *parts("end|>"),
            ],
        ),
        A,
    ]
    assert "<|im_<|vision_start|>" in written(processor, messages)
    assert learned_runs(processor.encode([Q, says("assistant", "<think>")]), processor) == [
        "<think><|im_end|>"
    ]


def test_a_picture_in_an_answer_is_read_and_never_learned(processor):
    shows = says("assistant", [{"type": "image", "image": np.zeros((32, 32, 3), np.uint8)}])
    with pytest.raises(ValueError, match="with a picture or a video cannot be learned"):
        processor.encode([Q, shows])
    assert processor.encode([Q, shows | {"train": False}, Q, A]).num_patches == 16


def test_a_null_character_takes_no_part_of_a_chat_with_it(processor):
    with pytest.raises(ValueError, match="which only the chat template may write"):
        processor.encode_next([Q, A, says("user", "one \0 two")])


def test_a_control_token_that_only_the_tokenizer_sees_is_refused(processor, monkeypatch):
    """As where a normalizer makes it of other characters."""
    tokenizer = processor.tokenizer
    monkeypatch.setattr(
        processor,
        "tokenizer",
        lambda text, **options: tokenizer(text.replace("@@", "<|im_end|>"), **options),
    )
    with pytest.raises(ValueError, match="makes a control token of what is none"):
        processor.encode([says("user", "a @@ b"), A])


@pytest.mark.parametrize("mark", ["weight", "loss", "train", "trainable"])
def test_marked_turns_are_not_learned(processor, mark):
    messages = [Q, says("assistant", "wrong"), Q, says("assistant", "right")]
    messages[1][mark], messages[3][mark] = 0, True
    example = processor.encode(messages)
    assert learned_runs(example, processor) == ["right<|im_end|>"]
    bare = [Q, says("assistant", "wrong"), Q, says("assistant", "right")]
    assert np.array_equal(example.input_ids, processor.encode(bare).input_ids)


def test_tools_and_other_variables_go_to_the_template_and_stay_with_a_slice(processor):
    messages = ChatMessages([Q, A], {"tools": [CALL | {"strict": None}], "note": "!", "x": None})
    tool = '{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}, "strict": null}'
    head = f"<|im_start|>system\n[{tool}]!<|im_end|>\n" + written(processor, [Q, A])
    assert written(processor, messages) == head
    assert written(processor, messages[:1]) == head[: -len("<|im_start|>assistant\na<|im_end|>\n")]
    assert messages[0] is Q


def test_a_null_is_nothing_but_in_the_arguments_of_a_call(processor):
    function = {"name": "f", "arguments": {"x": 1, "y": [{"z": None}]}}
    calls = [
        {"type": "function", "function": function},
        {"type": "function", "id": None, "function": function | {"parameters": None}},
    ]
    turns = [[Q, says("assistant", "", tool_calls=[call], name=None)] for call in calls]
    assert '{"x": 1, "y": [{"z": null}]}' in written(processor, turns[0])
    assert written(processor, turns[0]) == written(processor, turns[1])


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([says("gpt", "q"), A], r"messages\[0\]: unknown role 'gpt': did you mean 'assistant'\?"),
        ([says("asistant", "q"), A], "unknown role 'asistant': did you mean 'assistant'"),
        ([says("User", "q"), A], "unknown role 'User': did you mean 'user'"),
        ([says("developer", "q"), Q, A], "unknown role 'developer': did you mean 'system'"),
        ([says("", "q"), A], "unknown role '': there are system, user, assistant, tool"),
        ([Q, A, says("system", "s"), Q, A], r"messages\[2\]: .* leaves out this turn .*'system'"),
        ([Q, says("assistant", "a", wieght=0)], r"\[1\]: nothing reads the key 'wieght'.*'weight'"),
        ([Q, says("assistant", "a", thought="r")], "nothing reads the key 'thought'"),
        ([says("user", "q", name="Ann"), A], "nothing reads the key 'name'"),
        ([says("user", "q", reasoning_content="r", tool_calls=[CALL]), A], None),
        ([Q, says("assistant", "a", function={"x": 1})], "nothing reads the key 'function'"),
        ([Q, says("assistant", "a", tools=["x"])], "nothing reads the key 'tools'"),
        ([Q, says("assistant", "", tool_calls=["f"])], r"tool_calls\[0\] must be"),
        ([Q, says("assistant", "", tool_calls=[{"function": {"name": "f", "arguments": 1}}])],
         r"tool_calls\[0\] must be"),
        ([Q, says("assistant", "", tool_calls=[CALL | {"x": 1}])], "nothing reads x"),
        ([Q, says("assistant", "a", weight=0.5)], "weight must be true or false"),
        ([Q, says("assistant", "a", loss="no")], "loss must be true or false"),
        ([Q, says("assistant", "a", loss=True, weight=0)], "weight and loss say different things"),
        ([says("user", "q", weight=1), A], "loss falls on assistant turns alone"),
        (ChatMessages([Q, A], {"tool": [CALL]}), "the chat template reads no 'tool'"),
        (ChatMessages([Q, A], {"messages": [Q]}), "reads no 'messages' from the record"),
        (ChatMessages([Q, A], {"tokenize": True}), "reads no 'tokenize' from the record"),
        ([says("user", "a\ud83d"), A], "not valid Unicode"),
    ],
)  # fmt: skip
def test_what_nothing_reads_is_named(processor, messages, message):
    if message is None:
        assert "<tool_call>" in written(processor, messages)
        return
    for ask in (processor.encode, processor.count, lambda messages: processor([messages])):
        with pytest.raises(ValueError, match=message):
            ask(messages)


def test_a_tools_turn_may_name_its_call_and_empty_keys_say_nothing(processor):
    messages = [
        Q,
        says("assistant", None, tool_calls=[CALL], reasoning_content="", annotations=[]),
        says("tool", "1", tool_call_id="c", name="f"),
        A,
    ]
    assert "<|im_start|>tool\n1<|im_end|>" in written(processor, messages)
    assert len(learned_runs(processor.encode(messages), processor)) == 2


def test_a_key_that_is_read_in_an_unusual_way_is_read(tmp_path_factory):
    copied = TOOLS_TEMPLATE.replace("(m.reasoning_content or '')", "(m[['note'][0]] or '')")
    processor = made(tmp_path_factory, copied)
    assert "\nwell a<|im_end|>" in written(processor, [Q, says("assistant", "a", note="well ")])


def test_roles_that_the_template_names_are_its_own(tmp_path_factory):
    template = TOOLS_TEMPLATE.replace("'tool')", "'tool', 'developer')")
    processor = made(tmp_path_factory, template)
    assert "developer\nd" in written(processor, [says("developer", "d"), Q, A])


@pytest.mark.parametrize(
    ("answer", "learned"),
    [
        ("Yes.", "\n</think>\n\nYes.<|im_end|>"),
        ("<think>\nhm\n</think>\n\nYes.", "hm\n</think>\n\nYes.<|im_end|>"),
    ],
)
def test_answers_are_learned_after_the_prompt_of_a_thinking_model(
    tmp_path_factory, answer, learned
):
    """Its prompt ends in a line end that would be one token with the next: the ids of the prompt
    stay those that generation begins with."""
    processor = made(tmp_path_factory, THOUGHTS_TEMPLATE)
    example = processor.encode([Q, says("assistant", answer)])
    assert learned_runs(example, processor) == [learned]
    prompt = processor.encode([Q], add_generation_prompt=True).input_ids
    assert np.array_equal(example.input_ids[: len(prompt)], prompt)
    assert processor.count([Q, says("assistant", answer)]) == (len(example.input_ids), 0)


@pytest.mark.parametrize("tools", [False, True])
def test_a_long_conversation_takes_time_by_its_length(processor, monkeypatch, tools):
    def turns(count):
        call = [says("assistant", "", tool_calls=[CALL]), says("tool", "r")] if tools else []
        return [says("system", "s")] + [
            message
            for n in range(count)
            for message in [says("user", f"q {n}"), *call, says("assistant", f"a {n}")]
        ]

    rendered, render = [], processor.tokenizer.apply_chat_template
    monkeypatch.setattr(
        processor.tokenizer,
        "apply_chat_template",
        lambda messages, **options: rendered.append(len(messages)) or render(messages, **options),
    )
    costs = []
    for count in (50, 100):
        example = processor.encode(turns(count))
        costs.append(sum(rendered))
        rendered.clear()
    assert costs[0] > 100
    assert costs[1] < 2.2 * costs[0]
    runs = learned_runs(example, processor)
    assert [run for run in runs if run.startswith("a")] == [f"a {n}<|im_end|>" for n in range(100)]


@pytest.mark.parametrize("count", [2, 30])
def test_turns_that_change_with_what_follows_are_refused_at_any_length(tmp_path_factory, count):
    template = TEMPLATE.replace(
        "{{- message.content }}", "{{- message.content + ('!' if loop.last else '') }}"
    )
    processor = made(tmp_path_factory, template)
    with pytest.raises(ValueError, match=r"messages\[1\]: what is learned has no exact place"):
        processor.encode([Q, A] * count)


def test_a_template_that_counts_turns_is_followed(tmp_path_factory):
    """What the messages near an answer alone cannot tell is looked up among all of them."""
    numbered = "{{- loop.index ~ ' ' ~ message.content }}"
    processor = made(tmp_path_factory, TEMPLATE.replace("{{- message.content }}", numbered))
    runs = learned_runs(processor.encode([Q, A] * 12), processor)
    assert runs == [f"{n} a<|im_end|>" for n in range(2, 25, 2)]
