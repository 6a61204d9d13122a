"""/openapi.json is true, and /docs is a page that needs nothing from elsewhere."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from html import unescape
from html.parser import HTMLParser
from typing import Any

import jsonschema
import pytest

from nbllm import LLM
from nbllm.server.app import make_app
from nbllm.server.serve import Server

Send = Callable[..., tuple[int, dict[str, str], Any]]


class Page(HTMLParser):
    """Collects the tags and what they refer to."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.links: list[str] = []
        self.ids: set[str] = set()
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        for name, value in attrs:
            assert value is not None
            if name in ("href", "src", "action"):
                self.links.append(value)
            elif name == "id":
                self.ids.add(value)
            else:
                assert name in ("lang", "charset")


@pytest.fixture(scope="module")
def document(llm: LLM) -> dict[str, Any]:
    return make_app(llm, api_key="key", hosts=None, model_name="x").app.openapi()


def operations(document: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, item in document["paths"].items():
        for method, operation in item.items():
            yield path, method.upper(), operation


def test_every_route_is_described(llm: LLM, document: dict[str, Any]) -> None:
    app = make_app(llm, api_key="key", hosts=None, model_name="x").app
    routes = {
        (re.sub(":path", "", route.path), method)
        for route in app.routes
        for method in route.methods - {"HEAD"}
        if route.path != "/openapi.json"
    }
    assert {(path, method) for path, method, _ in operations(document)} == routes
    assert all(operation["summary"].endswith(".") for _, _, operation in operations(document))
    names = [operation["operationId"] for _, _, operation in operations(document)]
    assert len(set(names)) == len(names)


def test_no_status_is_told_that_is_never_sent(document: dict[str, Any]) -> None:
    for _, _, operation in operations(document):
        assert "422" not in operation["responses"]
        assert {"200", "4XX"} <= operation["responses"].keys()
    assert "HTTPValidationError" not in document["components"]["schemas"]


def test_every_reference_leads_somewhere(document: dict[str, Any]) -> None:
    schemas = document["components"]["schemas"]
    found = set(re.findall(r"#/components/schemas/(\w+)", str(document)))
    assert found <= schemas.keys()
    assert all(jsonschema.Draft202012Validator.check_schema(s) is None for s in schemas.values())


def test_the_key_is_said_to_be_needed_where_it_is(llm: LLM, document: dict[str, Any]) -> None:
    for path, _, operation in operations(document):
        assert (operation.get("security") == []) == (path == "/health")
    assert document["security"]
    without = make_app(llm, api_key=None, hosts=None, model_name="x").app.openapi()
    assert "security" not in without
    assert "securitySchemes" not in without["components"]


def check(document: dict[str, Any], name: str, value: Any) -> bool:
    schema = {"$ref": f"#/components/schemas/{name}", "components": document["components"]}
    return jsonschema.Draft202012Validator(schema).is_valid(value)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": "a", "max_tokens": 1}),
        ("/v1/completions", {"prompt": [1, 2], "max_tokens": 1, "n": None, "stream": None}),
        ("/v1/completions", {"prompt": "a", "max_tokens": 1, "unknown": {"x": 1}}),
        ("/v1/completions", {"prompt": "a", "max_tokens": 1, "temperature": 1}),
        ("/v1/completions", {"max_tokens": 1}),
        ("/v1/completions", {"prompt": 1}),
        ("/v1/completions", {"prompt": None}),
        ("/v1/completions", {"prompt": "a", "n": 129}),
        ("/v1/completions", {"prompt": "a", "n": "1"}),
        ("/v1/completions", {"prompt": "a", "stream": 1}),
        ("/v1/completions", {"prompt": "a", "stop": [1]}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "n": None}),
        ("/v1/chat/completions", {"messages": "a"}),
        ("/v1/chat/completions", {}),
        ("/v1/responses", {"input": "a", "max_output_tokens": 1, "store": None}),
        ("/v1/responses", {"input": "a", "max_output_tokens": "1"}),
        ("/v1/embeddings", {"input": "a", "encoding_format": None}),
        ("/v1/embeddings", {"input": "a", "encoding_format": "hex"}),
        ("/tokenize", {"prompt": "a", "return_token_strs": None}),
        ("/tokenize", {"prompt": ["a"]}),
        ("/detokenize", {"tokens": [1]}),
        ("/detokenize", {"tokens": ["a"]}),
    ],
)
def test_a_body_is_taken_if_it_is_as_described(
    send: Send, server: Server, document: dict[str, Any], path: str, body: Any
) -> None:
    content = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]
    name = content["schema"]["$ref"].rsplit("/", 1)[1]
    status, _, reply = send(server, "POST", path, body)
    assert status == (200 if check(document, name, body) else 400), reply
    assert status == 200 or check(document, "Error", reply)


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("GET", "/v1/models/other", None),
        ("GET", "/v1/nothing", None),
        ("GET", "/v1/completions", None),
        ("POST", "/v1/completions", b"{"),
        ("GET", "/v1/responses/none", None),
    ],
)
def test_errors_have_the_form_that_is_described(
    send: Send, server: Server, document: dict[str, Any], method: str, path: str, body: Any
) -> None:
    status, _, reply = send(server, method, path, body)
    assert 400 <= status < 500
    assert check(document, "Error", reply)


def test_the_page_loads_nothing_and_runs_nothing(send: Send, server: Server) -> None:
    status, headers, html = send(server, "GET", "/docs")
    assert status == 200
    assert headers["content-type"].startswith("text/html")
    assert headers["content-security-policy"].startswith("default-src 'none'")
    page = Page(html)
    assert not page.tags & {"script", "link", "img", "iframe", "form", "object", "base"}
    assert page.links.count("openapi.json") == 1
    assert {link.removeprefix("#") for link in page.links if link != "openapi.json"} <= page.ids
    assert server.api_key is not None and server.api_key not in html
    document = send(server, "GET", "/openapi.json")[2]
    for path, method, _ in operations(document):
        assert f"<code>{method} {path}</code>" in html
    for field in ("temperature", "tool_choice", "encoding_format", "structured_outputs"):
        assert f"<code>{field}</code>" in html


def test_the_page_does_not_repeat_what_a_client_made_up(llm: LLM, send: Send) -> None:
    with llm.serve(allowed_hosts=["*"]) as server:
        headers = {"Host": "a.example/<script>alert('x')</script>"}
        html = send(server, "GET", "/docs", headers=headers)[2]
    assert "<script" not in html


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_the_pages_command_lines_work(send: Send, server: Server) -> None:
    html = send(server, "GET", "/docs", headers={"Host": f"127.0.0.1:{server.port}"})[2]
    snippets = [unescape(text) for text in re.findall(r"<pre>(.*?)</pre>", html, re.DOTALL)]
    plain = [snippet for snippet in snippets if "{response_id}" not in snippet]
    assert len(plain) > 12
    script = "\n".join(
        f"{snippet.replace('{name}', server.model_name)} -s -o /dev/null -w '%{{http_code}}\\n'"
        for snippet in plain
    )
    done = subprocess.run(
        ["sh", "-c", script],
        env={"PATH": os.environ["PATH"], "NBLLM_API_KEY": server.api_key or ""},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.split() == ["200"] * len(plain), (plain, done.stderr)


def test_behind_a_proxy_the_page_has_the_proxys_path(llm: LLM, send: Send) -> None:
    with llm.serve(root_path="/models/llm") as server:
        html = send(server, "GET", "/models/llm/docs", headers={"Host": "localhost"})[2]
    assert "curl http://localhost/models/llm/v1/models " in html


def test_a_server_without_a_key_asks_for_none(llm: LLM, send: Send) -> None:
    with llm.serve(api_key=None) as server:
        html = send(server, "GET", "/docs", headers={"Authorization": None})[2]
    assert "Authorization" not in html
