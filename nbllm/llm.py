"""LLM: a model in the notebook's kernel, with vLLM's interface.

Longer than other files: a class has all that users call in one place, and most of it is docstrings.
"""

from __future__ import annotations

import random
import weakref
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from nbllm.beam_search import beam_search
from nbllm.config import EngineConfig, ModelConfig
from nbllm.embedder import Embedder
from nbllm.embedding_call import EmbeddingCall
from nbllm.engine.engine_thread import EngineThread
from nbllm.engine.loading import LoadedEngine, load_engine
from nbllm.engine_call import make_rows, raise_errors
from nbllm.engine_monitor import EngineMonitor
from nbllm.errors import Interrupted, InvalidRequestError
from nbllm.generation_call import GenerationCall, Row, check_outputs
from nbllm.hub import resolve_model
from nbllm.inputs import EncodedPrompt, Prompt, RenderedChat, as_rows, encode_prompts
from nbllm.model_identity import model_identity
from nbllm.notebook_cell import NotebookCell, current_cell
from nbllm.output_processor import make_stop_checker
from nbllm.outputs import BeamSearchOutput, RequestOutput
from nbllm.pooling_params import PoolingParams
from nbllm.request_factory import RequestFactory
from nbllm.sampling_params import BeamSearchParams, RequestOutputKind, SamplingParams
from nbllm.structured.constraint import GrammarCompiler
from nbllm.tokenizer import Tokenizer

if TYPE_CHECKING:
    from nbllm.server.handle import Server

Message = Mapping[str, Any]

_live: weakref.WeakValueDictionary[int, LLM] = weakref.WeakValueDictionary()
_numbers = count()  # of the LLMs, in the order in which they were made


class LLM(Embedder, EngineMonitor):
    """Loads a model and generates text with it, many requests at once.

    All methods may be called from any thread, and all calls share one continuous batch. A notebook
    cell that is run again closes the `LLM` that its earlier run made.

    Args:
        model: the bundled demo model if None; else a local folder or a name on the hub.
        tokenizer: where the tokenizer is, if not with the model.
        tokenizer_mode: "auto" (the only mode).
        skip_tokenizer_init: work with token ids only.
        trust_remote_code: must be False; code from a model's folder is never run.
        revision: branch, tag or commit on the hub.
        tokenizer_revision: the same for `tokenizer`.
        hf_token: access token for the hub.
        download_dir: cache folder for downloads.
        load_format: "auto", "safetensors", "pt", or "dummy" (random weights from the
            configuration alone, for benchmarks).
        chat_template: Jinja text to use instead of the tokenizer's.
        **options: the fields of `EngineConfig`: dtype, device, max_model_len, max_num_seqs,
            gpu_memory_utilization, enable_prefix_caching, seed, ...

    Attributes:
        config: the resolved `EngineConfig`.
        model_config: shape of the model.
        model_name: what was asked for, or "nbllm-demo".

    Raises:
        ModelLoadError: the model can't be found or read.
        OutOfMemoryError: the configuration does not fit; says what to lower.
        InvalidRequestError: an option has a wrong value.
        TypeError: there is no such option.
    """

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        tokenizer: str | Path | None = None,
        tokenizer_mode: str = "auto",
        skip_tokenizer_init: bool = False,
        trust_remote_code: bool = False,
        revision: str | None = None,
        tokenizer_revision: str | None = None,
        hf_token: str | bool | None = None,
        download_dir: str | Path | None = None,
        load_format: str = "auto",
        chat_template: str | None = None,
        **options: Any,
    ) -> None:
        config = EngineConfig.from_options(options)
        if tokenizer_mode != "auto":
            raise InvalidRequestError("tokenizer_mode must be 'auto'", parameter="tokenizer_mode")
        if trust_remote_code:
            raise InvalidRequestError(
                "nbllm never runs code from a model's folder: leave trust_remote_code out",
                parameter="trust_remote_code",
            )
        source: dict[str, Any] = {"token": hf_token, "cache_dir": download_dir}
        folder = resolve_model(model, revision=revision, load_format=load_format, **source)
        self._cell = current_cell()
        _close_earlier_run(self._cell)
        self._tokenizer: Tokenizer | None = None
        if not skip_tokenizer_init:
            tokenizer_folder = folder
            if tokenizer is not None:
                tokenizer_folder = resolve_model(
                    tokenizer, revision=tokenizer_revision, load_format="tokenizer", **source
                )
            self._tokenizer = Tokenizer.from_folder(tokenizer_folder)
        self._folder, self._load_format = folder, load_format
        loaded = load_engine(folder, config, load_format=load_format)
        self._start(loaded, "nbllm-demo" if model is None else str(model), chat_template)

    def _start(self, loaded: LoadedEngine, name: str, chat_template: str | None) -> None:
        self.config: EngineConfig = loaded.engine.config
        self.model_config: ModelConfig = loaded.model_config
        self.model_name = name
        self.chat_template = chat_template
        self._servers: weakref.WeakSet[Server] = weakref.WeakSet()  # threads hold them
        self._thread = EngineThread(loaded.engine)
        # Not a bound method: the finalizer must not keep `self` alive.
        self._finalizer = weakref.finalize(self, EngineThread.close, self._thread)
        tokenizer = self._tokenizer
        names = "tokenize", "make_stop_checker", "make_constraint"
        for_text: dict[str, Any] = dict.fromkeys(names)
        if tokenizer is not None:
            vocab_size, eos_ids = self.model_config.vocab_size, self.model_config.eos_token_ids
            compiler = GrammarCompiler(tokenizer.backend.to_str, vocab_size, eos_ids)
            for_text["tokenize"] = partial(tokenizer.encode, add_special_tokens=False)
            for_text["make_stop_checker"] = partial(make_stop_checker, tokenizer)
            for_text["make_constraint"] = compiler.compile
        self._factory = RequestFactory(
            self.config, self.model_config, draw_seed=_seed_source(self.config.seed), **for_text
        )
        _live[next(_numbers)] = self

    # -- generating ---------------------------------------------------------------------------

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: Any = True,
        priority: Sequence[int] | None = None,
    ) -> list[RequestOutput]:
        """Generate for one prompt or many; returns when all are done, in the prompts' order.

        Args:
            prompts: str, token ids, `{"prompt": str}`, `{"prompt_token_ids": list}`, or a list
                of those.
            sampling_params: one for all prompts, or one each; None is
                `get_default_sampling_params()`.
            use_tqdm: show progress; or a callable that makes a tqdm-like bar.
            priority: one number per prompt, lower first (with scheduling_policy="priority").

        Returns:
            one `RequestOutput` per prompt. A row that is wrong has its `error` set and does not
            affect the others.

        Raises:
            InvalidRequestError: a single prompt (not in a list) is wrong, or the arguments do
                not fit together.
            Interrupted: Ctrl-C; `.partial` holds the outputs so far (None where unfinished).
            EngineClosedError, EngineDeadError: no more requests are taken.
        """
        outputs: list[RequestOutput | None] = []
        try:
            rows, is_single = as_rows(prompts)
            outputs += [None] * len(rows)
            call = self._call(self._rows(rows, sampling_params, priority))
            call.fill(outputs, "Generating", use_tqdm)
            finished = cast("list[RequestOutput]", outputs)
            return check_outputs(finished, is_single, self.config.max_model_len)
        except KeyboardInterrupt:
            raise Interrupted(partial=outputs) from None  # in what line is of no interest

    def generate_iter(
        self,
        prompts: Iterable[Any],
        sampling_params: SamplingParams | Iterable[SamplingParams] | None = None,
        *,
        priority: Iterable[int] | None = None,
    ) -> Iterator[tuple[int, RequestOutput]]:
        """Yield `(row number, output)` for each prompt as it finishes.

        `prompts` may be lazy: rows are taken as the engine needs them. Closing the iterator
        aborts what still runs.
        """
        with self._call(self._rows(prompts, sampling_params, priority)) as call:
            yield from call.results()

    def stream(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None
    ) -> Iterator[RequestOutput]:
        """Yield the output of one prompt again and again as it grows.

        Each item holds everything so far, or with `output_kind=DELTA` what is new. Closing the
        iterator aborts the request.
        """
        params = sampling_params or self.get_default_sampling_params()
        with self._call([(prompt, params, 0)], params.output_kind) as call:
            yield from raise_errors(call.submit())
            while call.is_waiting:
                yield from raise_errors(call.absorb(call.stream.take()))

    async def agenerate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        priority: Sequence[int] | None = None,
    ) -> list[RequestOutput]:
        """`generate` for any event loop; cancelling the task aborts the requests."""
        rows, is_single = as_rows(prompts)
        outputs: list[Any] = [None] * len(rows)
        with self._call(self._rows(rows, sampling_params, priority)) as call:
            async for index, output in call.aresults():
                outputs[index] = output
        return check_outputs(outputs, is_single, self.config.max_model_len)

    async def astream(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None, *, priority: int = 0
    ) -> AsyncIterator[RequestOutput]:
        """`stream` for any event loop."""
        params = sampling_params or self.get_default_sampling_params()
        with self._call([(prompt, params, priority)], params.output_kind) as call:
            for output in raise_errors(call.submit()):
                yield output
            while call.is_waiting:
                for output in raise_errors(call.absorb(await call.stream.take_async())):
                    yield output

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: Any = True,
        **template_options: Any,
    ) -> list[RequestOutput]:
        """Answer one conversation (a list of messages) or many (a list of those).

        Args:
            messages: `{"role": ..., "content": ...}` dicts.
            sampling_params: as in `generate`.
            use_tqdm: as in `generate`.
            **template_options: as in `render_chat`.

        Raises:
            InvalidRequestError: there is no chat template, or it refuses a single conversation.
        """
        is_single = not messages or isinstance(messages[0], Mapping)
        conversations = [messages] if is_single else messages
        prompts: list[Any] = []
        for conversation in conversations:
            try:
                prompts.append(
                    self.render_chat(cast("Sequence[Message]", conversation), **template_options)
                )
            except InvalidRequestError as error:
                if is_single:
                    raise
                prompts.append(EncodedPrompt(None, [], error))
        return self.generate(
            prompts[0] if is_single else prompts, sampling_params, use_tqdm=use_tqdm
        )

    def encode_chat(self, messages: Sequence[Message], **template_options: Any) -> dict[str, Any]:
        """Render and tokenize a conversation: `{"prompt": text, "prompt_token_ids": ids}`.

        Arguments and errors are those of `render_chat`.
        """
        text = self.render_chat(messages, **template_options).text
        return {"prompt": text, "prompt_token_ids": self.get_tokenizer().encode(text, False)}

    def render_chat(
        self,
        messages: Sequence[Message],
        *,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> RenderedChat:
        """Render a conversation to a prompt of `generate`, which tokenizes many of them at once.

        Args:
            messages: the conversation.
            chat_template: Jinja text; default that of the LLM, then the tokenizer's.
            add_generation_prompt: end with the opening of the assistant's turn.
            continue_final_message: leave the last message open, to be continued.
            tools: JSON-schema descriptions of functions, for templates that know tools.
            chat_template_kwargs: further variables for the template.

        Raises:
            InvalidRequestError: no template, or the template refuses the conversation.
        """
        tokenizer = self.get_tokenizer()
        text = tokenizer.apply_chat_template(
            messages,
            chat_template=chat_template or self.chat_template,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tools=tools,
            chat_template_kwargs=chat_template_kwargs,
        )
        return RenderedChat(text)

    def beam_search(
        self, prompts: Prompt | Sequence[Prompt], params: BeamSearchParams
    ) -> list[BeamSearchOutput]:
        """The `beam_width` most probable continuations of each prompt, best first."""
        return [beam_search(self, prompt, params) for prompt in as_rows(prompts)[0]]

    def serve(self, **options: Any) -> Server:
        """Serve OpenAI's API over this `LLM` from a thread; see `nbllm.server.serve.serve`.

        The server stops with `Server.stop()` or with this `LLM`.
        """
        from nbllm.server.serve import serve

        if self._thread.error is not None:
            raise self._thread.error
        server = serve(self, **options)
        self._servers.add(server)
        return server

    # -- state --------------------------------------------------------------------------------

    @property
    def servers(self) -> list[Server]:
        """Those of `serve` that run."""
        return [server for server in list(self._servers) if server.is_running]

    def get_tokenizer(self) -> Tokenizer:
        """The tokenizer; InvalidRequestError with `skip_tokenizer_init`."""
        if self._tokenizer is None:
            raise InvalidRequestError(
                "this LLM has no tokenizer (skip_tokenizer_init=True)", parameter="tokenizer"
            )
        return self._tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """What the model's `generation_config.json` recommends."""
        return SamplingParams.from_generation_config(self.model_config.generation_config)

    @cached_property
    def identity(self) -> str:
        """Stands for all that decides a text beside the request, see `model_identity`."""
        kind, dtype = self.config.device.split(":")[0], str(self.config.dtype)
        return model_identity(self._folder, kind, dtype, self._load_format)

    def prepare(self, sampling_params: SamplingParams) -> None:
        """Compile the grammar of `sampling_params`, for who must not wait for it in a call."""
        self._factory.prepare(sampling_params)

    def reset_prefix_cache(self) -> None:
        """Forget all cached prefixes."""
        self._thread.call(lambda engine: engine.block_manager.drop_cached_prefixes())

    def close(self) -> None:
        """End all requests and give the memory back. Idempotent; also at the end of `with`."""
        for server in list(self._servers):
            server.stop()
        self._finalizer()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "" if self._thread.error is None else ", closed"
        return f"LLM({self.model_name!r}, {self.config.device}, {self.config.dtype}{state})"

    # -- the pieces ---------------------------------------------------------------------------

    def _call(
        self,
        rows: Iterable[Row],
        output_kind: RequestOutputKind = RequestOutputKind.FINAL_ONLY,
    ) -> GenerationCall:
        return GenerationCall(
            rows, tokenizer=self._tokenizer, output_kind=output_kind, **self._engine()
        )

    def _embedding_call(
        self, rows: Iterable[tuple[object, PoolingParams, int]], max_prompt_tokens: int | None
    ) -> EmbeddingCall:
        return EmbeddingCall(rows, max_prompt_tokens=max_prompt_tokens, **self._engine())

    def _engine(self) -> dict[str, Any]:
        """What every call works with; raises if the engine takes no more."""
        if self._thread.error is not None:
            raise self._thread.error
        assert self.config.max_num_seqs is not None
        return {
            "encode": self._encode,
            "factory": self._factory,
            "thread": self._thread,
            "max_in_flight": max(4 * self.config.max_num_seqs, 512),
        }

    def _rows(
        self,
        prompts: Iterable[Any],
        sampling_params: SamplingParams | Iterable[SamplingParams] | None,
        priority: Iterable[int] | None,
    ) -> Iterator[Row]:
        if sampling_params is None:
            sampling_params = self.get_default_sampling_params()
        return make_rows(prompts, sampling_params, priority)

    def _encode(self, prompts: list[Any]) -> list[EncodedPrompt]:
        encode_batch = self._tokenizer.encode_batch if self._tokenizer is not None else None
        return encode_prompts(prompts, encode_batch)


def _close_earlier_run(cell: NotebookCell | None) -> None:
    """A cell that is run again replaces its `LLM`: free the old one before sizing the new one."""
    for llm in list(_live.values()):
        if cell is not None and llm._cell is not None and cell.is_rerun_of(llm._cell):
            llm.close()


def open_llms() -> list[LLM]:
    """The `LLM`s of this kernel that are still open, in the order in which they were made."""
    return [llm for _, llm in sorted(_live.items()) if llm._thread.error is None]


def last_created_llm() -> LLM | None:
    """The `LLM` of this kernel that was made last and is still open, or None."""
    return next(reversed(open_llms()), None)


def _seed_source(seed: int) -> Any:
    source = random.Random(seed)
    return lambda: source.getrandbits(64)
