"""The card that a notebook shows for a server, and the address that others reach it under.

No key is ever in it: what a cell shows is saved with the notebook.
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import time
from collections.abc import Sequence
from html import escape

from nbllm.server.request_log import RequestRecord, ServerStats

_SCHEMES = ("http://", "https://", "/")  # a link to a script would be one too


def proxy_path(port: int) -> str | None:
    """Path of a port of this machine behind JupyterHub and jupyter-server-proxy, with slashes at
    both ends; None without a hub."""
    prefix = os.environ.get("JUPYTERHUB_SERVICE_PREFIX")
    if not prefix:
        return None
    return f"/{prefix.strip('/')}/proxy/{port}/" if prefix.strip("/") else f"/proxy/{port}/"


def proxy_links(port: int) -> list[str]:
    """Where the browser may find the port, the likeliest first, each with a slash at its end.

    `NBLLM_PROXY_URL` with {port} is what the user says; `VSCODE_PROXY_URI` with {{port}} is what
    VS Code in a browser says; then comes JupyterHub.
    """
    templates = (("NBLLM_PROXY_URL", "{port}"), ("VSCODE_PROXY_URI", "{{port}}"))
    links = [os.environ.get(name, "").replace(mark, str(port)) for name, mark in templates]
    links.append(proxy_path(port) or "")
    return [link.rstrip("/") + "/" for link in links if link.startswith(_SCHEMES)]


def is_proxied() -> bool:
    """Whether browsers reach this machine under a name that is not known here."""
    return bool(proxy_links(0)) or _is_colab()


def curl_snippet(base_url: str, *, has_key: bool, uds: str | None = None) -> str:
    """A command line that asks the model; the key is read from the environment."""
    key = ' -H "Authorization: Bearer $NBLLM_API_KEY" \\\n    ' if has_key else " "
    body = '{"messages": [{"role": "user", "content": "Hello!"}]}'
    over = "" if uds is None else f"--unix-socket {shlex.quote(uds)} "
    return (
        f"curl {over}{base_url}/chat/completions \\\n"
        f"   {key}-H 'Content-Type: application/json' \\\n"
        f"    -d '{body}'"
    )


def python_snippet(base_url: str, model: str, *, has_key: bool, uds: str | None = None) -> str:
    """A program that asks the model; the key is read from the environment."""
    key = 'os.environ["NBLLM_API_KEY"]' if has_key else '"none"'
    head = ("import os\n" if has_key else "") + ("" if uds is None else "import httpx\n")
    options = f"base_url={base_url!r}, api_key={key}"
    if uds is not None:
        head += (
            f"import openai\n\nhttp = httpx.Client(transport=httpx.HTTPTransport(uds={uds!r}))\n"
        )
        options += ", http_client=http"
    else:
        head += "import openai\n\n"
    return (
        f"{head}client = openai.OpenAI({options})\n"
        f"reply = client.chat.completions.create(\n    model={model!r},\n"
        '    messages=[{"role": "user", "content": "Hello!"}],\n)\n'
        "reply.choices[0].message.content"
    )


def card(
    base_url: str, model: str, port: int, *, has_key: bool, state: str, uds: str | None = None
) -> str:
    """HTML: where the server is and how to ask it. A click into a snippet selects it.

    Args:
        base_url: for clients of this machine.
        model: what clients call it.
        port: where it listens; unused with `uds`.
        has_key: whether clients need one.
        state: how it is doing.
        uds: path of the Unix socket that it listens on, which no browser can reach.
    """
    rows = [
        f"<b>nbllm</b> serves <code>{escape(model)}</code>, {escape(state)}",
        f"<code>base_url</code>: <code>{escape(base_url)}</code>",
    ]
    if uds is None:
        local = base_url.removesuffix("/v1") + "/"
        rows.append(" or ".join(map(_link, [*proxy_links(port), local])))
        if _is_colab():
            rows.append(_colab_link(port))
    else:
        rows.append(f"over the Unix socket <code>{escape(uds)}</code>")
    if has_key:
        rows.append("<code>api_key</code>: in <code>server.api_key</code>, not shown here")
    path = proxy_path(port)
    if path is not None and uds is None:
        rows.append(
            f"From outside of this machine: your hub's address and <code>{escape(path)}v1</code>, "
            "with the headers <code>Accept: text/event-stream</code> for streams, "
            "<code>Authorization: token ...</code> for the hub and "
            "<code>X-API-Key</code> for this server"
        )
    snippets = (
        ("curl", curl_snippet(base_url, has_key=has_key, uds=uds)),
        ("Python", python_snippet(base_url, model, has_key=has_key, uds=uds)),
    )
    shown = "".join(
        f"<details><summary>{name}</summary>"
        f'<pre style="user-select: all">{escape(text)}</pre></details>'
        for name, text in snippets
    )
    return "<div>" + "".join(f"<div>{row}</div>" for row in rows) + shown + "</div>"


def requests_line(stats: ServerStats) -> str:
    """How many requests there were, in a line."""
    return (
        f"{stats.num_running:,} running, {stats.num_requests:,} ended, {stats.num_failed:,} failed"
        f"; {stats.prompt_tokens:,} prompt tokens, {stats.completion_tokens:,} generated tokens"
    )


def requests_table(stats: ServerStats, records: Sequence[RequestRecord]) -> str:
    """HTML: the same, and a table of some requests."""
    head = f"<div>Requests: {requests_line(stats)}</div>"
    if not records:
        return head
    names = ("started", "route", "status", "seconds", "prompt tokens", "generated tokens")
    rows = [f"<tr>{''.join(f'<th>{name}</th>' for name in names)}</tr>"]
    for record in records:
        cells = (
            time.strftime("%H:%M:%S", time.localtime(record.started)),
            record.route,  # whatever the client wrote there
            str(record.status or "…"),
            "running" if record.seconds is None else f"{record.seconds:.2f}",
            f"{record.prompt_tokens:,}",
            f"{record.completion_tokens:,}",
        )
        rows.append(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>")
    return f"{head}<table>{''.join(rows)}</table>"


def _link(url: str) -> str:
    target = escape(url + "health", quote=True)
    return (
        f'<a href="{target}" target="_blank" rel="noopener">is it healthy?</a> '
        f"<small>({escape(url)})</small>"
    )


def _is_colab() -> bool:
    try:
        return importlib.util.find_spec("google.colab") is not None
    except (ImportError, ValueError):
        return False


def _colab_link(port: int) -> str:
    """Only the notebook's page can ask Colab for the link."""
    return (
        '<a target="_blank" rel="noopener">asking Colab for the link</a><script>(() => {'
        "const link = document.currentScript.previousElementSibling;"
        f"google.colab.kernel.proxyPort({int(port)}, {{cache: true}}).then((url) => {{"
        'link.href = new URL("health", url); link.textContent = "is it healthy, through Colab?";'
        "});})();</script>"
    )
