"""Forced tool calls that can end: the JSON schema that SGLang makes of the tools, closed.

SGLang's schema of a call has ``name`` and ``parameters`` and says neither that it is an object nor that nothing may
follow them. xgrammar adds that by itself. llguidance, the grammar backend on a CPU, takes a schema at its word: then
``false`` is a call, and a small model adds keys until it is cut.
"""

from __future__ import annotations

from typing import Any

from lenvm_runtime import compat


def register() -> None:
    """Close the schema of forced calls; parsers with a format of their own make none."""
    compat.after(compat.TOOL_CONSTRAINT, _close_constraint)


def close_calls(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema of a list of calls, each an object of ``name`` and ``parameters`` alone."""
    calls = schema["items"]
    each = calls.get("anyOf", [calls])
    return {**schema, "items": {"anyOf": [{"type": "object", **call, "additionalProperties": False} for call in each]}}


def _close_constraint(constraint: tuple[str, Any] | None, *_: Any, **__: Any) -> tuple[str, Any] | None:
    if constraint is None or constraint[0] != "json_schema":
        return None
    return "json_schema", close_calls(constraint[1])
