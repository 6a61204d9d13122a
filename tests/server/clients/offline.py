"""Runs a program that may reach this machine only: `python offline.py PROGRAM`.

Whatever looks a name up or connects elsewhere gets an error, and the program fails at its end, even
if a thread of some library swallowed the error.
"""

from __future__ import annotations

import os
import runpy
import sys
from typing import Any

_LOOPBACK = ("127.0.0.1", "::1", "localhost")
_elsewhere: list[str] = []


def _watch(event: str, args: tuple[Any, ...]) -> None:
    if event == "socket.getaddrinfo":
        host = args[0]
    elif event in ("socket.connect", "socket.sendto") and isinstance(args[1], tuple):
        host = args[1][0]
    else:
        return
    host = host.decode() if isinstance(host, bytes) else host
    if host is not None and host not in _LOOPBACK:
        _elsewhere.append(f"{event} {host}")
        raise ConnectionRefusedError(f"{host} is not this machine")


if __name__ == "__main__":
    sys.addaudithook(_watch)
    sys.argv.pop(0)
    runpy.run_path(sys.argv[0], run_name="__main__")
    if _elsewhere:
        print(f"reached for the network: {_elsewhere}", file=sys.stderr, flush=True)
        os._exit(3)
