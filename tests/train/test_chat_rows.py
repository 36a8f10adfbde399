"""What of a conversation is learnt, and what a row must have."""

import json

import pytest

from plait.checkpoint.chat_template import ChatTemplate, Message, choose_chat_template
from plait.checkpoint.huggingface import load_tokenizer
from plait.errors import ModelError
from plait.train.chat_rows import ChatEncoder, PreferenceEncoder, special_tokens
from plait.train.rows import Problem, Row

from .tiny_model import make_model_folder

CHATML = ChatTemplate(
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}",
    {},
)
TALK = [
    Message("system", "be kind"),
    Message("user", "hi"),
    Message("assistant", "hello you"),
    Message("user", "bye"),
    Message("assistant", "farewell"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_model_folder(tmp_path_factory.mktemp("chat") / "tiny")


@pytest.fixture
def encoder(folder):
    tokenizer = load_tokenizer(folder)
    return ChatEncoder(tokenizer, CHATML, 0, 60, special_tokens(tokenizer))


def _learnt(template):
    rendered = template.render_marked(TALK)
    return rendered.text, [rendered.text[start:end] for start, end in rendered.spans]


def test_answers_and_their_ends_are_learnt_and_nothing_else():
    text, learnt = _learnt(CHATML)
    assert text == CHATML.render(TALK, add_generation_prompt=False)
    assert learnt == ["hello you</s>", "farewell</s>"]


def test_generation_blocks_say_what_is_learnt():
    blocks = ChatTemplate(
        "{% for m in messages %}[{{ m.role }}]"
        "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}!{% endgeneration %}"
        "{% else %}{{ m.content }}{% endif %}{% endfor %}",
        {},
    )
    text, learnt = _learnt(blocks)
    assert learnt == ["hello you!", "farewell!"]
    assert text == "[system]be kind[user]hi[assistant]hello you![user]bye[assistant]farewell!"


def test_generation_blocks_find_the_tokens_that_transformers_finds(folder, encoder):
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(folder)
    template = choose_chat_template(folder, "plain")
    messages = [{"role": m.role, "content": m.content} for m in TALK[1:]]
    expected = theirs.apply_chat_template(
        messages,
        chat_template=template.source,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    ours = ChatEncoder(encoder.tokenizer, template, 0, 200, ())
    (sample,) = ours([Row("a:1", {"messages": messages})])
    assert sample.tokens.tolist() == expected["input_ids"]
    assert sample.counted.astype(int).tolist() == expected["assistant_masks"]


def test_json_in_a_template_is_json_and_not_html():
    template = ChatTemplate("{% for m in messages %}{{ m.content | tojson }}{% endfor %}", {})
    text = "<a href='x'>caf\u00e9 & \"tea\"</a>"
    assert json.loads(template.render([Message("user", text)])) == text
    assert "<a href='x'>caf\u00e9 &" in template.render([Message("user", text)])


@pytest.mark.parametrize(
    "source",
    [
        "{{ strftime_now('%d %B %Y') }}: {{ messages[0].content }}",
        "{{ messages[0] | tojson(separators=(',', ':'), sort_keys=true) }}",
        "{{ messages[0] | tojson(ensure_ascii=true, indent=2) }}",
        "{% for m in messages %}{% if loop.last %}{% break %}{% endif %}{{ m.role }}{% endfor %}",
    ],
)
def test_what_templates_rely_on_is_what_transformers_offers(folder, source):
    from transformers import AutoTokenizer

    messages = [{"role": "user", "content": "caf\u00e9"}, {"role": "assistant", "content": "b"}]
    theirs = AutoTokenizer.from_pretrained(folder)
    expected = theirs.apply_chat_template(messages, chat_template=source, tokenize=False)
    assert ChatTemplate(source, {}).render([Message(**each) for each in messages]) == expected


def test_a_template_that_rewrites_the_past_is_refused():
    forgetful = ChatTemplate("{% for m in messages[-2:] %}{{ m.content }};{% endfor %}", {})
    with pytest.raises(ModelError, match="changes what stands before message 2"):
        forgetful.render_marked(TALK)


def test_the_learnt_tokens_are_those_of_the_answers(encoder):
    row = {"messages": [{"role": "user", "content": "what colour is sky?"}]}
    row["messages"].append({"role": "assistant", "content": "it is blue."})
    (sample,) = encoder([Row("a:1", row)])
    decode = encoder.tokenizer.decode
    assert decode(sample.tokens[sample.counted].tolist()) == "it is blue.</s>"
    (plain,) = encoder([Row("a:2", {"prompt": "what is", "completion": " it?"})])
    assert plain.tokens[-1] == 0
    assert decode(plain.tokens[plain.counted][:-1].tolist()) == " it?"


BAD = {
    "fields": ({"text": "x"}, "needs 'messages', or 'prompt' and 'completion'; it has 'text'"),
    "no list": ({"messages": "hi"}, "'messages' is 'hi', not a list of messages"),
    "no object": ({"messages": ["hi"]}, "message 0 of 'messages' is 'hi', not an object"),
    "no role": ({"messages": [{"content": "hi"}]}, "has no text 'role'"),
    "more than is read": (
        {"messages": [{"role": "assistant", "content": "x", "tool_calls": [{"id": 1}]}]},
        "message 0 of 'messages' has 'tool_calls' beside role and content, which is not read",
    ),
    "no answer": (
        {"messages": [{"role": "user", "content": "hi"}]},
        "no message is the assistant's",
    ),
    "too long": ({"prompt": "a b " * 60, "completion": "c"}, "more than the 60 of a sequence"),
    "empty": ({"prompt": "a", "completion": ""}, "'completion' is empty"),
    "an end of its own": (
        {"prompt": "a <|endoftext|>", "completion": "b"},
        "spells the special token '<|endoftext|>'",
    ),
}


@pytest.mark.parametrize(("value", "reason"), BAD.values(), ids=BAD)
def test_a_row_that_cannot_be_used_says_why(encoder, value, reason):
    (problem,) = encoder([Row("chat.jsonl:7", value)])
    assert isinstance(problem, Problem)
    assert problem.place == "chat.jsonl:7"
    assert reason in problem.reason


def test_messages_without_any_template_ask_for_one(encoder):
    bare = ChatEncoder(encoder.tokenizer, None, 0, 60, ())
    (problem,) = bare([Row("a:1", {"messages": [{"role": "assistant", "content": "x"}]})])
    assert "template=plain" in problem.reason


def test_a_preference_is_used_whole_or_not_at_all(encoder):
    both = PreferenceEncoder(encoder)
    good = {"prompt": "what is it?", "chosen": "blue", "rejected": "green"}
    chosen, rejected = both([Row("a:1", good)])
    shared = chosen.counted.argmax()
    assert (chosen.tokens[:shared] == rejected.tokens[:shared]).all()
    (problem,) = both([Row("a:2", {**good, "rejected": ""})])
    assert "'rejected' is empty" in problem.reason
    (problem,) = both([Row("a:3", {"prompt": "x", "chosen": "y"})])
    assert "lacks 'rejected'" in problem.reason


def test_a_template_is_chosen_by_name(folder, tmp_path):
    with pytest.raises(ModelError, match="has no chat template"):
        choose_chat_template(folder, "")
    with pytest.raises(ModelError, match="neither 'plain' nor a file"):
        choose_chat_template(folder, "chatlm")
    (tmp_path / "mine.jinja").write_text("{{ eos_token }}")
    template = choose_chat_template(folder, str(tmp_path / "mine.jinja"))
    assert template.render([]) == "<|endoftext|>"
