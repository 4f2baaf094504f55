"""How messages become a prompt: the model's own Jinja template, in a sandbox that can change nothing.

Only the template of the checkpoint is ever run; clients send values, never code. It sees what Hugging Face's
templates expect: raise_exception, strftime_now, tojson without HTML escapes, loop controls, generation blocks.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import NoReturn

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment

from core.errors import CheckpointError, InvalidRequest
from router.call import Conversation

MAX_SHOWN_CHARS = 200
OWN_NAMES = ("messages", "tools", "documents", "add_generation_prompt")


class ChatTemplate:
    """One compiled template, with the special tokens that it may name."""

    def __init__(self, source: str, special_tokens: Mapping[str, str], now: Callable[[], datetime]) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda form: now().strftime(form)
        self._special_tokens = dict(special_tokens)
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise CheckpointError(f"the chat template does not compile: {error}") from error

    def render(self, conversation: Conversation) -> str:
        """The prompt's text. Raises InvalidRequest when the template refuses the messages."""
        for name in conversation.template_values:
            if name in OWN_NAMES or name in self._special_tokens:
                param = f"chat_template_kwargs.{name}"
                raise InvalidRequest(f"{param}: is set by the server", param=param)
        values = self._special_tokens | dict(conversation.template_values)
        try:
            return self._template.render(
                values,
                messages=[dict(message) for message in conversation.messages],
                tools=None,
                documents=None,
                add_generation_prompt=conversation.add_generation_prompt,
            )
        except TemplateError as error:
            raise InvalidRequest(
                f"messages: the chat template refuses them: {str(error)[:MAX_SHOWN_CHARS]}", param="messages"
            ) from error
        except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
            # What a template does to values that it does not expect; its text may quote the prompt.
            raise InvalidRequest("messages: the chat template cannot render them", param="messages") from error


class _Generation(Extension):
    """{% generation %} marks what the assistant said, for training. Here its body is text like any other."""

    tags = {"generation"}  # noqa: RUF012  (jinja2 declares it as a set)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Macro) -> str:
        return str(caller())


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
