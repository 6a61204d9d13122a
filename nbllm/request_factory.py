"""RequestFactory: encoded prompts -> what the engine runs, one `Request` per continuation."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Collection, Sequence

import numpy as np

from nbllm.config import EngineConfig, ModelConfig
from nbllm.engine.request import Request, StopChecker, TokenConstraint
from nbllm.errors import InvalidRequestError, PromptTooLongError
from nbllm.inputs import EncodedPrompt
from nbllm.pooling_params import PoolingParams
from nbllm.sampling_params import SamplingParams, StructuredOutputsParams

_GOLDEN_64 = 0x9E3779B97F4A7C15  # the step of SplitMix64 (Steele et al., OOPSLA 2014)
_NO_SAMPLING = SamplingParams(temperature=0.0, max_tokens=1)


class RequestFactory:
    """Validates a row against the model's limits and makes its requests.

    Args:
        config: the resolved configuration.
        model_config: vocabulary and end-of-sequence ids.
        tokenize: text -> ids without special tokens, for `bad_words`; None without a tokenizer.
        make_stop_checker: (prompt ids, params) -> a fresh `Request.stop_checker`.
        make_constraint: structured outputs -> a fresh `Request.constraint`; None without a
            tokenizer.
        draw_seed: a 64-bit seed for a request that brings none.
    """

    def __init__(
        self,
        config: EngineConfig,
        model_config: ModelConfig,
        *,
        tokenize: Callable[[str], list[int]] | None,
        make_stop_checker: Callable[[list[int], SamplingParams], StopChecker] | None,
        make_constraint: Callable[[StructuredOutputsParams], TokenConstraint] | None,
        draw_seed: Callable[[], int],
    ) -> None:
        assert config.max_model_len is not None
        self._config = config
        self._max_model_len = config.max_model_len
        self._model_config = model_config
        self._vocab_size = model_config.vocab_size
        self._rope_depends_on_length = model_config.length_rope is not None
        self._eos_token_ids = frozenset(model_config.eos_token_ids)
        self._tokenize = tokenize
        self._make_stop_checker = make_stop_checker
        self._make_constraint = make_constraint
        self._draw_seed = draw_seed
        self._num_made = 0

    def make(
        self,
        row: EncodedPrompt,
        params: SamplingParams,
        *,
        priority: int = 0,
        streaming: bool = False,
    ) -> list[Request]:
        """One request per continuation of `row`.

        Raises:
            InvalidRequestError: prompt or parameters don't fit this model; says which and why.
        """
        if row.error is not None:
            raise row.error
        token_ids = self._check_prompt(row.token_ids, min_new_tokens=1)
        self._check_params(params)
        num_prompt_tokens = len(row.token_ids)
        room = self._max_model_len - num_prompt_tokens
        max_tokens = room if params.max_tokens is None else min(params.max_tokens, room)
        eos = frozenset() if params.ignore_eos else self._eos_token_ids
        bad_words = self._bad_words(params)
        seed = params.seed if params.seed is not None else self._draw_seed()
        number = self._next_number()
        # With caching off, the continuations of one prompt share its pages under their own salt.
        caching = self._config.enable_prefix_caching
        cache_salt = number + 1 if params.n > 1 and not caching else 0
        restart_len, restart_cache_salt = None, 0
        if self._rope_depends_on_length:
            model = self._model_config
            restart_len = model.rope_restart_len(num_prompt_tokens)
            if caching:
                cache_salt = model.rope_cache_salt(num_prompt_tokens)
                restart_cache_salt = model.rope_cache_salt(restart_len or 0)
        requests: list[Request] = []
        for index in range(params.n):
            request = Request(
                request_id=f"{number}-{index}" if params.n > 1 else str(number),
                token_ids=token_ids[:],
                num_prompt_tokens=num_prompt_tokens,
                sampling_params=params,
                max_tokens=max_tokens,
                seed=seed + index * _GOLDEN_64,
                eos_token_ids=eos,
                priority=priority,
                leader=requests[0] if requests else None,
                cache_salt=cache_salt,
                restart_len=restart_len,
                restart_cache_salt=restart_cache_salt,
                bad_words_token_ids=bad_words,
                constraint=self._constraint(params),
                stop_checker=self._stop_checker(row.token_ids, params),
                streaming=streaming,
            )
            if len(row.begun) == params.n:
                self._go_on(request, row.begun[index])
            requests.append(request)
        return requests

    def _go_on(self, request: Request, begun: Sequence[int]) -> None:
        """Put the request where it has generated these tokens.

        One token at least is left to sample: what ends a text is found again.
        """
        limit = request.max_num_tokens
        if request.restart_len is not None:
            limit = min(limit, request.restart_len)
        begun = self._check_ids(begun[: limit - 1 - request.num_tokens], "begun")
        request.token_ids.extend(begun)
        if request.stop_checker is not None:
            request.stop_checker(list(begun))
        if request.constraint is not None:
            for token_id in begun:
                request.constraint.accept(token_id)

    def make_pooling(
        self, row: EncodedPrompt, params: PoolingParams, *, priority: int = 0
    ) -> Request:
        """The request for the embedding of `row`, which may fill `max_model_len`.

        Raises:
            InvalidRequestError: prompt or parameters don't fit this model; says which and why.
        """
        if row.error is not None:
            raise row.error
        token_ids = self._check_prompt(row.token_ids)
        params = self._check_pooling(params)
        cache_salt = 0
        if self._rope_depends_on_length and self._config.enable_prefix_caching:
            cache_salt = self._model_config.rope_cache_salt(len(token_ids))
        return Request(
            request_id=str(self._next_number()),
            token_ids=token_ids,
            num_prompt_tokens=len(token_ids),
            sampling_params=_NO_SAMPLING,
            max_tokens=1,
            seed=0,
            priority=priority,
            cache_salt=cache_salt,
            pooling_params=params,
        )

    def cut(self, token_ids: list[int], num_tokens: int) -> list[int]:
        """So many tokens of a longer prompt to embed: the last ones, where a decoder's vector is;
        for an encoder the first ones, with the last, which ends every text."""
        if self._model_config.is_encoder:
            return token_ids[: num_tokens - 1] + token_ids[-1:]
        return token_ids[-num_tokens:]

    def check_generates(self) -> None:
        """Raise InvalidRequestError if the model is an encoder."""
        model = self._model_config
        if model.is_encoder:
            raise InvalidRequestError(
                f"this model ({model.architecture}) embeds, it does not generate: use embed()",
                parameter="model",
            )

    def prepare(self, params: SamplingParams) -> None:
        """Compile the constraint of `params`, which takes up to a second, ahead of `make`."""
        if self._make_constraint is not None:
            self._constraint(params)

    def _stop_checker(self, token_ids: list[int], params: SamplingParams) -> StopChecker | None:
        if not params.stop:
            return None
        assert self._make_stop_checker is not None
        return self._make_stop_checker(token_ids, params)

    def _constraint(self, params: SamplingParams) -> TokenConstraint | None:
        if params.structured_outputs is None:
            return None
        assert self._make_constraint is not None
        return self._make_constraint(params.structured_outputs)

    def _next_number(self) -> int:
        self._num_made += 1
        return self._num_made - 1

    def _check_prompt(self, token_ids: list[int], *, min_new_tokens: int = 0) -> array[int]:
        if not token_ids:
            raise InvalidRequestError("the prompt is empty", parameter="prompts")
        if len(token_ids) + min_new_tokens > self._max_model_len:
            of_what = " for prompt and output together" if min_new_tokens else ""
            raise PromptTooLongError(
                f"the prompt has {len(token_ids)} tokens, and max_model_len is "
                f"{self._max_model_len}{of_what}: shorten it or raise max_model_len",
                parameter="prompts",
            )
        return self._check_ids(token_ids, "prompt_token_ids")

    def _check_pooling(self, params: PoolingParams) -> PoolingParams:
        """The same, with what it leaves open from the model."""
        if not isinstance(params, PoolingParams):
            raise InvalidRequestError(
                f"pooling_params must be PoolingParams, got {type(params).__name__}",
                parameter="pooling_params",
            )
        size = self._model_config.output_size
        if params.dimensions is not None and params.dimensions > size:
            raise InvalidRequestError(
                f"dimensions={params.dimensions} is more than this model has: {size}",
                parameter="dimensions",
            )
        model = self._model_config
        default = PoolingParams(pooling=model.pooling, normalize=model.normalize)
        params = params.or_default(default)
        if params.pooling == "cls" and not model.is_encoder:
            raise InvalidRequestError(
                f"pooling='cls' is for encoders: the first token of a {model.architecture} sees "
                "nothing of the text",
                parameter="pooling",
            )
        return params

    def _check_params(self, params: SamplingParams) -> None:
        if not isinstance(params, SamplingParams):
            raise InvalidRequestError(
                f"sampling_params must be SamplingParams, got {type(params).__name__}",
                parameter="sampling_params",
            )
        params.verify()
        if params.thinking_token_budget is not None:
            raise InvalidRequestError(
                "thinking_token_budget is not supported yet", parameter="thinking_token_budget"
            )
        limit = self._config.max_logprobs
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(params, name)
            count = self._vocab_size if value == -1 else value
            if count is not None and limit != -1 and count > limit:
                raise InvalidRequestError(
                    f"{name}={value} is more than this LLM reports: it has max_logprobs={limit}",
                    parameter=name,
                )
        for name in ("stop_token_ids", "allowed_token_ids", "logit_bias", "logprob_token_ids"):
            if getattr(params, name):
                self._check_ids(getattr(params, name), name)
        for name in ("stop", "bad_words", "structured_outputs"):
            if getattr(params, name) and self._tokenize is None:
                raise InvalidRequestError(
                    f"{name} needs a tokenizer, and skip_tokenizer_init=True", parameter=name
                )

    def _check_ids(self, ids: Collection[int], parameter: str) -> array[int]:
        """Token ids as C numbers.

        A wrong one would be an out-of-bounds read on the GPU, which kills the whole kernel.
        """
        try:
            packed = array("I", ids)
            if not packed or np.frombuffer(packed, dtype=np.uintc).max() < self._vocab_size:
                return packed
        except OverflowError:  # it is negative
            pass
        wrong = next(token_id for token_id in ids if not 0 <= token_id < self._vocab_size)
        raise InvalidRequestError(
            f"{parameter}: token id {wrong} is not in the vocabulary of {self._vocab_size}",
            parameter=parameter,
        )

    def _bad_words(self, params: SamplingParams) -> list[list[int]]:
        """Each word as it is tokenized at the start of a text and after a space."""
        words: list[list[int]] = []
        for word in params.bad_words or ():
            assert self._tokenize is not None
            bare = word.lstrip()
            for text in (bare, " " + bare):
                ids = self._tokenize(text)
                if ids and ids not in words:
                    words.append(ids)
        return words
