"""The tools that `compare_dataframes.py` compares, each as its documentation uses it."""

from __future__ import annotations

import asyncio
import json
import os
import urllib.request
from pathlib import Path
from typing import Any

import pandas as pd

CONTEXT = 4096
MAX_TOKENS = 16
INSTRUCTION = "Answer the question."


class Nbllm:
    """df.llm, and an engine in this process."""

    def __init__(self, task: dict[str, Any]) -> None:
        import nbllm

        self._nbllm = nbllm
        self.llm = nbllm.LLM(task["model"], dtype="float32")
        self._params = nbllm.SamplingParams(temperature=0, max_tokens=MAX_TOKENS)
        self.recorded: list[dict[str, Any]] = []

    def ask(self, cells: list[Any], *, keep: bool = False) -> list[Any]:
        frame = pd.DataFrame({"question": pd.Series(cells, dtype=object)})
        journal = "compare" if keep else None
        answered = frame.llm.generate(
            "question", self._params, llm=self.llm, journal=journal, use_tqdm=False
        )
        return list(answered["llm"])

    def replay(self, requests: list[dict[str, Any]]) -> list[str]:
        """Answers to the messages, and in the forms, that another tool has sent."""
        forms = [request.get("schema") for request in requests]
        structured = [f and self._nbllm.StructuredOutputsParams(json=f) for f in forms]
        params = [
            self._nbllm.SamplingParams(
                temperature=0, max_tokens=request["max_tokens"], structured_outputs=form
            )
            for request, form in zip(requests, structured, strict=True)
        ]
        frame = pd.DataFrame({"messages": [request["messages"] for request in requests]})
        answered = frame.llm.chat("messages", params, llm=self.llm, use_tqdm=False)
        return list(answered["llm"])

    def num_done(self) -> int:
        metrics = self.llm.get_metrics()
        return int(metrics["request_success_stop"] + metrics["request_success_length"])

    def partial(self) -> list[Any]:
        """What an interrupted call has left to the user."""
        return list(self._nbllm.last["llm"])


class ServerTool:
    """A tool that asks our server."""

    def __init__(self, task: dict[str, Any]) -> None:
        self._task = task
        self.recorded: list[dict[str, Any]] = []

    def num_done(self) -> int:
        url = self._task["base_url"].removesuffix("/v1") + "/metrics"
        headers = {"Authorization": f"Bearer {self._task['api_key']}"}
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers)) as reply:
            lines = reply.read().decode().splitlines()
        wanted = ('finished_reason="stop"', 'finished_reason="length"')
        counts = [line for line in lines if line.startswith("nbllm:request_success_total")]
        return int(sum(float(c.split()[-1]) for c in counts if any(w in c for w in wanted)))

    def partial(self) -> list[Any]:
        """Both raise, with no partial result; what they keep is in a cache, if they got one."""
        return []


class Openaivec(ServerTool):
    """`series.aio.responses`: up to eight requests at once, each with `batch_size` rows."""

    def __init__(self, task: dict[str, Any]) -> None:
        super().__init__(task)
        import httpx
        import litellm  # has the files that tiktoken would fetch
        import openaivec
        from openai import AsyncOpenAI
        from openaivec import pandas_ext

        folder = Path(litellm.__file__).parent / "litellm_core_utils" / "tokenizers"
        os.environ["TIKTOKEN_CACHE_DIR"] = str(folder)
        http = httpx.AsyncClient(event_hooks={"request": [self._record]}, timeout=600)
        client = AsyncOpenAI(
            base_url=task["base_url"], api_key=task["api_key"], http_client=http, max_retries=0
        )
        openaivec.set_async_client(client)
        openaivec.set_responses_model(task["model_name"])
        self._batch_size = task["batch_size"]
        self._cache = pandas_ext.AsyncBatchCache(batch_size=self._batch_size, show_progress=False)
        self._runner = asyncio.Runner()

    def ask(self, cells: list[Any], *, keep: bool = False) -> list[Any]:
        options: dict[str, Any] = {
            "temperature": 0,
            "max_output_tokens": 64 * self._batch_size,
            "extra_body": {"text": {"format": self._form()}},
        }
        aio = pd.Series(cells, dtype=object).aio
        if keep:
            call = aio.responses_with_cache(INSTRUCTION, self._cache, **options)
        else:
            options |= {"batch_size": self._batch_size, "show_progress": False}
            call = aio.responses(INSTRUCTION, **options)
        return list(self._runner.run(call))

    def _form(self) -> dict[str, Any]:
        """openaivec's own, but the ids are those of the rows, and the bodies end."""
        bodies = {"type": "string", "maxLength": 4}
        items = [
            _object({"id": {"const": number}, "body": bodies}) for number in range(self._batch_size)
        ]
        size = {"minItems": self._batch_size, "maxItems": self._batch_size}
        messages = {"type": "array", "prefixItems": items, "items": False, **size}
        schema = _object({"assistant_messages": messages})
        return {"type": "json_schema", "name": "ResponseT", "strict": True, "schema": schema}

    async def _record(self, request: Any) -> None:
        body = json.loads(request.content)
        messages = [
            {"role": "system", "content": body["instructions"]},
            {"role": "user", "content": body["input"]},
        ]
        rows = [row["body"] for row in json.loads(body["input"])["user_messages"]]
        schema, most = body["text"]["format"]["schema"], body["max_output_tokens"]
        self.recorded.append(
            {"messages": messages, "schema": schema, "max_tokens": most, "rows": rows}
        )


class Lotus(ServerTool):
    """`df.sem_map`: up to 64 requests at once."""

    def __init__(self, task: dict[str, Any]) -> None:
        super().__init__(task)
        import lotus
        from lotus.models import LM

        recorded = self.recorded

        class RecordingLM(LM):  # type: ignore[misc]
            def __call__(self, messages: Any, *args: Any, **options: Any) -> Any:
                recorded.extend({"messages": m, "max_tokens": MAX_TOKENS} for m in messages)
                return super().__call__(messages, *args, **options)

        self._settings = lotus.settings
        model = RecordingLM(
            model=f"hosted_vllm/{task['model_name']}",
            api_base=task["base_url"],
            api_key=task["api_key"],
            max_ctx_len=CONTEXT,
            max_tokens=MAX_TOKENS,
        )
        lotus.settings.configure(lm=model)

    def ask(self, cells: list[Any], *, keep: bool = False) -> list[Any]:
        self._settings.configure(enable_cache=keep)
        frame = pd.DataFrame({"question": pd.Series(cells, dtype=object)})
        return list(frame.sem_map("Answer the {question}.")["_map"])


def _object(properties: dict[str, Any]) -> dict[str, Any]:
    names = list(properties)
    closed = {"additionalProperties": False, "required": names}
    return {"type": "object", "properties": properties, **closed}
