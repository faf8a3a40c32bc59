"""Chat templates: transformers is the oracle for the text and for what the assistant wrote."""

import json
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minigpt_cli.core.errors import UserError
from minigpt_cli.data.chat import (
    CHATML,
    check_template,
    masked_parts,
    render,
    special_tokens,
    tokenizer_template,
)
from minigpt_cli.data.tokenizer import load_tokenizer
from minigpt_cli.prepare.bpe import train_bpe
from tests.helpers.processes import ROOT

LLAMA3 = (
    "{{- bos_token }}\n"
    "{%- for message in messages %}\n"
    "    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'"
    "+ message['content'] | trim + '<|eot_id|>' }}\n"
    "{%- endfor %}\n"
    "{%- if add_generation_prompt %}\n"
    "    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}\n"
    "{%- endif %}\n"
)
MISTRAL = """{{ bos_token }}{% for message in messages %}
  {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('roles must alternate user/assistant/user/assistant/...') }}
{% endif %}
{% if message['role'] == 'user' %}
{{ '[INST] ' + message['content'] + ' [/INST]' }}{% else %}
{{ message['content'] + eos_token }}{% endif %}
{% endfor %}"""
TOOLS = """{# a comment #}
{%- if strftime_now is defined %}{{ 'Year ' ~ strftime_now('%Y') ~ '\\n' }}{% endif %}
{% for message in messages %}
  {%- if loop.index > 50 %}{% break %}{% endif %}
{{ message | tojson }}
{{ message.content | tojson(indent=2) }}{{ ({'b': 1, 'a': '<é>'}) | tojson(sort_keys=true) }}
{% endfor %}
{% if add_generation_prompt %}{{ '{"role": "assistant", "content": ' }}{% endif %}"""
GENERATION = """{%- for message in messages %}
{%- if message['role'] == 'assistant' %}
{{- '<|im_start|>assistant\\n' }}{% generation %}{{ message['content'] + '<|im_end|>\\n' }}\
{% endgeneration %}
{%- else %}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
# As Qwen3's does: reasoning is shown only after the last question
THINKING = """{%- set ns = namespace(last=0) %}
{%- for message in messages %}
{%- if message.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}
{%- endfor %}
{%- for message in messages %}
{%- set content = message.content %}
{%- if message.role == 'assistant' and loop.index0 < ns.last and '</think>' in content %}
{%- set content = content.split('</think>')[-1].lstrip('\\n') %}
{%- endif %}
{{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
TEMPLATES = {
    "chatml": CHATML,
    "llama3": LLAMA3,
    "mistral": MISTRAL,
    "tools": TOOLS,
    "generation": GENERATION,
    "thinking": THINKING,
}
VARIABLES = {"bos_token": "<s>", "eos_token": "</s>"}
SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]


def talk(*contents: str, first: str = "user") -> list[dict[str, Any]]:
    """A conversation of user and assistant in turn."""
    roles = ("user", "assistant") if first == "user" else ("assistant", "user")
    return [
        {"role": roles[i % 2], "content": content} for i, content in enumerate(contents)
    ]  # fmt: skip


FOUR = talk("Hi <b>&'\"é", "  Hello!\n", "and 2+2?", "4 \\o/")
THOUGHTS = talk("a?", "<think>\nhm\n</think>\n\nA.", "b?", "<think>\nso\n</think>\n\nB.")


@pytest.fixture(scope="module")
def reference() -> Any:
    """transformers' tokenizer around one of ours."""
    from transformers import PreTrainedTokenizerFast

    gpt2 = ROOT.parent / "shared" / "data" / "gpt2"
    if gpt2.is_dir():
        tokenizer = load_tokenizer(gpt2)
    else:
        tokenizer = train_bpe(iter(["some text, some words " * 30]), 280)
    tokenizer.add_special_tokens(SPECIAL)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **VARIABLES)


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("prompt", [False, True])
@pytest.mark.parametrize("messages", [FOUR, FOUR[:1], FOUR[:3], THOUGHTS], ids=len)
def test_rendered_text_is_that_of_transformers(
    reference: Any, name: str, prompt: bool, messages: list[dict[str, Any]]
) -> None:
    text = render(
        TEMPLATES[name], messages, add_generation_prompt=prompt, variables=VARIABLES
    )  # fmt: skip
    assert messages[0]["content"][:2] in text
    assert text == reference.apply_chat_template(
        messages, chat_template=TEMPLATES[name], tokenize=False, add_generation_prompt=prompt
    )


content = st.text(st.characters(codec="utf-8"), max_size=12) | st.sampled_from(
    ["<think>x</think>", " a ", "{{ 1 }}", "<|im_end|>\n"]
)


@given(st.lists(content, min_size=2, max_size=7), st.sampled_from(sorted(TEMPLATES)))
def test_parts_are_cut_at_answers(contents: list[str], name: str) -> None:
    messages = talk(*contents)
    last = len(contents) // 2 * 2 - 1  # of the assistant's
    template = TEMPLATES[name]
    try:
        pieces = masked_parts(template, messages, VARIABLES)
    except UserError:
        # Only where a question after the last answer changes how that is shown
        assert name == "thinking"
        assert last < len(messages) - 1
        assert "</think>" in contents[last]
        return
    assert "".join(text for text, _ in pieces) == render(template, messages, variables=VARIABLES)
    assert all(text for text, _ in pieces)
    end = {"mistral": "</s>", "llama3": "<|eot_id|>"}.get(name, "<|im_end|>\n")
    strip = str.strip if name == "llama3" else str
    if name == "tools":
        assert sum(trained for _, trained in pieces) == (last + 1) // 2
    else:
        shown = [
            strip(messages[i]["content"]) + end
            for i in range(1, last + 1, 2)
            if not (name == "thinking" and "</think>" in contents[i] and i < len(messages) - 1)
        ]
        assert [text for text, trained in pieces if trained] == shown


def test_assistant_mask_of_transformers(reference: Any) -> None:
    messages = [{"role": "system", "content": "Be <|kind|>."}, *FOUR]
    expected = reference.apply_chat_template(
        messages,
        chat_template=GENERATION,
        return_assistant_tokens_mask=True,
        return_dict=True,
    )
    ids: list[int] = []
    mask: list[int] = []
    for text, trained in masked_parts(GENERATION, messages, VARIABLES):
        piece = reference(text, add_special_tokens=False)["input_ids"]
        ids += piece
        mask += [int(trained)] * len(piece)
    assert sum(mask) > 8
    assert ids == expected["input_ids"]
    assert mask == expected["assistant_masks"]


def test_answer_that_changes_later() -> None:
    pieces = masked_parts(THINKING, THOUGHTS)
    assert [text for text, trained in pieces if trained] == [
        "<think>\nso\n</think>\n\nB.<|im_end|>\n"
    ]
    assert "hm" not in "".join(text for text, _ in pieces)
    without = talk("a?", "A.", "b?", "B.")
    assert [text for text, trained in masked_parts(THINKING, without) if trained] == [
        "A.<|im_end|>\n",
        "B.<|im_end|>\n",
    ]


def test_answer_before_any_question() -> None:
    template = "{{ messages[0].role.upper() }}" + CHATML
    pieces = masked_parts(template, talk("Hello!", "Hi", "Bye", first="assistant"))
    assert [text for text, trained in pieces if trained] == ["Bye<|im_end|>\n"]
    with pytest.raises(UserError, match=r"refuses a conversation: .*has no element 0"):
        masked_parts(template, talk("Hello!", first="assistant"))


def test_template_hides_last_answer() -> None:
    upside_down = "{% for m in messages | reverse %}{{ m.content }}{% endfor %}"
    with pytest.raises(UserError, match="differently from its generation prompt"):
        masked_parts(upside_down, FOUR)
    with pytest.raises(UserError, match="no message of the role 'assistant'"):
        masked_parts(CHATML, FOUR[:1])


def test_time_stands_still_within_a_conversation() -> None:
    template = "{{ strftime_now('%f') }}" + CHATML
    pieces = masked_parts(template, FOUR)
    assert sum(trained for _, trained in pieces) == 2
    assert render("{{ strftime_now('%d %b') }}", [], now=datetime(2024, 7, 26)) == "26 Jul"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for %}", "can't be parsed: .*line 1"),
        ("a\n{% invalid_state %}", "can't be parsed: .*invalid_state.*line 2"),
        ("{{ messages[0].content.missing.again }}", "refuses a conversation"),
        ("{{ raise_exception('not\nthis') }}", "refuses a conversation: not$"),
        ("{{ messages.append(1) }}", "refuses a conversation"),
        ("{{ ''.__class__.__mro__ }}", "refuses a conversation"),
        ("{{ 1 // 0 }}", "refuses a conversation"),
        (MISTRAL, "roles must alternate"),
    ],
)
def test_a_bad_template_is_one_line(template: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        render(template, talk("a", "b", "c", first="assistant"), variables=VARIABLES)
    assert "\n" not in str(caught.value)


def test_a_template_is_checked_without_a_conversation() -> None:
    check_template(MISTRAL)
    with pytest.raises(UserError, match="can't be parsed"):
        check_template("{% if %}")


# What a tokenizer brings


def written(folder: Path, **files: Any) -> Path:
    for name, value in files.items():
        file = folder / (f"{name}.jinja" if name == "chat_template" else f"{name}.json")
        file.write_text(value if isinstance(value, str) else json.dumps(value))
    return folder


def saved(tmp_path: Path, reference: Any) -> Callable[..., Any]:
    """Write files beside a tokenizer.json and return what transformers reads there."""
    from transformers import PreTrainedTokenizerFast

    def load(**files: Any) -> Any:
        (tmp_path / "tokenizer.json").write_text(reference.backend_tokenizer.to_str())
        return PreTrainedTokenizerFast.from_pretrained(str(written(tmp_path, **files)))

    return load


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer_config": {"chat_template": "in config"}},
        {"tokenizer_config": {"chat_template": "in config"}, "chat_template": "in file\n\n"},
        {
            "tokenizer_config": {
                "chat_template": [
                    {"name": "tool_use", "template": "tools"},
                    {"name": "default", "template": "usual"},
                ]
            }
        },
        {"tokenizer_config": {}},
    ],
)
def test_the_template_is_the_one_transformers_takes(
    tmp_path: Path, reference: Any, files: dict[str, Any]
) -> None:
    theirs = saved(tmp_path, reference)(**files)
    expected = theirs.get_chat_template() if theirs.chat_template else None
    assert tokenizer_template(tmp_path) == expected


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer_config": {"bos_token": "<s>", "eos_token": {"content": "</s>"}}},
        {
            "tokenizer_config": {"bos_token": "<s>", "pad_token": None, "model_max_length": 5},
            "special_tokens_map": {
                "bos_token": "</s>",
                "unk_token": {"content": "<|im_end|>", "lstrip": False},
            },
        },
        {
            "tokenizer_config": {
                "bos_token": "<s>",
                "added_tokens_decoder": {"0": {"content": "!"}},
                "add_bos_token": True,
            },
            "special_tokens_map": {"bos_token": "</s>", "pad_token": "<s>"},
        },
        {"special_tokens_map": {"eos_token": "</s>"}},
    ],
)
def test_special_tokens_are_those_of_transformers(
    tmp_path: Path, reference: Any, files: dict[str, Any]
) -> None:
    for entry in files.get("tokenizer_config", {}), files.get("special_tokens_map", {}):
        for value in entry.values():
            if isinstance(value, dict) and "content" in value:
                value["__type"] = "AddedToken"
    if "special_tokens_map" in files:  # there it is told by the file
        for value in files["special_tokens_map"].values():
            if isinstance(value, dict):
                value.pop("__type", None)
    theirs = saved(tmp_path, reference)(**files).special_tokens_map
    found = special_tokens(tmp_path)
    assert found
    assert found == {name: text for name, text in theirs.items() if isinstance(text, str)}


def test_a_folder_without_a_tokenizer_brings_nothing(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "missing"):
        assert tokenizer_template(folder) is None
        assert special_tokens(folder) == {}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{", r"tokenizer_config\.json: can't be read"),
        ("[1]", "is not a JSON object"),
        ('{"chat_template": 5}', "chat_template is not text but int"),
        (b"\xff", r"tokenizer_config\.json: can't be read"),
    ],
)
def test_invalid_tokenizer_config(tmp_path: Path, config: str | bytes, message: str) -> None:
    data = config if isinstance(config, bytes) else config.encode()
    (tmp_path / "tokenizer_config.json").write_bytes(data)
    with pytest.raises(UserError, match=message):
        tokenizer_template(tmp_path)
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=r"chat_template\.jinja: can't be read"):
        tokenizer_template(tmp_path)
