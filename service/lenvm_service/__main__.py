"""``python -m lenvm_service``: serve the gateway until Ctrl-C or SIGTERM."""

from __future__ import annotations

import logging
import os
import signal
import sys

import uvicorn

from .app import build_app
from .config import ConfigError, GatewayConfig, read_config


def main() -> int:
    """Run the gateway. Returns the exit status: 2 for a bad configuration."""
    try:
        config = read_config(sys.argv[1:], os.environ)
    except ConfigError as error:
        print(f"lenvm_service: {error}", file=sys.stderr)
        return 2
    logging.basicConfig(level=config.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    # uvicorn raises the signal again once it has stopped: then that is a clean end
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    signal.signal(signal.SIGINT, lambda *_: sys.exit(0))
    server = uvicorn.Server(_server_config(config))
    server.run()
    return 0 if server.started else 1


def _server_config(config: GatewayConfig) -> uvicorn.Config:
    return uvicorn.Config(
        build_app(config),
        host=config.host,
        port=config.port,
        log_level=config.log_level,
        access_log=False,
        server_header=False,
        ws="none",
        timeout_graceful_shutdown=round(config.shutdown_timeout_s) or 1,
    )


if __name__ == "__main__":
    sys.exit(main())
