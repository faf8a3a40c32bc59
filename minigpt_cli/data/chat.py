"""Chat templates: from a conversation to its text, and to the parts of it that are trained on.

A template is a Jinja program that a model's tokenizer brings. It comes from the Hub as data does,
so it runs in Jinja's sandbox; what it may use is what transformers gives it.
"""

import json
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minigpt_cli.core.errors import UserError, first_line

if TYPE_CHECKING:
    from jinja2 import Template

Messages = list[dict[str, Any]]

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

_TEMPLATE = "chat_template.jinja"
_CONFIG = "tokenizer_config.json"
_SPECIAL = "special_tokens_map.json"


def tokenizer_template(folder: Path) -> str | None:
    """Return the chat template of a Hugging Face directory's tokenizer, None when it has none.

    ``chat_template.jinja`` counts more than ``tokenizer_config.json``; of several templates the one
    named ``default`` counts. Raises ``UserError`` for files that can't be read.
    """
    try:
        return (folder / _TEMPLATE).read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{folder / _TEMPLATE} can't be read: {first_line(error)}") from None
    found = _object(folder / _CONFIG).get("chat_template")
    if isinstance(found, list):
        named = [entry for entry in found if isinstance(entry, dict)]
        found = next((e.get("template") for e in named if e.get("name") == "default"), None)
    if found is not None and not isinstance(found, str):
        raise UserError(
            f"{folder / _CONFIG}: chat_template is not text but {type(found).__name__}; "
            "give the template in a file of its own"
        )
    return found


def special_tokens(folder: Path) -> dict[str, str]:
    """Return the special tokens of a Hugging Face directory as the variables that templates use:
    ``{"bos_token": "<s>", ...}``; empty when it names none.

    ``special_tokens_map.json`` counts only beside a ``tokenizer_config.json`` that doesn't list its
    added tokens, as older ones don't: so transformers reads them. Raises ``UserError`` for files
    that can't be read.
    """
    entries = _object(folder / _CONFIG)
    if "added_tokens_decoder" not in entries:
        entries = entries | _object(folder / _SPECIAL)
    tokens = {}
    for name, value in entries.items():
        text = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(text, str):
            tokens[name] = text
    return tokens


def check_template(template: str) -> None:
    """Raise ``UserError`` when the template can't be parsed."""
    _compiled(template)


def render(
    template: str,
    messages: Messages,
    *,
    add_generation_prompt: bool = False,
    variables: dict[str, str] | None = None,
    now: datetime | None = None,
) -> str:
    """Return what transformers' ``apply_chat_template(tokenize=False)`` gives.

    ``variables`` are what the template may use besides the messages, above all `special_tokens`;
    ``now`` is the time that ``strftime_now`` tells. Raises ``UserError`` for a template that can't
    be parsed, or that refuses these messages.
    """
    compiled = _compiled(template)
    time = now or datetime.now()
    try:
        return compiled.render(
            {
                **(variables or {}),
                "messages": messages,
                "tools": None,
                "documents": None,
                "add_generation_prompt": add_generation_prompt,
                "strftime_now": lambda form: time.strftime(form),
            }
        )
    except Exception as error:  # a template is a program, and fails as programs do
        raise UserError(f"the chat template refuses a conversation: {first_line(error)}") from None


def parts(
    template: str,
    messages: Messages,
    variables: dict[str, str] | None = None,
    now: datetime | None = None,
) -> list[tuple[str, bool]]:
    """Return the conversation's text cut into pieces of (text, whether it is trained on).

    Trained is what the model has to write: each assistant's message from where the generation
    prompt ends to where the message does, its end marker included. Joined, the pieces are
    ``render(messages)``; none is empty.

    Templates may show an earlier message in another way once others follow (Qwen3's leaves out the
    reasoning): such a message isn't what the model would have written, and isn't trained.

    Raises ``UserError`` when there is no assistant's message, or the last one can't be found in the
    text.
    """
    time = now or datetime.now()  # one for all renderings: midnight may come in between
    text = render(template, messages, variables=variables, now=time)
    answers = [i for i, message in enumerate(messages) if message.get("role") == "assistant"]
    if not answers:
        raise UserError("the conversation has no message of the role 'assistant'")
    pieces: list[tuple[str, bool]] = []
    at = 0
    for index in answers:
        try:
            prompt = render(
                template,
                messages[:index],
                add_generation_prompt=True,
                variables=variables,
                now=time,
            )
            until = text
            if index + 1 < len(messages):
                until = render(template, messages[: index + 1], variables=variables, now=time)
        except UserError:  # some refuse a conversation that doesn't begin with a user's message
            if index == answers[-1]:
                raise
            continue
        start, end = len(prompt), len(until)
        if at <= start < end and until.startswith(prompt) and text.startswith(until):
            pieces += [(text[at:start], False), (text[start:end], True)]
            at = end
        elif index == answers[-1]:
            raise UserError(
                "the chat template shows the last answer in another way than it begins one: "
                "what is to be trained on can't be told; use another template"
            )
    pieces.append((text[at:], False))
    return [piece for piece in pieces if piece[0]]


@lru_cache(maxsize=8)
def _compiled(template: str) -> "Template":
    import jinja2
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """``{% generation %}`` marks what transformers' assistant mask covers: no text here."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            # A block with a scope of its own, as it is in transformers
            return nodes.CallBlock(self.call_method("_text"), [], [], body).set_lineno(line)

        def _text(self, caller: Any) -> str:
            return str(caller())

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson  # Jinja's own escapes HTML
    environment.globals["raise_exception"] = raise_exception
    try:
        return environment.from_string(template)
    except jinja2.TemplateError as error:
        line = getattr(error, "lineno", None)
        where = "" if line is None else f" (line {line})"
        raise UserError(
            f"the chat template can't be parsed: {first_line(error)}{where}; mend it or use another"
        ) from None


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _object(file: Path) -> dict[str, Any]:
    """Return the JSON object in a file, an empty one when there is no file."""
    try:
        content = json.loads(file.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"{file} can't be read: {first_line(error)}") from None
    if not isinstance(content, dict):
        raise UserError(f"{file} doesn't hold a JSON object but {type(content).__name__}")
    return content
