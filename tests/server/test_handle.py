"""The handle that serve() gives: clients, the table of requests, the card, cells run again."""

from __future__ import annotations

import asyncio
import builtins
import logging
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from nbllm import LLM, InvalidRequestError, NbllmError
from nbllm.notebook_cell import NotebookCell
from nbllm.server import serve as serve_module
from nbllm.server.cell_servers import CellServers
from nbllm.server.request_log import RequestLog
from nbllm.server.serve import Server

Send = Callable[..., tuple[int, dict[str, str], Any]]
BODY = {"prompt": "Once upon a time", "max_tokens": 3, "ignore_eos": True}


def test_both_clients_are_set_up(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")  # leads nowhere
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:9")
    with server.client(max_retries=0) as client:
        assert [model.id for model in client.models.list()] == ["nbllm-demo"]

    async def ask() -> list[str]:
        async with server.aclient(max_retries=0) as client:
            return [model.id async for model in client.models.list()]

    assert asyncio.run(ask()) == ["nbllm-demo"]


def test_a_client_of_a_server_without_a_key_needs_none(llm: LLM) -> None:
    with llm.serve(api_key=None) as server, server.client() as client:
        assert list(client.models.list())


def test_without_the_package_openai_a_client_says_what_to_install(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def fail(name: str, *args: Any, **options: Any) -> Any:
        if name == "openai":
            raise ImportError(name)
        return real(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", fail)
    with pytest.raises(NbllmError, match="pip install openai"):
        server.client()


def test_the_table_has_a_row_for_each_request(llm: LLM, send: Send) -> None:
    with llm.serve() as server:
        whole = send(server, "POST", "/v1/completions", BODY)[2]
        send(server, "POST", "/v1/completions", BODY | {"stream": True})
        send(server, "POST", "/v1/completions", BODY | {"temperature": -1})
        send(server, "GET", "/v1/models", headers={"Authorization": None})
        send(server, "GET", "/health")
        frame, stats = server.requests(), server.stats
    assert list(frame.status) == [200, 200, 400, 401]
    assert list(frame.route) == ["/v1/completions"] * 3 + ["/v1/models"]
    assert frame.id[0] == whole["id"]
    assert list(frame.completion_tokens) == [3, 3, 0, 0]
    assert frame.prompt_tokens[0] == frame.prompt_tokens[1] == whole["usage"]["prompt_tokens"]
    assert frame.started.is_monotonic_increasing
    assert (frame.seconds >= 0).all()
    assert (stats.num_requests, stats.num_failed, stats.num_running) == (4, 2, 0)
    assert stats.completion_tokens == 6


def test_the_table_is_bounded_and_the_sums_are_not() -> None:
    log = RequestLog(max_records=3)
    assert list(log.frame().columns)[:3] == ["id", "route", "status"]
    for number in range(10):
        log.end(log.begin(f"/{number}"))
    assert list(log.frame().route) == ["/7", "/8", "/9"]
    assert log.stats.num_requests == 10


def test_a_request_that_runs_when_the_server_stops_is_told_so(
    llm: LLM, send: Send, caplog: pytest.LogCaptureFixture
) -> None:
    server = llm.serve()
    long = BODY | {"max_tokens": 900}
    replies: list[Any] = []
    threads = [
        threading.Thread(
            target=lambda body: replies.append(send(server, "POST", "/v1/completions", body)),
            args=(long | {"n": n},),
        )
        for n in (1, 2)
    ]
    for thread in threads:
        thread.start()
    while llm.get_metrics()["num_requests_running"] < 3:
        pass
    server.stop(timeout_s=0)
    for thread in threads:
        thread.join()
    assert [status for status, _, _ in replies] == [503, 503]
    assert list(server.requests().status) == [503, 503]
    assert llm.get_metrics()["num_requests_running"] == 0
    assert not [record for record in caplog.records if record.exc_info]


def test_what_nobody_foresaw_is_logged_and_not_told(
    llm: LLM,
    send: Send,
    server: Server,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise ZeroDivisionError("a secret")

    monkeypatch.setattr(llm, "astream", fail)
    status, _, reply = send(server, "POST", "/v1/completions", BODY)
    assert (status, reply["error"]["message"]) == (500, "the request failed")
    assert any(r.name.startswith("nbllm") and r.exc_info for r in caplog.records)


def test_a_restarted_server_has_the_same_address_and_key(llm: LLM, send: Send) -> None:
    with llm.serve() as server:
        before = (server.url, server.api_key)
        thread = server._thread
        server.restart()
        assert (server.url, server.api_key) == before
        assert server._thread is not thread
        assert send(server, "GET", "/version")[0] == 200
        server.stop()
        server.restart()
        assert send(server, "GET", "/version")[0] == 200


def test_serving_and_stopping_many_times_leaves_nothing(llm: LLM) -> None:
    server = llm.serve()
    port = server.port
    for _ in range(5):
        server.stop()
        server.stop()
        server = llm.serve(port=port)
    server.stop()
    assert not server.is_running
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=1)


@pytest.mark.skipif(not socket.has_ipv6, reason="needs IPv6")
def test_an_ipv6_address_has_brackets(llm: LLM) -> None:
    try:
        server = llm.serve(host="::1")
    except InvalidRequestError:
        pytest.skip("this machine has no ::1")
    with server, server.client() as client:
        assert server.url == f"http://[::1]:{server.port}"
        assert list(client.models.list())


def test_the_card_has_snippets_and_no_key(llm: LLM) -> None:
    with llm.serve(model_name="<b>mine</b>") as server:
        html = server._repr_html_()
        assert server.api_key is not None
        assert server.api_key not in html
        assert "<b>mine" not in html
        assert "&lt;b&gt;mine" in html
        assert f"{server.base_url}/chat/completions" in html
        assert f'href="{server.url}/health"' in html
    assert "stopped" in server._repr_html_()


def test_behind_a_hub_the_card_links_through_the_proxy(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JUPYTERHUB_SERVICE_PREFIX", "/user/ada/")
    with llm.serve() as server:
        assert f'href="/user/ada/proxy/{server.port}/health"' in server._repr_html_()
        assert "text/event-stream" in server._repr_html_()


@pytest.mark.parametrize(
    ("variable", "value", "link"),
    [
        ("NBLLM_PROXY_URL", "https://nb.example/p/{port}", "https://nb.example/p/PORT/health"),
        ("NBLLM_PROXY_URL", "/mine/{port}/", "/mine/PORT/health"),
        ("VSCODE_PROXY_URI", "https://code.example/{{port}}/", "https://code.example/PORT/health"),
        ("JUPYTERHUB_SERVICE_PREFIX", "/user/ada/", "/user/ada/proxy/PORT/health"),
    ],
)
def test_the_card_links_through_the_proxy_that_the_environment_names(
    llm: LLM, send: Send, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, link: str
) -> None:
    monkeypatch.setenv(variable, value)
    with llm.serve() as server:
        assert f'href="{link.replace("PORT", str(server.port))}"' in server._repr_html_()
        assert send(server, "GET", "/version", headers={"Host": "a.proxy.example"})[0] == 200


def test_the_likeliest_link_comes_first(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NBLLM_PROXY_URL", "https://first.example/{port}")
    monkeypatch.setenv("VSCODE_PROXY_URI", "https://second.example/{{port}}")
    monkeypatch.setenv("JUPYTERHUB_SERVICE_PREFIX", "/third/")
    with llm.serve() as server:
        html = server._repr_html_()
        links = [part.partition('"')[0] for part in html.split('href="')[1:]]
        starts = ["https://first.", "https://second.", "/third/", server.url]
        assert len(links) == len(starts)
        assert all(link.startswith(start) for link, start in zip(links, starts, strict=True))


@pytest.mark.parametrize(
    "value", ["javascript:alert({port})", 'https://x.example/"><script>{port}</script>', ""]
)
def test_a_link_is_no_script(llm: LLM, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("NBLLM_PROXY_URL", value)
    with llm.serve() as server:
        html = server._repr_html_()
        assert "javascript" not in html
        assert "<script" not in html
        assert server.api_key is not None and server.api_key not in html


def test_in_colab_a_script_asks_for_the_link(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with llm.serve() as server:
        assert "proxyPort" not in server._repr_html_()
        (tmp_path / "colab").mkdir()
        (tmp_path / "colab" / "__init__.py").touch()
        google = ModuleType("google")
        google.__path__ = [str(tmp_path)]
        monkeypatch.setitem(sys.modules, "google", google)
        assert f"proxyPort({server.port}," in server._repr_html_()


def test_the_python_snippet_works(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    from nbllm.server.card import python_snippet

    with llm.serve() as server:
        snippet = python_snippet(server.base_url, server.model_name, has_key=True)
        *program, last = snippet.splitlines()
        monkeypatch.setenv("NBLLM_API_KEY", server.api_key or "")
        names: dict[str, Any] = {}
        exec("\n".join(program), names)
        assert eval(last, names)
        names["client"].close()


def test_a_cell_that_is_run_again_replaces_its_server_on_the_same_port(
    llm: LLM, send: Send, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = [1]
    monkeypatch.setattr(serve_module, "current_cell", lambda: NotebookCell("cell", run[0]))
    monkeypatch.setattr(serve_module, "_cell_servers", CellServers())
    first, second = llm.serve(), llm.serve()
    run[0] = 2
    with caplog.at_level(logging.INFO, logger="nbllm.server.serve"):
        again = llm.serve()
    assert not first.is_running
    assert not second.is_running
    assert (again.port, again.api_key) == (first.port, first.api_key)
    assert "replaces" in repr(again)
    assert any("replace" in message for message in caplog.messages)
    more = llm.serve()
    assert (more.port, more.api_key) == (second.port, second.api_key)
    third = llm.serve()
    assert third.port not in (first.port, second.port)
    assert "replaces" not in repr(third)
    for server in (again, more, third):
        assert send(server, "GET", "/version")[0] == 200
        server.stop()


def test_a_port_that_was_taken_meanwhile_is_let_go(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = [1]
    monkeypatch.setattr(serve_module, "current_cell", lambda: NotebookCell("cell", run[0]))
    monkeypatch.setattr(serve_module, "_cell_servers", CellServers())
    first = llm.serve()
    first.stop()
    with socket.create_server(("127.0.0.1", first.port)):
        run[0] = 2
        with llm.serve() as again:
            assert again.port != first.port


def test_a_cell_with_a_fixed_port_can_be_run_again(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = [1]
    monkeypatch.setattr(serve_module, "current_cell", lambda: NotebookCell("cell", run[0]))
    monkeypatch.setattr(serve_module, "_cell_servers", CellServers())
    first = llm.serve(api_key="mine")
    run[0] = 2
    with llm.serve(port=first.port, api_key="other") as again:
        assert not first.is_running
        assert again.api_key == "other"
