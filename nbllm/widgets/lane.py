"""Lane: one column of a playground, a model and parameters with what they have said."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any

from nbllm.errors import InvalidRequestError
from nbllm.llm import LLM
from nbllm.outputs import CompletionOutput, RequestOutput
from nbllm.request_source import request_source
from nbllm.sampling_params import SamplingParams
from nbllm.widgets.branch_tree import ROOT, BranchTree, Token
from nbllm.widgets.token_reader import TokenReader

Override = SamplingParams | Mapping[str, Any] | None

_AT_ONCE_S = 0.2  # tokens of so long a time are read as they come
_PAUSES = ((1.0, 0.05), (float("inf"), 0.1))  # until so long after the first: seconds between reads


@dataclass(slots=True)
class Job:
    """What a lane is to generate.

    Attributes:
        llm: with which model.
        prompt: in any form that `LLM.astream` takes.
        title: the prompt as text; another one starts another tree.
        params: how.
        kept: tokens after the prompt that are there already.
        is_live: the next live job replaces its branch.
    """

    llm: LLM
    prompt: Any
    title: str
    params: SamplingParams
    kept: list[Token] = field(default_factory=list)
    is_live: bool = False


class Lane:
    """Only the thread of the background loop changes it.

    Args:
        title: what the view shows above it.
        llm: its own model, or None for the playground's.
        override: parameters instead of the playground's, all of them or some.

    Attributes:
        tree: all continuations of the prompt.
        tip: the node of the last token that is shown.
        tokens: what is shown, kept ones and generated ones.
        kept: those of them that the last job started from.
        text: the same as text; ends before a stop string.
        status: "idle", "running", "done", "stopped" or "error".
        error: why the last job failed, or None.
        result: what the engine said to the last job, or None before its first token.
        stats: of the last job: ttft_ms, tokens_per_s, cached (prompt tokens found in the prefix
            cache), seed, finish (reason).
    """

    def __init__(self, title: str, llm: LLM | None = None, override: Override = None) -> None:
        self.title = title
        self.llm = llm
        self.override = override
        self.tree = BranchTree()
        self.tip = ROOT
        self.tokens: list[Token] = []
        self.kept: list[Token] = []
        self.text = ""
        self.status = "idle"
        self.error: Exception | None = None
        self.result: RequestOutput | None = None
        self.stats: dict[str, Any] = {}
        self._is_live = False
        self._live_tip: int | None = None
        self._tree_of: tuple[LLM, str] | None = None
        self._prompt_token_ids: list[int] = []  # without kept tokens
        self._reader: TokenReader | None = None
        self._started = 0.0
        self._first = 0.0

    def params(self, base: SamplingParams) -> SamplingParams:
        """The parameters of this lane where those of the playground are `base`."""
        if self.override is None:
            return base
        if isinstance(self.override, SamplingParams):
            return self.override
        try:
            return base.clone(**self.override)
        except TypeError as error:
            raise InvalidRequestError(str(error), parameter="compare") from error

    def continued(self, kept: list[Token], params: SamplingParams, is_live: bool = False) -> Job:
        """A job that goes on after some tokens of this prompt.

        Raises:
            InvalidRequestError: there was no prompt yet, or a grammar that can't be entered in its
                middle.
        """
        if self._tree_of is None or not self._prompt_token_ids:
            raise InvalidRequestError("there is no text to continue yet", parameter="prompt")
        if params.structured_outputs is not None:
            raise InvalidRequestError(
                "a text with structured_outputs can't be continued from its middle",
                parameter="structured_outputs",
            )
        llm, title = self._tree_of
        return Job(llm, None, title, params, kept, is_live)

    def with_token(self, index: int, token_id: int | None) -> list[Token]:
        """The tokens shown up to a place, and there one of the alternatives, or (None) what is.

        Raises:
            InvalidRequestError: there is no such place, or the token is not among its alternatives.
        """
        if not 0 <= index < len(self.tokens):
            raise InvalidRequestError(f"there is no token {index}", parameter="index")
        token = self.tokens[index]
        if token_id is None or token.token_id == token_id:
            return self.tokens[: index + 1]
        for other in token.alternatives:
            if other.token_id == token_id:
                assert self._tree_of is not None
                reader = TokenReader(
                    self._tree_of[0].get_tokenizer(), self.context(self.tokens[:index])
                )
                (bare,) = reader.read([token_id])
                return [
                    *self.tokens[:index],
                    replace(bare, logprob=other.logprob, alternatives=token.alternatives),
                ]
        raise InvalidRequestError(
            f"token {token_id} is not among the alternatives there", parameter="token_id"
        )

    def context(self, tokens: Sequence[Token]) -> list[int]:
        """The prompt's ids and those of some tokens after it."""
        return self._prompt_token_ids + [token.token_id for token in tokens]

    def begin(self, job: Job) -> None:
        """Show what a job starts from."""
        if self._live_tip is not None and self._live_tip in self.tree:
            if job.is_live:
                self.tree.discard(self._live_tip)
            else:
                self.tree.end(self._live_tip)
        self._is_live, self._live_tip = job.is_live, None
        if (
            self._tree_of is None
            or self._tree_of[0] is not job.llm
            or self._tree_of[1] != job.title
        ):
            self._tree_of = (job.llm, job.title)
            self.tree = BranchTree(job.title)
            self._prompt_token_ids = []
        self._show(self.tree.extend(ROOT, job.kept))
        self.kept = job.kept
        self.status, self.error, self.result, self._reader = "running", None, None, None
        self.stats = {"seed": job.params.seed}
        self._started = time.perf_counter()

    async def run(self, job: Job, on_tokens: Callable[[], None]) -> None:
        """Generate; `on_tokens` is called whenever there are more of them. Cancelling aborts it."""
        prompt = job.prompt
        if job.kept:
            prompt = {"prompt_token_ids": self.context(job.kept)}
        request_source.set("widget")  # in the context of the task that runs this
        async with aclosing(job.llm.astream(prompt, job.params)) as outputs:  # type: ignore[type-var]
            async for output in outputs:
                if self._take(job, output):
                    on_tokens()
                if not output.finished:
                    await asyncio.sleep(self._pause_s(job))

    def _pause_s(self, job: Job) -> float:
        """How long not to look for more tokens, each look being taken from the engine's time.

        Not longer than to the last one, as far as that is known.
        """
        elapsed = time.perf_counter() - self._first
        if elapsed < _AT_ONCE_S:
            return 0.0
        pause = next(pause for end, pause in _PAUSES if elapsed < end)
        assert self.result is not None
        rate, limit = self.stats.get("tokens_per_s", 0.0), job.params.max_tokens
        if limit is None or not rate:
            return pause
        num_left = limit - len(self.result.outputs[0].token_ids)
        return min(pause, max(num_left - 2, 0) / rate)

    def finish(self, status: str, error: Exception | None = None) -> None:
        """Say how the job ended."""
        self.status, self.error = status, error
        if not self._is_live:
            self.tree.end(self.tip)

    def select(self, node: int) -> None:
        """Show another continuation of the tree; InvalidRequestError if it has no such node."""
        if node not in self.tree:
            raise InvalidRequestError(f"there is no node {node}", parameter="node")
        self._show(node)
        self.status, self.error, self.stats, self.kept = "done", None, {}, []

    def edited(self, text: str) -> list[Token]:
        """The tokens of an edited text: those shown as far as they still fit, then new ones."""
        kept: list[Token] = []
        position = 0
        for token in self.tokens:
            if token.is_special or not text.startswith(token.text, position):
                break
            kept.append(token)
            position += len(token.text)
        if position < len(text):
            # The token before the change may be one with what follows now. A part of a character
            # has no text of its own: it goes with the rest.
            while kept:
                removed = kept.pop()
                position -= len(removed.text)
                if removed.text and (not kept or kept[-1].text):
                    break
        if self._tree_of is None:
            raise InvalidRequestError("there is no text to edit yet", parameter="text")
        tokenizer = self._tree_of[0].get_tokenizer()
        reader = TokenReader(tokenizer, self.context(kept))
        return kept + reader.read(tokenizer.encode(text[position:], add_special_tokens=False))

    def _show(self, node: int) -> None:
        self.tip, self.tokens = node, self.tree.tokens(node)
        self.text = "".join(token.text for token in self.tokens if not token.is_special)

    def _take(self, job: Job, output: RequestOutput) -> bool:
        """Take in what is new; True if there are more tokens."""
        if self._reader is None:
            self._first = time.perf_counter()
            self.stats["ttft_ms"] = 1000 * (self._first - self._started)
            self.stats["cached"] = output.num_cached_tokens
            num_prompt_tokens = len(output.prompt_token_ids) - len(job.kept)
            self._prompt_token_ids = output.prompt_token_ids[:num_prompt_tokens]
            self._reader = TokenReader(job.llm.get_tokenizer(), output.prompt_token_ids)
        self.result = _joined(self.result, output)
        if not output.outputs:
            return False
        new = output.outputs[0]
        tokens = self._reader.read(new.token_ids, new.logprobs)
        self.tokens += tokens
        self.tip = self.tree.extend(self.tip, tokens)
        self.text += new.text
        if job.is_live:
            self._live_tip = self.tip
        num_tokens = len(self.result.outputs[0].token_ids)
        elapsed = time.perf_counter() - self._first
        if num_tokens > 1 and elapsed > 0:
            self.stats["tokens_per_s"] = (num_tokens - 1) / elapsed
        self.stats["finish"] = new.finish_reason
        return bool(tokens)


def _joined(before: RequestOutput | None, new: RequestOutput) -> RequestOutput:
    """What is known of a request, from what was known and what is new."""
    if before is None:
        if not new.outputs:
            new.outputs.append(CompletionOutput(0, "", [], logprobs=[]))
        return new
    known = before.outputs[0]
    for piece in new.outputs:
        known.text += piece.text
        known.token_ids += piece.token_ids
        if known.logprobs is not None:
            known.logprobs += piece.logprobs or []
        known.cumulative_logprob = piece.cumulative_logprob
        known.finish_reason, known.stop_reason = piece.finish_reason, piece.stop_reason
    before.finished, before.metrics = new.finished, new.metrics
    return before
