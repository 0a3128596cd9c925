"""Records of settings, kept beside what came of them: JSON that tells whether a run may go on with it."""

from __future__ import annotations

import json
from dataclasses import fields
from typing import Any

from pydantic import TypeAdapter


def fill_defaults(kind: Any, record: str) -> str:
    """A record (JSON) of settings of a dataclass ``kind``, and perhaps more, with what it is too old to have."""
    try:
        content = json.loads(record)
        names = {field.name for field in fields(kind)} & set(content)
        settings = TypeAdapter(kind).validate_python({name: content[name] for name in names})
    except ValueError:  # of a time with other settings, or damaged
        return record
    filled = TypeAdapter(kind).dump_python(settings, mode="json", include=names)
    return json.dumps({**content, **filled}, indent=2) + "\n"
