"""Embedder: the methods of `LLM` that turn prompts into vectors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Iterable, Iterator, Sequence
from typing import Any, cast

from nbllm.checks import check_int, fail
from nbllm.config import EngineConfig, ModelConfig
from nbllm.embedding_call import EmbeddingCall
from nbllm.engine_call import check_errors, make_rows
from nbllm.errors import Interrupted
from nbllm.inputs import Prompt, as_rows
from nbllm.outputs import EmbeddingRequestOutput
from nbllm.pooling_params import PoolingParams


class Embedder(ABC):
    """Encoders embed text, and any model that generates it embeds it, too; how well is a matter of
    its training.

    Prompts to embed are in the same batch as those that generate.

    Attributes:
        config: the resolved `EngineConfig`.
        model_config: shape of the model.
    """

    config: EngineConfig
    model_config: ModelConfig

    def get_default_pooling_params(self) -> PoolingParams:
        """What sentence-transformers' files in the model's folder say; without them, normalized,
        the first token of an encoder (its [CLS]) and the last of a decoder."""
        model = self.model_config
        return PoolingParams(pooling=model.pooling, normalize=model.normalize)

    def embed(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        pooling_params: PoolingParams | Sequence[PoolingParams] | None = None,
        use_tqdm: Any = True,
        truncate_prompt_tokens: int | None = None,
        priority: Sequence[int] | None = None,
    ) -> list[EmbeddingRequestOutput]:
        """One vector for each prompt, in the prompts' order; returns when all are done.

        Args:
            prompts, use_tqdm, priority: as in `LLM.generate`.
            pooling_params: one for all prompts, or one each; None is `PoolingParams()`, the
                model's own, see `get_default_pooling_params`.
            truncate_prompt_tokens: take only so many tokens of a longer prompt: the last ones; for
                an encoder the first ones, with the last, its [SEP]. -1 is `max_model_len`, which a
                prompt may fill; None cuts nothing.

        Returns:
            one `EmbeddingRequestOutput` per prompt, whose vector is `.outputs.embedding`. A row
            that is wrong has its `error` set and does not affect the others.

        Raises:
            InvalidRequestError: a single prompt (not in a list) is wrong, or the arguments do
                not fit together.
            Interrupted: Ctrl-C; `.partial` holds the outputs so far (None where unfinished).
            EngineClosedError, EngineDeadError: no more requests are taken.
        """
        outputs: list[EmbeddingRequestOutput | None] = []
        try:
            rows, is_single = as_rows(prompts)
            outputs += [None] * len(rows)
            call = self._open(rows, pooling_params, truncate_prompt_tokens, priority)
            call.fill(outputs, "Embedding", use_tqdm)
            finished = cast("list[EmbeddingRequestOutput]", outputs)
            check_errors(finished, is_single)
            return finished
        except KeyboardInterrupt:
            raise Interrupted(partial=outputs) from None  # in what line is of no interest

    def embed_iter(
        self,
        prompts: Iterable[Any],
        *,
        pooling_params: PoolingParams | Iterable[PoolingParams] | None = None,
        truncate_prompt_tokens: int | None = None,
        priority: Iterable[int] | None = None,
    ) -> Iterator[tuple[int, EmbeddingRequestOutput]]:
        """Yield `(row number, output)` for each prompt as it finishes, as `LLM.generate_iter`."""
        with self._open(prompts, pooling_params, truncate_prompt_tokens, priority) as call:
            yield from call.results()

    async def aembed(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        pooling_params: PoolingParams | Sequence[PoolingParams] | None = None,
        truncate_prompt_tokens: int | None = None,
        priority: Sequence[int] | None = None,
    ) -> list[EmbeddingRequestOutput]:
        """`embed` for any event loop; cancelling the task aborts the requests."""
        rows, is_single = as_rows(prompts)
        outputs: list[Any] = [None] * len(rows)
        with self._open(rows, pooling_params, truncate_prompt_tokens, priority) as call:
            async for number, output in call.aresults():
                outputs[number] = output
        check_errors(outputs, is_single)
        return outputs

    async def aembed_iter(
        self,
        prompts: Iterable[Any],
        *,
        pooling_params: PoolingParams | Iterable[PoolingParams] | None = None,
        truncate_prompt_tokens: int | None = None,
        priority: Iterable[int] | None = None,
    ) -> AsyncGenerator[tuple[int, EmbeddingRequestOutput], None]:
        """`embed_iter` for any event loop."""
        with self._open(prompts, pooling_params, truncate_prompt_tokens, priority) as call:
            async for item in call.aresults():
                yield item

    @abstractmethod
    def _embedding_call(
        self, rows: Iterator[tuple[object, PoolingParams, int]], max_prompt_tokens: int | None
    ) -> EmbeddingCall:
        """A call of this `LLM`."""

    def _open(
        self,
        prompts: Iterable[Any],
        pooling_params: PoolingParams | Iterable[PoolingParams] | None,
        truncate_prompt_tokens: int | None,
        priority: Iterable[int] | None,
    ) -> EmbeddingCall:
        keep = self._max_prompt_tokens(truncate_prompt_tokens)
        params: Any = PoolingParams() if pooling_params is None else pooling_params
        return self._embedding_call(make_rows(prompts, params, priority, "pooling_params"), keep)

    def _max_prompt_tokens(self, truncate_prompt_tokens: int | None) -> int | None:
        """How much of a longer prompt is taken; InvalidRequestError for what is no such number."""
        keep = truncate_prompt_tokens
        if keep is None:
            return None
        longest = self.config.max_model_len
        keep = check_int("truncate_prompt_tokens", keep, minimum=-1, maximum=longest)
        if keep == 0:
            fail("truncate_prompt_tokens", "must leave something of the prompt, got 0")
        return longest if keep == -1 else keep
