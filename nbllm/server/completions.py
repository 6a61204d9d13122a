"""/v1/completions."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import Response
from pydantic import Field

from nbllm.errors import InvalidRequestError
from nbllm.outputs import CompletionOutput, RequestOutput
from nbllm.server.generation import Reply, answer, request_id
from nbllm.server.logprobs import LogprobsWriter, prompt_logprobs_body
from nbllm.server.protocol import MAX_LOGPROBS, GenerationRequest, parse_request
from nbllm.server.service import Service

MAX_PROMPTS = 256
MAX_CHOICES = 4096  # of all prompts
_LONG_TEXT_CHARS = 4096  # shorter ones are tokenized sooner than a thread is found


class CompletionRequest(GenerationRequest):
    """The body of /v1/completions."""

    prompt: str | list[str] | list[int] | list[list[int]]
    max_tokens: int | None = Field(default=16, ge=0)  # OpenAI's default
    logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    echo: bool = False
    suffix: str | None = None
    best_of: int | None = None
    add_special_tokens: bool = True
    prompt_embeds: Any = None

    @property
    def scores_prompt(self) -> bool:
        """Whether only the prompt is wanted back: `echo` with no new tokens."""
        return self.echo and self.max_tokens == 0

    def token_limit(self) -> int | None:
        # The engine makes a token in any case; it is dropped.
        return 1 if self.scores_prompt else self.max_tokens

    def logprobs_params(self) -> dict[str, int | None]:
        if self.logprobs is None:
            return {}
        asked = self.prompt_logprobs
        if self.echo and asked != -1:
            asked = max(self.logprobs, asked or 0)
        return {"logprobs": self.logprobs, "prompt_logprobs": asked}

    def check(self) -> None:
        """Raises InvalidRequestError for what is not done here."""
        if self.suffix:
            raise InvalidRequestError("suffix is not supported", parameter="suffix")
        if self.best_of not in (None, self.n):
            raise InvalidRequestError(
                "best_of is not supported, unless it equals n", parameter="best_of"
            )
        if self.prompt_embeds is not None:
            raise InvalidRequestError("prompt_embeds is not supported", parameter="prompt_embeds")
        if self.scores_prompt and self.min_tokens:
            raise InvalidRequestError("min_tokens exceeds max_tokens=0", parameter="min_tokens")

    def prompts(self) -> list[str | list[int]]:
        """The prompts, one or many.

        Raises:
            InvalidRequestError: there is none, or there are too many.
        """
        prompt = self.prompt
        prompts: list[Any] = [prompt] if isinstance(prompt, str) else list(prompt)
        if prompts and isinstance(prompts[0], int):
            prompts = [prompts]
        if not 1 <= len(prompts) <= MAX_PROMPTS:
            raise InvalidRequestError(f"1 to {MAX_PROMPTS} prompts, please", parameter="prompt")
        if len(prompts) * self.n > MAX_CHOICES:
            raise InvalidRequestError(f"more than {MAX_CHOICES} choices in all", parameter="n")
        return prompts


class CompletionReply(Reply):
    """Writes the reply to a completion. The choices of prompt i are i * n to i * n + n - 1."""

    def __init__(self, service: Service, request: CompletionRequest, reply_id: str) -> None:
        super().__init__(
            service,
            request,
            reply_id,
            whole_object="text_completion",
            stream_object="text_completion",
            id_prefix="cmpl-",
        )
        self.counts_new_tokens = not request.scores_prompt
        self._llm = service.llm
        self._request = request
        self._writers: dict[int, LogprobsWriter] = {}  # of the choices that were begun
        self._begun: set[int] = set()

    def choices(self, number: int, output: RequestOutput) -> Iterator[dict[str, Any]]:
        for completion in output.outputs:
            choice = self._choice(number, output, completion)
            choice["prompt_logprobs"] = self._prompt_logprobs(output)
            yield choice

    def deltas(self, number: int, output: RequestOutput) -> Iterator[dict[str, Any]]:
        for completion in output.outputs:
            choice = self._choice(number, output, completion)
            news = ("text", "logprobs", "finish_reason", "token_ids", "prompt_token_ids")
            if any(choice.get(name) for name in news):
                yield choice

    def _choice(
        self, number: int, output: RequestOutput, completion: CompletionOutput
    ) -> dict[str, Any]:
        request = self._request
        index = number * request.n + completion.index
        is_first = index not in self._begun
        self._begun.add(index)
        echoed = request.echo and is_first
        text = "" if request.scores_prompt else completion.text
        token_ids = [] if request.scores_prompt else completion.token_ids
        choice: dict[str, Any] = {
            "index": index,
            "text": self._prompt_text(output) + text if echoed else text,
            "logprobs": self._logprobs(index, output, token_ids, completion, echoed=echoed),
            "finish_reason": completion.finish_reason,
            "stop_reason": completion.stop_reason,
        }
        if request.scores_prompt and completion.finish_reason is not None:
            choice |= {"finish_reason": "length", "stop_reason": None}
        if request.return_token_ids:
            choice["token_ids"] = token_ids
            choice["prompt_token_ids"] = output.prompt_token_ids if is_first else None
        return choice

    def _prompt_text(self, output: RequestOutput) -> str:
        if output.prompt is not None:
            return output.prompt
        return self._llm.get_tokenizer().decode(output.prompt_token_ids, skip_special_tokens=False)

    def _logprobs(
        self,
        index: int,
        output: RequestOutput,
        token_ids: list[int],
        completion: CompletionOutput,
        *,
        echoed: bool,
    ) -> dict[str, Any] | None:
        request = self._request
        if request.logprobs is None:
            return None
        if index not in self._writers:
            self._writers[index] = LogprobsWriter(
                self._llm.get_tokenizer(),
                request.logprobs,
                tokens_as_ids=request.return_tokens_as_token_ids,
            )
        writer = self._writers[index]
        special_ids = self._llm.get_tokenizer().all_special_ids
        body = writer.begin()
        if echoed:
            ids, text = output.prompt_token_ids, output.prompt
            left_out = [i for i in special_ids.intersection(ids) if not _shows(writer, text, i)]
            writer.add_to(body, ids, output.prompt_logprobs or [], left_out)
        skips = request.skip_special_tokens in (None, True)
        entries = (completion.logprobs or [])[: len(token_ids)]
        writer.add_to(body, token_ids, entries, special_ids if skips else ())
        return body

    def _prompt_logprobs(self, output: RequestOutput) -> list[Any] | None:
        if self._request.prompt_logprobs is None:
            return None  # those of an echo are among the logprobs
        return prompt_logprobs_body(output.prompt_logprobs)


def add_routes(app: FastAPI, service: Service) -> None:
    """Add /v1/completions."""

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        parsed = parse_request(await request.body(), CompletionRequest)
        service.check_model(parsed)
        parsed.check()
        params = parsed.sampling_params(service.llm.get_default_sampling_params())
        prompts = await encode(
            service, parsed.prompts(), parsed.add_special_tokens, parsed.truncate_prompt_tokens
        )
        reply = CompletionReply(service, parsed, request_id(request, parsed))
        return await answer(service, request, parsed, prompts, params, reply)


async def encode(
    service: Service,
    prompts: Sequence[str | list[int]],
    add_special_tokens: bool,
    keep: int | None = None,
) -> list[Any]:
    """The prompts of a request as token ids, with their texts; at most the last `keep` ids.

    Raises:
        InvalidRequestError: one can't be tokenized.
    """
    num_chars = sum(len(prompt) for prompt in prompts if isinstance(prompt, str))
    for prompt in prompts:
        if isinstance(prompt, str) and keep in (None, -1):
            service.check_fits(prompt, "prompt")

    def encode_all() -> list[list[int]]:
        return [
            service.llm.get_tokenizer().encode(prompt, add_special_tokens)
            if isinstance(prompt, str)
            else prompt
            for prompt in prompts
        ]

    ids = encode_all() if num_chars < _LONG_TEXT_CHARS else await asyncio.to_thread(encode_all)
    return [
        _prompt(text if isinstance(text, str) else None, token_ids, keep)
        for text, token_ids in zip(prompts, ids, strict=True)
    ]


def _prompt(text: str | None, token_ids: list[int], keep: int | None) -> dict[str, Any]:
    if keep is None or keep == -1 or keep >= len(token_ids):
        return {"prompt": text, "prompt_token_ids": token_ids}
    return {"prompt": None, "prompt_token_ids": token_ids[len(token_ids) - keep :]}


def _shows(writer: LogprobsWriter, text: str | None, token_id: int) -> bool:
    """Whether a special token of a prompt is in its text; None is a text made of all tokens."""
    return text is None or writer.token_text(token_id) in text
