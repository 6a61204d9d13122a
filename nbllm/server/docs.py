"""/openapi.json says what each route takes; /docs is that as a page, which loads nothing else."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

from fastapi import FastAPI, Request
from fastapi.openapi.utils import get_openapi
from fastapi.responses import HTMLResponse, Response
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from nbllm.server.door import OPEN_PATHS

_SCHEMAS = "#/components/schemas/"
_PAGE_HEADERS = {"Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'"}
_HELLO = [{"role": "user", "content": "Hello!"}]
_EVENTS = ("/v1/chat/completions", "/v1/completions", "/v1/responses")  # with stream=true

# Path -> what it is for, and a body to begin with.
_ABOUT: dict[str, tuple[str, dict[str, Any] | None]] = {
    "/v1/chat/completions": ("Answers a conversation.", {"messages": _HELLO}),
    "/v1/completions": (
        "Goes on with a text.",
        {"prompt": "San Francisco is a", "max_tokens": 7, "temperature": 0},
    ),
    "/v1/responses": ("Answers, and remembers the conversation.", {"input": "Hello!"}),
    "/v1/responses/{response_id}": ("A response that was kept.", None),
    "/v1/responses/{response_id}/cancel": ("Responses don't run in the background.", {}),
    "/v1/embeddings": ("Vectors of texts.", {"input": ["a cat", "a dog"]}),
    "/v1/models": ("The model that is served.", None),
    "/v1/models/{name}": ("The same, by its name.", None),
    "/tokenize": ("The tokens of a text or a conversation.", {"prompt": "Hello!"}),
    "/detokenize": ("The text of tokens.", {"tokens": [1, 2, 3]}),
    "/health": ("200 if the engine makes progress, else 503; needs no key.", None),
    "/ping": ("The same for SageMaker; needs the key.", {}),
    "/metrics": ("Numbers for Prometheus.", None),
    "/load": ("How many POST requests are answered now.", None),
    "/version": ("The version of nbllm.", None),
    "/docs": ("This page.", None),
}

_ERROR = {
    "type": "object",
    "description": "What is wrong; OpenAI's form.",
    "properties": {
        "error": {
            "type": "object",
            "properties": {
                "message": {"type": "string"},
                "type": {"enum": ["invalid_request_error", "server_error"]},
                "param": {"type": ["string", "null"]},
                "code": {"type": "integer"},
            },
            "required": ["message", "type", "param", "code"],
        }
    },
    "required": ["error"],
}


def add_routes(app: FastAPI, bodies: Mapping[str, type[BaseModel]], *, has_key: bool) -> None:
    """Add /docs, and have /openapi.json describe the routes as they are.

    Args:
        app: all of whose other routes were added before.
        bodies: path of a POST route -> what it reads its body into.
        has_key: whether clients need a key.
    """

    @app.get("/docs")
    async def docs(request: Request) -> Response:
        url = str(request.base_url).rstrip("/")
        return HTMLResponse(_page(app.openapi(), url, has_key=has_key), headers=_PAGE_HEADERS)

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _openapi(app, bodies, has_key=has_key)
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _openapi(
    app: FastAPI, bodies: Mapping[str, type[BaseModel]], *, has_key: bool
) -> dict[str, Any]:
    document: dict[str, Any] = get_openapi(title=app.title, version=app.version, routes=app.routes)
    _, models = models_json_schema(
        [(body, "validation") for body in bodies.values()], ref_template=_SCHEMAS + "{model}"
    )
    schemas: dict[str, Any] = models["$defs"] | {"Error": _ERROR}
    for body in bodies.values():
        _let_be_null(schemas[body.__name__])
    document["components"] = {"schemas": schemas}
    for path, item in document["paths"].items():
        for operation in item.values():
            operation["responses"] = _responses(path, operation["responses"]["200"])
            operation["summary"] = _ABOUT.get(path, (operation["summary"], None))[0]
            if has_key and path in OPEN_PATHS:
                operation["security"] = []
        if path in bodies:
            schema = {"$ref": _SCHEMAS + bodies[path].__name__}
            item["post"]["requestBody"] = {
                "required": True,
                "content": {"application/json": {"schema": schema}},
            }
    if has_key:
        document["components"]["securitySchemes"] = {
            "bearer": {"type": "http", "scheme": "bearer"},
            "header": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
        }
        document["security"] = [{"bearer": []}, {"header": []}]
    return document


def _let_be_null(schema: dict[str, Any]) -> None:
    """A field of a body that is null is the same as one that is left out."""
    for name, field in schema["properties"].items():
        if name in schema.get("required", ()) or {"type": "null"} in field.get("anyOf", ()):
            continue
        kept = {key: field.pop(key) for key in ("title", "default") if key in field}
        if field:  # else anything goes
            schema["properties"][name] = {"anyOf": [field, {"type": "null"}], **kept}


def _responses(path: str, ok: dict[str, Any]) -> dict[str, Any]:
    if path in ("/health", "/ping"):
        return {
            "200": {"description": "The engine makes progress."},
            "4XX": _error("What the client did wrong."),
            "503": {"description": "It does not."},
        }
    if path in ("/metrics", "/docs"):
        kind = "text/plain" if path == "/metrics" else "text/html"
        ok["content"] = {kind: {"schema": {"type": "string"}}}
    if path in _EVENTS:
        ok["content"]["text/event-stream"] = {"schema": {"type": "string"}}
    return {
        "200": ok,
        "4XX": _error("What the client did wrong."),
        "5XX": _error("What the server can't do now."),
    }


def _error(description: str) -> dict[str, Any]:
    content = {"application/json": {"schema": {"$ref": _SCHEMAS + "Error"}}}
    return {"description": description, "content": content}


def _page(document: Mapping[str, Any], url: str, *, has_key: bool) -> str:
    schemas: dict[str, Any] = document["components"]["schemas"]
    routes = [
        part
        for path, item in document["paths"].items()
        for method, operation in item.items()
        for part in _route(path, method.upper(), operation, url, has_key=has_key)
    ]
    forms = [
        f'<h2 id="{escape(name)}">{escape(name)}</h2>{_fields(schema)}'
        for name, schema in schemas.items()
        if "properties" in schema
    ]
    key = "<p>The key is read from <code>$NBLLM_API_KEY</code>.</p>" if has_key else ""
    style = (
        "body{font:15px/1.5 system-ui,sans-serif;max-width:60em;margin:2em auto;padding:0 1em}"
        "pre{background:#8881;padding:.6em;overflow-x:auto;user-select:all}"
        "td{padding:0 1em .2em 0;vertical-align:top}h2{margin:1.6em 0 .2em}"
    )
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>nbllm</title>'
        f"<style>{style}</style><h1>nbllm {escape(document['info']['version'])}</h1>"
        "<p>OpenAI's API, and vLLM's routes beside it; <a href=\"openapi.json\">openapi.json</a> "
        f"says it to programs.</p>{key}{''.join(routes)}<hr>{''.join(forms)}</html>"
    )


def _route(
    path: str, method: str, operation: Mapping[str, Any], url: str, *, has_key: bool
) -> Iterator[str]:
    yield f"<h2><code>{method} {escape(path)}</code></h2><p>{escape(operation['summary'])}"
    if "requestBody" in operation:
        schema = operation["requestBody"]["content"]["application/json"]["schema"]
        yield f" Its body: {_type(schema)}."
    snippet = _curl(path, method, url, has_key=has_key and path not in OPEN_PATHS)
    yield f"</p><pre>{escape(snippet)}</pre>"


def _curl(path: str, method: str, url: str, *, has_key: bool) -> str:
    lines = [f"curl {shlex.quote(url + path)}"]
    if method not in ("GET", "POST"):
        lines[0] += f" -X {method}"
    if has_key:
        lines.append('-H "Authorization: Bearer $NBLLM_API_KEY"')
    if method == "POST":
        body = _ABOUT.get(path, ("", None))[1] or {}
        lines.append("-H 'Content-Type: application/json'")
        lines.append(f"-d {shlex.quote(json.dumps(body))}")
    return " \\\n  ".join(lines)


def _fields(schema: Mapping[str, Any]) -> str:
    rows = []
    for name, field in schema["properties"].items():
        needed = "required" if name in schema.get("required", ()) else ""
        default = field.get("default")
        note = needed if default is None else f"default {json.dumps(default)}"
        rows.append(f"<tr><td><code>{escape(name)}</code><td>{_type(field)}<td>{escape(note)}</tr>")
    about = escape(schema.get("description", ""))
    return f"<p>{about}</p><table>{''.join(rows)}</table>"


def _type(schema: Mapping[str, Any]) -> str:
    """HTML for what a value may be."""
    if "$ref" in schema:
        name = escape(schema["$ref"].removeprefix(_SCHEMAS))
        return f'<a href="#{name}">{name}</a>'
    if "anyOf" in schema:
        kinds = [_type(kind) for kind in schema["anyOf"] if kind != {"type": "null"}]
        return " or ".join(kinds)
    values = schema.get("enum") or ([schema["const"]] if "const" in schema else [])
    if values:
        return escape(", ".join(map(json.dumps, values)))
    if schema.get("type") == "array" and "items" in schema:
        return f"list of {_type(schema['items'])}"
    low = schema.get("minimum")
    high = schema.get("maximum")
    bounds = f", {low} to {high}" if low is not None and high is not None else ""
    kind = schema.get("type", "anything")
    return escape((kind if isinstance(kind, str) else " or ".join(kind)) + bounds)
