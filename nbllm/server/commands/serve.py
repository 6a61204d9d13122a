"""`nbllm serve`: an OpenAI-compatible server in a process of its own."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import threading
from typing import Any

from nbllm.server.commands.engine_options import add_engine_arguments, llm_options, read_config

_DEFAULT_HOST = "localhost"
_DEFAULT_PORT = 8000
_PASSED_ON = (
    "allowed_hosts",
    "max_concurrent_requests",
    "tool_call_parser",
    "reasoning_parser",
    "metrics_prefix",
    "uds",
    "ssl_keyfile",
    "ssl_certfile",
    "ssl_ca_certs",
    "root_path",
    "allowed_origins",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `nbllm serve`; under vLLM's names."""
    parser.add_argument("--host", help=f"address to listen on; default: {_DEFAULT_HOST}")
    parser.add_argument("--port", type=int, help=f"default: {_DEFAULT_PORT}; 0 takes a free one")
    parser.add_argument("--uds", help="path of a Unix socket, instead of host and port")
    parser.add_argument("--ssl-keyfile", help="key of the certificate, if it is in another file")
    parser.add_argument("--ssl-certfile", help="certificate in PEM form: the server speaks HTTPS")
    parser.add_argument("--ssl-ca-certs", help="authorities of the certificates of clients")
    parser.add_argument("--root-path", help="path under which a proxy shows the server")
    parser.add_argument(
        "--api-key",
        nargs="+",
        help="keys, any of which lets a client in; default: $NBLLM_API_KEY or $VLLM_API_KEY, or "
        "nobody is asked for one",
    )
    parser.add_argument("--served-model-name", help="what clients call the model")
    parser.add_argument("--allowed-hosts", nargs="+", help="names of this server; * is any")
    parser.add_argument(
        "--allowed-origins", nargs="+", help="origins of web pages that may ask; * is any"
    )
    parser.add_argument("--max-concurrent-requests", type=int, help="default: 1024")
    parser.add_argument("--tool-call-parser", help="default: by the model's chat template")
    parser.add_argument("--reasoning-parser", help="deepseek_r1 or qwen3")
    parser.add_argument("--metrics-prefix", help="of the names in /metrics: nbllm or vllm")
    parser.add_argument(
        "--shutdown-timeout", type=float, help="seconds that requests get to end; default: 30"
    )
    add_engine_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Serve until the process is told to end (SIGTERM, SIGINT); returns 0."""
    from nbllm.llm import LLM
    from nbllm.server.serve import serve

    read_config(arguments)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    told_to_end = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: told_to_end.set())
    with LLM(**llm_options(arguments)) as llm:
        server = serve(llm, **_server_options(arguments))
        over = "" if server.uds is None else f" over {server.uds}"
        sys.stdout.write(f"nbllm serves {llm.model_name} on {server.base_url}{over}\n")
        sys.stdout.flush()
        told_to_end.wait()
        sys.stdout.write("ending; requests that run are answered\n")
        timeout_s = arguments.shutdown_timeout
        server.stop(30.0 if timeout_s is None else timeout_s)
    return 0


def _server_options(arguments: argparse.Namespace) -> dict[str, Any]:
    environment = os.environ.get
    given = {name: getattr(arguments, name) for name in (*_PASSED_ON, "host", "port")}
    defaults = {} if arguments.uds else {"host": _DEFAULT_HOST, "port": _DEFAULT_PORT}
    return {
        **defaults,
        "api_key": arguments.api_key
        or environment("NBLLM_API_KEY")
        or environment("VLLM_API_KEY")
        or None,
        "model_name": arguments.served_model_name,
        **{name: value for name, value in given.items() if value not in (None, "")},
    }
