"""The chat format: ours and the tokenizer's template agree, and each schema becomes it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from svend.data.chat import CONTROL_TOKENS
from svend.data.documents import Document, Role
from svend.data.embedded import reasoning_documents
from svend.data.schemas import (
    chat_document,
    prompt_document,
    toolace_document,
    xlam_document,
)
from svend.data.tokenizer import DocumentTokenizer, train_tokenizer

# What `<|` begins could be a control token, which only ours keeps apart from text.
TEXT = st.text(max_size=20).filter(lambda text: "<|" not in text and text.strip() != "")
NAMES = st.sampled_from(["add", "get_weather", "Größe"])
VALUES = st.none() | st.booleans() | st.integers(-9, 10**6) | TEXT | st.lists(st.integers(0, 9))
ARGUMENTS = st.dictionaries(st.sampled_from(["a", "b", "straße"]), VALUES, max_size=3)
CALL = st.builds(
    lambda name, arguments: {"function": {"name": name, "arguments": arguments}},
    NAMES, ARGUMENTS,
)
MESSAGE = st.one_of(
    st.builds(lambda r, c: {"role": r, "content": c},
              st.sampled_from(["system", "user", "assistant", "tool"]), TEXT),
    st.builds(lambda calls: {"role": "assistant", "tool_calls": calls},
              st.lists(CALL, min_size=1, max_size=2)),
    st.builds(lambda c, calls: {"role": "assistant", "content": c, "tool_calls": calls},
              TEXT, st.lists(CALL, min_size=1, max_size=2)),
)
TOOLS = st.lists(st.fixed_dictionaries({"name": NAMES, "parameters": ARGUMENTS}), max_size=2)


@pytest.fixture(scope="module")
def tokenizer() -> DocumentTokenizer:
    return train_tokenizer(reasoning_documents(100, 0), 700)


@pytest.fixture(scope="module")
def reader(
    tokenizer: DocumentTokenizer, tmp_path_factory: pytest.TempPathFactory
) -> PreTrainedTokenizerFast:
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(folder)
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


@settings(max_examples=120, deadline=None)
@given(messages=st.lists(MESSAGE, min_size=1, max_size=5), tools=TOOLS)
def test_the_template_of_the_tokenizer_gives_our_token_ids(
    tokenizer: DocumentTokenizer, reader: PreTrainedTokenizerFast,
    messages: list[dict[str, Any]], tools: list[dict[str, Any]],
) -> None:
    [ours] = tokenizer.encode([chat_document({"messages": messages, "tools": tools})])
    theirs = reader.apply_chat_template(messages, tools=tools or None, return_dict=False)
    assert theirs == ours
    prompt = reader.apply_chat_template(
        messages, tools=tools or None, add_generation_prompt=True, return_dict=False
    )
    begin = [] if tools else [tokenizer.control_ids["<|assistant|>"]]
    assert prompt == ours[:-1] + begin


def test_an_answer_ends_generation_in_transformers(reader: PreTrainedTokenizerFast) -> None:
    assert reader.eos_token == "<|end|>"
    assert reader.decode(reader.encode("a b"), skip_special_tokens=True) == "a b"
    assert set(CONTROL_TOKENS) <= set(reader.all_special_tokens)


@settings(max_examples=60, deadline=None)
@given(content=st.lists(st.sampled_from(CONTROL_TOKENS) | st.text(max_size=4)).map("".join))
def test_imitated_control_tokens_stay_text_in_every_field(
    tokenizer: DocumentTokenizer, content: str
) -> None:
    document = chat_document({
        "tools": [{"name": content}],
        "messages": [
            {"role": "user", "content": content},
            {"role": "assistant", "tool_calls": [
                {"function": {"name": "f", "arguments": {"x": content}}}]},
            {"role": "tool", "content": content or "-"},
        ],
    })
    [ids] = tokenizer.encode([document])
    control = [i for i in ids if i in tokenizer.control_ids.values()]
    assert [tokenizer.decode([i]) for i in control] == [
        "<|tools|>", "<|end|>", "<|user|>", "<|end|>", "<|tool_call|>", "<|end|>", "<|tool|>",
        "<|end|>", "<|endoftext|>",
    ]


def spoken(document: Document) -> list[tuple[Role, Any]]:
    return [
        (m.role, json.loads(m.content) if m.role in (Role.TOOLS, Role.TOOL_CALL) else m.content)
        for m in document.messages
    ]


def test_xlam_declares_asks_and_calls() -> None:
    tools = [{"name": "live_giveaways", "parameters": {"type": {"type": "str"}}}]
    calls = [{"name": "live_giveaways", "arguments": {"type": "beta"}},
             {"name": "live_giveaways", "arguments": {"type": "game"}}]
    record = {"id": 0, "query": "Where?", "tools": json.dumps(tools), "answers": json.dumps(calls)}
    assert spoken(xlam_document(record)) == [
        (Role.TOOLS, tools), (Role.USER, "Where?"),
        (Role.TOOL_CALL, calls[0]), (Role.TOOL_CALL, calls[1]),
    ]


@pytest.mark.parametrize(("text", "calls"), [
    ('[Market Trends API(trend_type="MARKET_INDEXES", country="us")]',
     [{"name": "Market Trends API",
       "arguments": {"trend_type": "MARKET_INDEXES", "country": "us"}}]),
    ("[a.b(x=[1, 2], y={'k': 'v)'}), c()]",
     [{"name": "a.b", "arguments": {"x": [1, 2], "y": {"k": "v)"}}},
      {"name": "c", "arguments": {}}]),
    ("[f(s=\"it's (quoted)\")]", [{"name": "f", "arguments": {"s": "it's (quoted)"}}]),
    ("No function fits.", None),
    ("[broken(x=]", None),
    ("[positional(1)]", None),
    ("[f(x=1) and more]", None),
    ("[evil(x=__import__('os'))]", None),
])
def test_toolace_calls_are_read_and_the_rest_is_an_answer(
    text: str, calls: list[dict[str, Any]] | None
) -> None:
    tools = [{"name": "f", "description": "does", "parameters": {}, "required": None}]
    record = {
        "system": f"You are an expert. The functions:\n{json.dumps(tools)}. \nNo text",
        "conversations": [{"from": "user", "value": "Do."}, {"from": "assistant", "value": text},
                          {"from": "tool", "value": "[1]"}],
    }
    answer = [(Role.ASSISTANT, text)] if calls is None else [(Role.TOOL_CALL, c) for c in calls]
    assert spoken(toolace_document(record)) == [
        (Role.TOOLS, tools), (Role.USER, "Do."), *answer, (Role.TOOL, "[1]"),
    ]


CALL = {"name": "f", "arguments": {"x": 1}}


@pytest.mark.parametrize("record", [
    {"tools": [{"name": "f"}], "messages": [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": part} for part in ("Do", ".")]},
        {"role": "assistant", "content": None, "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}]},
        {"role": "tool", "content": "2", "tool_call_id": "1"},
        {"role": "assistant", "content": "Two."}]},
    {"tools": [{"name": "f"}], "system": "Be brief.", "messages": [
        {"role": "user", "content": "Do."},
        {"role": "assistant", "content": "", "function_call": CALL},
        {"role": "function", "name": "f", "content": "2"},
        {"role": "assistant", "content": "Two."}]},
    {"id": "a", "tools": '[{"name": "f"}]', "conversations": [
        {"from": "system", "value": "Be brief."}, {"from": "human", "value": "Do."},
        {"from": "function_call", "value": json.dumps(CALL)},
        {"from": "observation", "value": "2"}, {"from": "gpt", "value": "Two."}]},
], ids=["tool_calls", "function_call", "sharegpt"])
def test_a_chat_is_the_same_in_whichever_form_it_is_written(record: dict[str, Any]) -> None:
    assert spoken(chat_document(record)) == [
        (Role.TOOLS, [{"name": "f"}]), (Role.SYSTEM, "Be brief."), (Role.USER, "Do."),
        (Role.TOOL_CALL, CALL), (Role.TOOL, "2"), (Role.ASSISTANT, "Two."),
    ]


@pytest.mark.parametrize(("record", "says"), [
    ({"prompt": "a"}, "a chat has messages, .* found prompt"),
    ({"messages": None}, "found messages"),
    ({"messages": ["a"]}, "message 1 has no role: found str"),
    ({"messages": [{"role": "user", "content": "a"}, {"content": "b"}]},
     "message 2 has no role: found content"),
    ({"messages": [{"role": "narrator", "content": "a"}]}, "unknown speaker 'narrator'; known"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
     "a part of a message is 'image_url'; only text"),
    ({"messages": [{"role": "assistant", "tool_calls": [
        {"function": {"name": "f", "arguments": "x: 1"}}]}]}, "arguments is not JSON"),
    ({"conversations": [{"from": "function_call", "value": "f(1)"}]}, "function_call is not JSON"),
    ({"conversations": [{"from": "function_call"}]}, "function_call is NoneType, not JSON"),
])
def test_a_record_that_is_no_chat_says_why(record: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        chat_document(record)


def test_a_prompt_has_a_completion() -> None:
    document = prompt_document({"prompt": "a", "completion": "b", "licence": "MIT"})
    assert spoken(document) == [(Role.USER, "a"), (Role.ASSISTANT, "b")]


SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.mark.skipif(not (SHARED / "p3_subset").is_dir(), reason="no P3 beside the project")
def test_real_prompts_become_documents(tokenizer: DocumentTokenizer) -> None:
    lines = (SHARED / "p3_subset" / "p3_subset.jsonl").read_text(encoding="utf-8").splitlines()
    documents = [prompt_document(json.loads(line)) for line in lines[:500]]
    for document, ids in zip(documents, tokenizer.encode(documents), strict=True):
        asked, answer = (message.content for message in document.messages)
        assert tokenizer.decode(ids) == (
            f"<|user|>{asked}<|end|><|assistant|>{answer}<|end|><|endoftext|>"
        )
