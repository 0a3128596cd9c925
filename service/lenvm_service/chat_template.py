"""Which optional parts of a chat the served model's template reads: those that change the prompt's token ids."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Mapping
from typing import Any

from .fields import ROLES, TEMPLATE_SWITCHES

Chat = Mapping[str, Any]

_USER = {"role": "user", "content": "a"}
_CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
_RESULT = {"role": "tool", "tool_call_id": "1", "content": "b"}


async def find_read_parts(render: Callable[[Chat], Awaitable[object]]) -> frozenset[str]:
    """``chat_template_kwargs.NAME``, ``ROLE.name`` and ``reasoning_content``, as far as the template reads them.

    ``render`` gives the prompt that a chat becomes, or None where the template refuses the chat.
    """
    found = set()
    for part, one, other in _probes():
        if part not in found:
            prompts = [await render(chat) for chat in (one, other)]
            if prompts[0] is not None and prompts[0] != prompts[1]:
                found.add(part)
    return frozenset(found)


def unread_parts(body: Mapping[str, Any], read: frozenset[str]) -> Iterator[str]:
    """The fields of a chat body that the template does not read."""
    for name in body.get("chat_template_kwargs", {}):
        if f"chat_template_kwargs.{name}" not in read:
            yield f"chat_template_kwargs.{name}"
    for index, message in enumerate(body.get("messages", [])):
        if message.get("name") is not None and f"{message['role']}.name" not in read:
            yield f"messages[{index}].name"
        if message.get("reasoning_content") is not None and "reasoning_content" not in read:
            yield f"messages[{index}].reasoning_content"


def _probes() -> Iterator[tuple[str, Chat, Chat]]:
    """A part, and two chats that differ in it alone."""
    for switch in TEMPLATE_SWITCHES:
        one, other = ({"messages": [_USER], "chat_template_kwargs": {switch: value}} for value in (True, False))
        yield f"chat_template_kwargs.{switch}", one, other
    for role in ROLES:
        yield f"{role}.name", _conversation(role, name="n"), _conversation(role)
    for calls in ({}, {"tool_calls": [_CALL]}):
        with_reasoning = _conversation("assistant", **calls, reasoning_content="r")
        yield "reasoning_content", with_reasoning, _conversation("assistant", **calls)


def _conversation(role: str, **fields: Any) -> Chat:
    """A conversation with a message of that role that has those fields."""
    if role == "user":
        messages = [{**_USER, **fields}]
    elif role == "tool":
        messages = [_USER, {"role": "assistant", "content": "c", "tool_calls": [_CALL]}, {**_RESULT, **fields}]
    elif role == "assistant":
        answer = {"role": role, "content": "c", **fields}
        messages = [_USER, answer, _RESULT if "tool_calls" in fields else _USER]
    else:
        messages = [{"role": role, "content": "s", **fields}, _USER]
    return {"messages": messages}
