"""What an engine says about its load."""

from __future__ import annotations

import time

import httpx


def engine_is_idle(engine_url: str) -> bool:
    """No request runs or waits, and no KV slot is in use but those that the prefix cache may give up."""
    loads = httpx.get(f"{engine_url}/v1/loads", timeout=30).json()["loads"]
    assert loads
    return not any(
        load["num_running_reqs"] or load["num_waiting_reqs"] or load["num_used_tokens"] or any(load["queues"].values())
        for load in loads
    )


def wait_until_idle(engine_url: str, timeout_s: float = 20) -> None:
    """Fails when the engine is still busy then."""
    deadline = time.monotonic() + timeout_s
    while not engine_is_idle(engine_url):
        assert time.monotonic() < deadline, "the engine is still busy"
        time.sleep(0.2)
