"""Compile and render chat templates. Only ``data/untrusted.py`` calls this, in a child process.

A template is a Jinja program that comes with a model's tokenizer. It runs in Jinja's sandbox, and
gets the variables and functions that transformers gives it.
"""

import json
from datetime import datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from minigpt_cli.core.child import Refusal, failure
from minigpt_cli.core.errors import UserError

if TYPE_CHECKING:
    from jinja2 import Template

Messages = list[dict[str, Any]]

_LONGEST = 1_000_000  # characters of a text, besides 20 for each of the conversation


def render_template(
    template: str,
    messages: Messages,
    add_generation_prompt: bool,
    variables: dict[str, str],
    now: datetime,
) -> str:
    """Render a conversation; see ``chat.render``.

    Raises:
        Refusal: The template refuses the conversation.
        UserError: The template can't be parsed, or calls itself too deeply.
        MemoryError: It takes too much memory.
    """
    compiled = compile_template(template)
    try:
        text = compiled.render(
            {
                **variables,
                "messages": messages,
                "tools": None,
                "documents": None,
                "add_generation_prompt": add_generation_prompt,
                "strftime_now": lambda form: now.strftime(form),
            }
        )
    except (MemoryError, RecursionError):  # of the template, whatever the conversation
        raise
    except Exception as error:  # a template is a program that can raise anything
        raise Refusal(f"the chat template refuses a conversation: {failure(error)}") from None
    if len(text) > _LONGEST + 20 * len(json.dumps(messages)):
        raise Refusal(f"the chat template makes {len(text):,} characters of a conversation")
    return text


def template_parts(
    template: str, messages: Messages, variables: dict[str, str], now: datetime
) -> list[tuple[str, bool]]:
    """Render a conversation and cut its text into parts; see ``chat.masked_parts``."""
    text = render_template(template, messages, False, variables, now)
    answers = [i for i, message in enumerate(messages) if message.get("role") == "assistant"]
    if not answers:
        raise Refusal("the conversation has no message of the role 'assistant'")
    pieces: list[tuple[str, bool]] = []
    at = 0
    for index in answers:
        try:
            prompt = render_template(template, messages[:index], True, variables, now)
            until = text
            if index + 1 < len(messages):
                until = render_template(template, messages[: index + 1], False, variables, now)
        except Refusal:  # some templates refuse a conversation without a user's message
            if index == answers[-1]:
                raise
            continue
        start, end = len(prompt), len(until)
        if at <= start < end and until.startswith(prompt) and text.startswith(until):
            pieces += [(text[at:start], False), (text[start:end], True)]
            at = end
        elif index == answers[-1]:
            raise Refusal(
                "the chat template renders the last assistant message differently from its "
                "generation prompt, so no loss mask can be built: use another template"
            )
    pieces.append((text[at:], False))
    return [piece for piece in pieces if piece[0]]


@lru_cache(maxsize=8)
def compile_template(template: str) -> "Template":
    """Compile a template.

    Raises:
        UserError: It can't be parsed.
        MemoryError: It takes too much memory; Jinja computes constants here.
    """
    import jinja2
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """Accept ``{% generation %}``, which marks transformers' assistant mask."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            # A block with its own scope, as in transformers
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
    except (MemoryError, RecursionError):
        raise
    except Exception as error:  # Python's compiler refuses some of what Jinja makes of a template
        is_jinjas = isinstance(error, jinja2.TemplateError)
        line = getattr(error, "lineno", None) if is_jinjas else None
        where = "" if line is None else f" (line {line})"
        raise UserError(
            f"the chat template can't be parsed: {failure(error)}{where}: correct it, "
            "or use another"
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
