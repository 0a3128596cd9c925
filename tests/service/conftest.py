"""A gateway in front of a scripted engine."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from fake_engine import FakeEngine
from gateway_client import GatewayClient


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
async def gateway(engine: FakeEngine) -> AsyncIterator[GatewayClient]:
    client = GatewayClient(engine)
    yield client
    await client.http.aclose()
