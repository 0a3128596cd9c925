"""Prometheus itself, with the shipped configuration, scrapes the running gateway."""

from __future__ import annotations

import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from lenvm_runtime.serve import Stack, free_port

PROMETHEUS = shutil.which("prometheus")
CONFIG = Path(__file__).parents[2] / "deploy/prometheus/prometheus.yml"

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(PROMETHEUS is None, reason="needs prometheus (Debian: prometheus)"),
]


def test_shipped_configuration_collects_the_gateways_series(
    stack: Stack, client: openai.OpenAI, model_name: str, tmp_path: Path
) -> None:
    client.completions.create(model=model_name, prompt="One, two,", max_tokens=4)
    config = CONFIG.read_text().replace("127.0.0.1:8000", stack.gateway_url.removeprefix("http://"))
    assert "15s" in config
    (tmp_path / "prometheus.yml").write_text(config.replace("15s", "1s"))
    address = f"127.0.0.1:{free_port()}"
    arguments = [f"--config.file={tmp_path}/prometheus.yml", f"--storage.tsdb.path={tmp_path}/data"]
    server = subprocess.Popen(
        [str(PROMETHEUS), *arguments, f"--web.listen-address={address}"], stderr=subprocess.DEVNULL
    )
    try:
        assert wait_for_value(address, 'up{job="lenvm"}') == 1
        assert wait_for_value(address, "lenvm_engine_up") == 1
        assert wait_for_value(address, "sum(lenvm_generation_tokens_total)") >= 4
        assert wait_for_value(address, 'lenvm_requests_total{route="/v1/completions",status="200"}') >= 1
    finally:
        server.kill()
        server.wait(20)


def wait_for_value(address: str, query: str) -> float:
    """The query's one value, once Prometheus has it."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        result = ask(address, query)
        if result and float(result[0]["value"][1]):
            return float(result[0]["value"][1])
        time.sleep(0.5)
    raise AssertionError(f"Prometheus has no value of {query}")


def ask(address: str, query: str) -> list[Any]:
    try:
        response = httpx.get(f"http://{address}/api/v1/query", params={"query": query})
    except httpx.TransportError:
        return []
    return response.json()["data"]["result"] if response.status_code == 200 else []
