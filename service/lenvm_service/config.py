"""The gateway's one configuration: defaults here, overridden by ``LENVM_*`` variables, then by flags."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import Field, dataclass, field, fields
from typing import Any, NoReturn
from urllib.parse import urlsplit

ENV_PREFIX = "LENVM_"
LOG_LEVELS = ("critical", "error", "warning", "info", "debug")


class ConfigError(ValueError):
    """A configuration value that the gateway cannot start with. The message names it and its range."""


def _text(raw: str) -> str:
    if not raw.strip():
        raise ConfigError("must not be empty")
    return raw.strip()


def _names(raw: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in raw.split(",") if name.strip())


def _url(raw: str) -> str:
    parts = urlsplit(raw.strip())
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise ConfigError(f"must be an http(s) URL without query, not '{raw}'")
    return raw.strip().rstrip("/")


def _level(raw: str) -> str:
    if raw not in LOG_LEVELS:
        raise ConfigError(f"must be one of {', '.join(LOG_LEVELS)}, not '{raw}'")
    return raw


def _switch(raw: str) -> bool:
    if raw.lower() not in ("true", "false", "1", "0"):
        raise ConfigError(f"must be true or false, not '{raw}'")
    return raw.lower() in ("true", "1")


def _integer(low: int, high: int) -> Callable[[str], int]:
    def parse(raw: str) -> int:
        try:
            number = int(raw)
        except ValueError:
            number = low - 1
        if not low <= number <= high:
            raise ConfigError(f"must be an integer from {low} to {high}, not '{raw}'")
        return number

    return parse


def _seconds(raw: str) -> float:
    try:
        number = float(raw)
    except ValueError:
        number = math.nan
    if not (math.isfinite(number) and number > 0):
        raise ConfigError(f"must be a number of seconds greater than 0, not '{raw}'")
    return number


def _option(default: Any, parse: Callable[[str], Any], text: str) -> Any:
    return field(default=default, metadata={"parse": parse, "help": text})


@dataclass(frozen=True, slots=True)
class GatewayConfig:
    """Everything that a gateway process can be told. Times are in seconds."""

    host: str = _option("127.0.0.1", _text, "address to listen on")
    port: int = _option(8000, _integer(0, 65535), "port to listen on (0: any free one)")
    engine_url: str = _option("http://127.0.0.1:30000", _url, "SGLang's OpenAI server")
    api_keys: tuple[str, ...] = _option((), _names, "comma-separated keys that /v1 requires (none: open)")
    model_alias: str = _option("", str.strip, "a second name for the served model")
    cors_origins: tuple[str, ...] = _option((), _names, "comma-separated origins that browsers may call from")
    allow_remote_media: bool = _option(False, _switch, "let the engine fetch http(s) image URLs sent by clients")
    max_body_bytes: int = _option(8 << 20, _integer(1, 1 << 30), "largest request body")
    max_choices: int = _option(32, _integer(1, 128), "largest n times number of prompts in one request")
    max_concurrency: int = _option(256, _integer(1, 1 << 20), "generation requests in flight")
    max_concurrency_per_key: int = _option(0, _integer(0, 1 << 20), "the same for each API key (0: no limit)")
    retry_after_s: int = _option(2, _integer(1, 3600), "Retry-After of 429 and 503 answers")
    body_timeout_s: float = _option(30.0, _seconds, "for a client to send its body")
    connect_timeout_s: float = _option(5.0, _seconds, "to connect to the engine")
    ready_timeout_s: float = _option(25.0, _seconds, "for the engine to answer a health check")
    first_event_timeout_s: float = _option(600.0, _seconds, "for the engine's first streamed event, queueing included")
    idle_timeout_s: float = _option(120.0, _seconds, "between two streamed events of the engine")
    request_timeout_s: float = _option(1800.0, _seconds, "for the engine to answer a request that does not stream")
    client_timeout_s: float = _option(60.0, _seconds, "for a client to take one streamed event")
    shutdown_timeout_s: float = _option(10.0, _seconds, "for open requests to finish once asked to stop")
    log_level: str = _option("info", _level, "one of " + ", ".join(LOG_LEVELS))


class _OneLineParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


def _flag(option: Field[Any]) -> str:
    return "--" + option.name.replace("_", "-")


def _parser() -> argparse.ArgumentParser:
    parser = _OneLineParser("lenvm_service", description="OpenAI-compatible gateway in front of SGLang with LenVM")
    for option in fields(GatewayConfig):
        text = f"{option.metadata['help']} ({ENV_PREFIX}{option.name.upper()}; default: {option.default!r})"
        parser.add_argument(_flag(option), metavar="VALUE", help=text.replace("%", "%%"))
    return parser


def read_config(argv: Sequence[str], environ: Mapping[str, str]) -> GatewayConfig:
    """The configuration from flags over ``LENVM_*`` variables over defaults.

    An empty variable counts as unset. Raises ConfigError naming the flag or variable and what it accepts.
    """
    flags = vars(_parser().parse_args(argv))
    values: dict[str, Any] = {}
    for option in fields(GatewayConfig):
        variable = ENV_PREFIX + option.name.upper()
        raw, source = flags[option.name], _flag(option)
        if raw is None:
            raw, source = environ.get(variable) or None, variable
        if raw is None:
            continue
        try:
            values[option.name] = option.metadata["parse"](raw)
        except ConfigError as error:
            raise ConfigError(f"{source}: {error}") from None
    return GatewayConfig(**values)
