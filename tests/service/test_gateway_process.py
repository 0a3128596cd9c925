"""The process: what it imports, how it is configured, how it starts and stops."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from dataclasses import fields

import pytest

from lenvm_service.config import ConfigError, GatewayConfig, read_config


def test_imports_neither_torch_nor_sglang():
    code = "import sys, lenvm_service.__main__; print([m for m in ('torch', 'sglang', 'triton') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_imports_only_the_control_type_from_the_other_packages():
    code = (
        "import sys, lenvm_service.__main__; print(sorted(m for m in sys.modules if re.match('lenvm_(?!service)', m)))"
    )
    done = subprocess.run([sys.executable, "-c", f"import re; {code}"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['lenvm_runtime', 'lenvm_runtime.length_control']"


def test_flags_win_over_variables_over_defaults():
    environ = {"LENVM_PORT": "1", "LENVM_API_KEYS": " a, b,", "LENVM_HOST": "", "OTHER": "x"}
    config = read_config(["--port", "2", "--engine-url", "http://engine:1/", "--allow-remote-media", "TRUE"], environ)
    assert config == GatewayConfig(port=2, engine_url="http://engine:1", api_keys=("a", "b"), allow_remote_media=True)


@pytest.mark.parametrize(
    ("name", "raw"),
    [
        ("host", " "),
        ("port", "70000"),
        ("port", "http"),
        ("engine_url", "localhost:30000"),
        ("engine_url", "http://x/?a=1"),
        ("max_body_bytes", "0"),
        ("max_choices", "129"),
        ("max_concurrency", "-1"),
        ("retry_after_s", "1.5"),
        ("idle_timeout_s", "0"),
        ("idle_timeout_s", "nan"),
        ("idle_timeout_s", "soon"),
        ("allow_remote_media", "maybe"),
        ("log_level", "loud"),
    ],
)
def test_bad_value_names_its_source(name, raw):
    with pytest.raises(ConfigError, match=f"^LENVM_{name.upper()}: must "):
        read_config([], {f"LENVM_{name.upper()}": raw})
    with pytest.raises(ConfigError, match=f"^--{name.replace('_', '-')}: must "):
        read_config([f"--{name.replace('_', '-')}={raw}"], {})


def test_every_option_is_described():
    assert all(option.metadata["help"] for option in fields(GatewayConfig))


@pytest.mark.parametrize("arguments", [["--port", "x"], ["--unknown", "1"], ["--port"]])
def test_bad_flag_is_one_line_and_status_2(arguments):
    done = subprocess.run([sys.executable, "-m", "lenvm_service", *arguments], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_serves_and_stops_cleanly(signum):
    command = [sys.executable, "-m", "lenvm_service", "--port", "0", "--engine-url", "http://127.0.0.1:9"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "NO_COLOR": "1"})
    try:
        assert process.stderr is not None
        for line in process.stderr:
            if found := re.search(r"http://127\.0\.0\.1:(\d+)", line):
                break
        assert urllib.request.urlopen(f"http://127.0.0.1:{found[1]}/health").status == 200
        started = time.monotonic()
        process.send_signal(signum)
        assert process.wait(10) == 0
        assert time.monotonic() - started < 5
    finally:
        process.kill()
        process.communicate()
