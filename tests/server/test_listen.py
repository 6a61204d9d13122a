"""Where a server listens: Unix sockets, TLS, paths of proxies, and web pages that may ask."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from nbllm import LLM, InvalidRequestError
from nbllm.server.commands.engine_options import read_config
from nbllm.server.commands.serve import _server_options, add_arguments
from nbllm.server.serve import Server

Send = Callable[..., tuple[int, dict[str, str], Any]]
BODY: dict[str, Any] = {"model": "nbllm-demo", "prompt": "Once upon a time", "max_tokens": 3}
PAGE = "https://nb.example"

needs_unix = pytest.mark.skipif(not hasattr(socket, "AF_UNIX"), reason="needs Unix sockets")


@pytest.fixture
def path() -> Iterator[Path]:
    """Of a socket, in a folder whose name is short enough for one."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder, "llm.sock")


@pytest.fixture(scope="module")
def pem(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two certificates that sign themselves, with their keys."""
    folder = tmp_path_factory.mktemp("tls")
    made: dict[str, Path] = {}
    for name in ("server", "client"):
        made[f"{name}_key"], made[name] = folder / f"{name}.key", folder / f"{name}.pem"
        command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
        command += ["-subj", f"/CN={name}.example", "-addext", "subjectAltName=DNS:localhost"]
        command += ["-keyout", str(made[f"{name}_key"]), "-out", str(made[name])]
        subprocess.run(command, check=True, capture_output=True)
    return made


def refused(llm: LLM, **options: Any) -> InvalidRequestError:
    """The error that serve() ends with."""
    with pytest.raises(InvalidRequestError) as caught:
        llm.serve(**options)
    return caught.value


# -- a Unix socket --------------------------------------------------------------------------------


@needs_unix
def test_a_unix_socket_is_served_and_its_file_goes_with_the_server(llm: LLM, path: Path) -> None:
    with llm.serve(uds=path) as server:
        assert (server.url, server.port, server.uds) == ("http://localhost", 0, str(path))
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert str(path) in repr(server)
        assert str(path) in server.logs()[0]
        transport = httpx.HTTPTransport(uds=str(path))
        with httpx.Client(transport=transport, base_url=server.url) as plain:
            assert plain.get("/health").status_code == 200
            assert plain.get("/v1/models").status_code == 401
            assert plain.get("/health", headers={"Host": "proxy.example"}).status_code == 200
        with server.client() as client:
            assert client.completions.create(**BODY).choices[0].text
        html = server._repr_html_()
        assert "--unix-socket" in html and "href" not in html
    assert not path.exists()
    server.restart()
    assert path.exists()
    server.stop()
    assert not path.exists()


@needs_unix
def test_an_asynchronous_client_is_led_to_the_socket(llm: LLM, path: Path) -> None:
    async def ask(server: Server) -> list[str]:
        async with server.aclient(max_retries=0) as client:
            return [model.id async for model in client.models.list()]

    with llm.serve(uds=path) as server:
        assert asyncio.run(ask(server)) == ["nbllm-demo"]


@needs_unix
def test_the_python_snippet_of_a_socket_works(
    llm: LLM, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nbllm.server.card import python_snippet

    with llm.serve(uds=path) as server:
        snippet = python_snippet(server.base_url, "nbllm-demo", has_key=True, uds=server.uds)
        *program, last = snippet.splitlines()
        monkeypatch.setenv("NBLLM_API_KEY", server.api_key or "")
        names: dict[str, Any] = {}
        exec("\n".join(program), names)
        assert eval(last, names)
        names["client"].close()


@needs_unix
def test_a_file_that_is_no_socket_is_not_replaced(llm: LLM, path: Path) -> None:
    path.write_text("precious")
    error = refused(llm, uds=path)
    assert error.parameter == "uds" and "no socket" in str(error)
    assert path.read_text() == "precious"


@needs_unix
def test_a_link_to_a_file_is_not_replaced_either(llm: LLM, path: Path) -> None:
    path.symlink_to(os.devnull)
    assert refused(llm, uds=path).parameter == "uds"
    assert path.is_symlink()


@needs_unix
def test_a_socket_that_somebody_listens_on_is_taken(llm: LLM, path: Path) -> None:
    with llm.serve(uds=path) as server:
        error = refused(llm, uds=path)
        assert error.parameter == "uds" and "another server" in str(error)
        with server.client() as client:
            assert list(client.models.list())


@needs_unix
def test_a_socket_that_nobody_listens_on_is_replaced(llm: LLM, path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as dead:
        dead.bind(str(path))
    with llm.serve(uds=path) as server, server.client() as client:
        assert list(client.models.list())


@needs_unix
@pytest.mark.parametrize("name", ["no/such/folder/llm.sock", "x" * 200])
def test_a_path_that_can_hold_no_socket_is_named(llm: LLM, path: Path, name: str) -> None:
    assert refused(llm, uds=path.parent / name).parameter == "uds"


@needs_unix
@pytest.mark.parametrize("option", [{"port": 8000}, {"host": "0.0.0.0"}])
def test_a_socket_has_neither_host_nor_port(llm: LLM, path: Path, option: dict[str, Any]) -> None:
    assert refused(llm, uds=path, **option).parameter == next(iter(option))


# -- TLS ------------------------------------------------------------------------------------------


def test_over_tls_clients_of_this_process_trust_the_certificate(
    llm: LLM, pem: dict[str, Path]
) -> None:
    with llm.serve(ssl_certfile=pem["server"], ssl_keyfile=pem["server_key"]) as server:
        assert server.url == f"https://127.0.0.1:{server.port}"
        with server.client(max_retries=0) as client:
            assert client.completions.create(**BODY).choices[0].text
        url = f"https://localhost:{server.port}/health"
        assert httpx.get(url, verify=_trust(pem["server"]), trust_env=False).status_code == 200
        with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
            httpx.get(url, verify=_trust(pem["client"]), trust_env=False)


def test_key_and_certificate_may_be_in_one_file(
    llm: LLM, pem: dict[str, Path], tmp_path: Path
) -> None:
    both = tmp_path / "both.pem"
    both.write_text(pem["server_key"].read_text() + pem["server"].read_text())
    with llm.serve(ssl_certfile=str(both)) as server, server.client() as client:
        assert list(client.models.list())


@needs_unix
def test_a_unix_socket_may_speak_tls(llm: LLM, pem: dict[str, Path], path: Path) -> None:
    files = {"ssl_certfile": pem["server"], "ssl_keyfile": pem["server_key"]}
    with llm.serve(uds=path, **files) as server, server.client() as client:
        assert server.url == "https://localhost"
        assert list(client.models.list())


def test_with_authorities_a_client_must_show_a_certificate(llm: LLM, pem: dict[str, Path]) -> None:
    files = {"ssl_certfile": pem["server"], "ssl_keyfile": pem["server_key"]}
    with llm.serve(**files, ssl_ca_certs=pem["client"]) as server:
        url = f"https://localhost:{server.port}/health"
        context = _trust(pem["server"])
        with pytest.raises(httpx.TransportError):
            httpx.get(url, verify=context, trust_env=False)
        context = _trust(pem["server"])
        context.load_cert_chain(pem["client"], pem["client_key"])
        assert httpx.get(url, verify=context, trust_env=False).status_code == 200


def _trust(certificate: Path) -> Any:
    import ssl

    return ssl.create_default_context(cafile=str(certificate))


@pytest.mark.parametrize(
    ("options", "parameter"),
    [
        ({"ssl_keyfile": "server_key"}, "ssl_certfile"),
        ({"ssl_ca_certs": "client"}, "ssl_certfile"),
        ({"ssl_certfile": "server"}, "ssl_certfile"),  # it has no key in it
        ({"ssl_certfile": "server", "ssl_keyfile": "client_key"}, "ssl_keyfile"),
        ({"ssl_certfile": "missing", "ssl_keyfile": "server_key"}, "ssl_certfile"),
        ({"ssl_certfile": "server", "ssl_keyfile": "missing"}, "ssl_keyfile"),
        (
            {"ssl_certfile": "server", "ssl_keyfile": "server_key", "ssl_ca_certs": "server_key"},
            "ssl_ca_certs",
        ),
    ],
)
def test_a_wrong_file_is_named(
    llm: LLM, pem: dict[str, Path], options: dict[str, str], parameter: str
) -> None:
    files = {name: pem.get(value, "no-such-file") for name, value in options.items()}
    assert refused(llm, **files).parameter == parameter


# -- paths and origins ----------------------------------------------------------------------------


def test_a_proxys_path_may_be_there_or_not(llm: LLM, send: Send) -> None:
    with llm.serve(root_path="/models/llm/") as server:
        for root in ("", "/models/llm"):
            assert send(server, "GET", f"{root}/health", headers={"Authorization": None})[0] == 200
            assert send(server, "GET", f"{root}/version")[0] == 200
            assert send(server, "POST", f"{root}/v1/completions", BODY)[0] == 200
            without = send(server, "GET", f"{root}/version", headers={"Authorization": None})
            assert without[0] == 401
        assert send(server, "GET", "/models/llmhealth", headers={"Authorization": None})[0] == 401
        document = send(server, "GET", "/openapi.json")[2]
        assert document["servers"] == [{"url": "/models/llm"}]
        assert list(server.requests().route[:3]) == ["/version", "/v1/completions", "/version"]


@pytest.mark.parametrize("root_path", ["models", "https://nb.example/x", "/a b", "/a?b", "//a"])
def test_a_root_path_that_is_no_path_is_refused(llm: LLM, root_path: str) -> None:
    assert refused(llm, root_path=root_path).parameter == "root_path"


def preflight(origin: str, method: str = "POST") -> dict[str, str | None]:
    return {
        "Authorization": None,
        "Origin": origin,
        "Access-Control-Request-Method": method,
        "Access-Control-Request-Headers": "authorization,content-type,x-stainless-lang",
    }


def test_a_page_that_is_allowed_may_ask(llm: LLM, send: Send) -> None:
    with llm.serve(allowed_origins=[PAGE]) as server:
        for route in ("/v1/completions", "/no/such/route"):  # it does not tell which there are
            status, headers, text = send(server, "OPTIONS", route, headers=preflight(PAGE))
            assert (status, text) == (200, "OK")
            assert headers["access-control-allow-origin"] == PAGE
            assert "x-stainless-lang" in headers["access-control-allow-headers"]
        status, headers, _ = send(server, "POST", "/v1/completions", BODY, {"Origin": PAGE})
        assert (status, headers["access-control-allow-origin"]) == (200, PAGE)
        refusal = send(server, "GET", "/v1/models", headers={"Origin": PAGE, "Authorization": None})
        assert (refusal[0], refusal[1]["access-control-allow-origin"]) == (401, PAGE)
        assert "access-control-allow-credentials" not in refusal[1]


def test_other_pages_may_not_ask(llm: LLM, send: Send) -> None:
    other = "https://evil.example"
    with llm.serve(allowed_origins=[PAGE]) as server:
        status, headers, _ = send(server, "OPTIONS", "/v1/models", headers=preflight(other))
        assert status == 400
        assert "access-control-allow-origin" not in headers
        status, headers, _ = send(server, "GET", "/v1/models", headers={"Origin": other})
        assert "access-control-allow-origin" not in headers
        assert send(server, "OPTIONS", "/v1/models", headers={"Authorization": None})[0] == 401


def test_by_default_no_page_may_ask(server: Server, send: Send) -> None:
    status, headers, _ = send(server, "OPTIONS", "/v1/models", headers=preflight(PAGE))
    assert status == 401
    assert not [name for name in headers if name.startswith("access-control")]


@pytest.mark.parametrize(
    "options",
    [
        {"allowed_origins": PAGE},
        {"allowed_origins": ["nb.example"]},
        {"allowed_origins": [PAGE + "/"]},
        {"allowed_origins": ["http://[::1"]},
        {"allowed_origins": ["*"], "api_key": None},
    ],
)
def test_what_is_no_origin_is_refused(llm: LLM, options: dict[str, Any]) -> None:
    assert refused(llm, **options).parameter == "allowed_origins"


# -- the command line -----------------------------------------------------------------------------


def options_of(*line: str) -> dict[str, Any]:
    import argparse

    parser = argparse.ArgumentParser()
    add_arguments(parser)
    arguments = parser.parse_args(line)
    read_config(arguments)
    return _server_options(arguments)


def test_every_option_has_a_flag() -> None:
    given = options_of(
        *("--uds", "a.sock", "--ssl-keyfile", "k", "--ssl-certfile", "c", "--ssl-ca-certs", "ca"),
        *("--root-path", "/llm", "--allowed-origins", PAGE, "https://two.example"),
    )
    assert "port" not in given and "host" not in given
    assert given["uds"] == "a.sock"
    assert (given["ssl_keyfile"], given["ssl_certfile"], given["ssl_ca_certs"]) == ("k", "c", "ca")
    assert given["root_path"] == "/llm"
    assert given["allowed_origins"] == [PAGE, "https://two.example"]


def test_the_command_line_has_a_port_of_its_own() -> None:
    assert (options_of()["host"], options_of()["port"]) == ("localhost", 8000)
    assert options_of("--port", "0", "--host", "::1")["port"] == 0
    assert options_of("--uds", "a", "--port", "1")["port"] == 1  # which serve() refuses

    assert "host" not in options_of("--uds", "a", "--host", "")


@needs_unix
def test_a_shell_serves_a_unix_socket_and_takes_it_away(path: Path) -> None:
    command = [sys.executable, "-m", "nbllm.cli", "serve", "--uds", str(path), "--device", "cpu"]
    environment = {k: v for k, v in os.environ.items() if not k.endswith("_API_KEY")}
    with subprocess.Popen(
        [*command, "--max-model-len", "256"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment,
    ) as process:
        try:
            assert process.stdout is not None
            assert str(path) in process.stdout.readline()
            transport = httpx.HTTPTransport(uds=str(path))
            with httpx.Client(transport=transport, base_url="http://localhost") as client:
                assert client.post("/v1/completions", json=BODY, timeout=60).status_code == 200
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0
        finally:
            process.kill()
    assert not path.exists()


def test_a_wrong_key_is_told_over_tls_too(llm: LLM, pem: dict[str, Path]) -> None:
    files = {"ssl_certfile": pem["server"], "ssl_keyfile": pem["server_key"]}
    with (
        llm.serve(**files) as server,
        server.client(api_key="wrong", max_retries=0) as client,
        pytest.raises(openai.AuthenticationError),
    ):
        client.models.list()
