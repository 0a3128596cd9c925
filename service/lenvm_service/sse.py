"""Server-sent events as bytes: split without re-encoding."""

from __future__ import annotations

SEPARATOR = b"\n\n"
DONE = b"data: [DONE]\n\n"
DATA = b"data: "


class EventSplitter:
    """Cuts a byte stream into whole events, separators included. Concatenated, they are the input unchanged."""

    __slots__ = ("_rest",)

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[bytes]:
        """The events that ``data`` completes; an unfinished one is kept for the next call."""
        data = self._rest + data if self._rest else data
        first_end = data.find(SEPARATOR)
        if first_end == len(data) - 2 and first_end >= 0:  # one event a read: the usual case
            self._rest = b""
            return [data]
        *events, self._rest = data.split(SEPARATOR)
        return [event + SEPARATOR for event in events]
