"""A server in a process of its own, which tells what CPU time it has used.

`python -m nbllm.bench.server_process nbllm --port 0` is `nbllm serve --port 0`, in which one thread
more answers on standard input and output. `... transformers` is the peer of `fastapi_peer`.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import signal
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Sequence

from nbllm.bench.cpu_times import CpuTimes, count_hand_over
from nbllm.errors import NbllmError

_LISTENS = re.compile(r"\bon (http://\S+)/v1\b")
_ANSWER_TIMEOUT_S = 30.0
_STOP_TIMEOUT_S = 40.0


class ServerProcess:
    """Starts a server and waits until it is healthy; leaving the context ends it.

    Args:
        kind: "nbllm" or "transformers".
        arguments: of its command line, without host and port.

    Attributes:
        url: http://host:port.
        api_key: made for this process.
        process: the process itself.

    Raises:
        NbllmError: it ended before it listened; it has said why on standard error.
    """

    def __init__(self, kind: str, arguments: Sequence[str]) -> None:
        self.api_key = secrets.token_urlsafe(16)
        command = [sys.executable, "-m", __name__, kind, "--host", "127.0.0.1", "--port", "0"]
        self.process = subprocess.Popen(
            [*command, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"NBLLM_API_KEY": self.api_key},
        )
        try:
            self.url = self._wait_until_healthy(kind)
        except BaseException:
            self.stop()
            raise

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

    def cpu_times(self) -> CpuTimes:
        """What it has used by now.

        Raises:
            NbllmError: it has ended.
        """
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write("\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise NbllmError("the server has ended") from None
        for line in self.process.stdout:
            if line.startswith("{"):
                return CpuTimes(**json.loads(line))
        raise NbllmError("the server has ended")

    def stop(self) -> None:
        """End it. Idempotent."""
        self.process.terminate()
        try:
            self.process.wait(_STOP_TIMEOUT_S)
        except BaseException:  # it hangs, or the user is in a hurry
            self.process.kill()
            self.process.wait()
            raise
        finally:
            for pipe in (self.process.stdin, self.process.stdout):
                assert pipe is not None
                pipe.close()

    def _wait_until_healthy(self, kind: str) -> str:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            found = _LISTENS.search(line)
            if found is not None:
                # A connection waits in the socket's queue until the server takes it.
                with urllib.request.urlopen(f"{found[1]}/health", timeout=_ANSWER_TIMEOUT_S):
                    return found[1]
        raise NbllmError(f"the server of {kind} ended before it listened")


def main(arguments: Sequence[str]) -> int:
    """Run the server that `arguments` name; returns its exit status."""
    kind, *rest = arguments
    threading.Thread(target=_answer, name="cpu-times", daemon=True).start()
    if kind == "nbllm":
        from nbllm.cli import main as nbllm
        from nbllm.engine.request_stream import RequestStream

        RequestStream.put = count_hand_over(RequestStream.put)  # type: ignore[method-assign]
        return nbllm(["serve", *rest])
    from nbllm.bench.fastapi_peer import main as peer

    return peer(rest)


def _answer() -> None:
    """Write the CPU times for each byte that comes; end the process when its parent has."""
    while os.read(0, 1):  # not sys.stdin, whose lock would be taken at the interpreter's end
        now = CpuTimes.now()
        sys.stdout.write(json.dumps({"process": now.process, "server": now.server}) + "\n")
        sys.stdout.flush()
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
