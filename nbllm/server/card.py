"""The card that a notebook shows for a server, and the address that others reach it under.

No key is ever in it: what a cell shows is saved with the notebook.
"""

from __future__ import annotations

import os
from html import escape


def proxy_path(port: int) -> str | None:
    """Path of a port of this machine behind JupyterHub and jupyter-server-proxy, with slashes at
    both ends; None without a hub."""
    prefix = os.environ.get("JUPYTERHUB_SERVICE_PREFIX")
    if not prefix:
        return None
    return f"/{prefix.strip('/')}/proxy/{port}/" if prefix.strip("/") else f"/proxy/{port}/"


def curl_snippet(base_url: str, *, has_key: bool) -> str:
    """A command line that asks the model; the key is read from the environment."""
    key = ' -H "Authorization: Bearer $NBLLM_API_KEY" \\\n    ' if has_key else " "
    body = '{"messages": [{"role": "user", "content": "Hello!"}]}'
    return (
        f"curl {base_url}/chat/completions \\\n   {key}-H 'Content-Type: application/json' \\\n"
        f"    -d '{body}'"
    )


def python_snippet(base_url: str, model: str, *, has_key: bool) -> str:
    """A program that asks the model; the key is read from the environment."""
    key = 'os.environ["NBLLM_API_KEY"]' if has_key else '"none"'
    head = "import os\nimport openai\n\n" if has_key else "import openai\n\n"
    return (
        f"{head}client = openai.OpenAI(base_url={base_url!r}, api_key={key})\n"
        f"reply = client.chat.completions.create(\n    model={model!r},\n"
        '    messages=[{"role": "user", "content": "Hello!"}],\n)\n'
        "reply.choices[0].message.content"
    )


def card(base_url: str, model: str, port: int, *, has_key: bool, state: str) -> str:
    """HTML: where the server is and how to ask it. A click into a snippet selects it."""
    path = proxy_path(port)
    link = path if path is not None else base_url.removesuffix("/v1") + "/"
    rows = [
        f"<b>nbllm</b> serves <code>{escape(model)}</code>, {escape(state)}",
        f"<code>base_url</code>: <code>{escape(base_url)}</code> "
        f'(<a href="{escape(link + "health", quote=True)}" target="_blank" '
        'rel="noopener">is it healthy?</a>)',
    ]
    if has_key:
        rows.append("<code>api_key</code>: in <code>server.api_key</code>, not shown here")
    if path is not None:
        rows.append(
            f"From outside of this machine: your hub's address and <code>{escape(path)}v1</code>, "
            "with the headers <code>Accept: text/event-stream</code> for streams, "
            "<code>Authorization: token ...</code> for the hub and "
            "<code>X-API-Key</code> for this server"
        )
    snippets = (
        ("curl", curl_snippet(base_url, has_key=has_key)),
        ("Python", python_snippet(base_url, model, has_key=has_key)),
    )
    shown = "".join(
        f"<details><summary>{name}</summary>"
        f'<pre style="user-select: all">{escape(text)}</pre></details>'
        for name, text in snippets
    )
    return "<div>" + "".join(f"<div>{row}</div>" for row in rows) + shown + "</div>"
