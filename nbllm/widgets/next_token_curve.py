"""NextTokenCurve: what sampling parameters do to the odds of the next token.

The engine is asked once, for the log-probabilities of the whole vocabulary. What temperature and
filters make of them is arithmetic, the same as in the sampler, so moving a slider costs no forward
pass.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Collection
from dataclasses import dataclass
from itertools import repeat
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nbllm.llm import LLM
from nbllm.sampling_params import SamplingParams

_CHUNK = 128  # ids whose log-probabilities one request may ask for
_NUM_BARS = 12
_MAX_LABEL = 18  # characters
# Positions in the picture, in its own units.
_WIDTH, _ROW, _TOP, _LEFT, _RIGHT = 560, 20, 42, 140, 130
# Parameters that depend on more than the next token's odds.
_NOT_SHOWN = ("repetition_penalty", "bad_words", "structured_outputs")


@dataclass(frozen=True, slots=True)
class TokenOdds:
    """One bar.

    Attributes:
        text: the token, blanks and line breaks made visible.
        model: its probability at temperature 1 without any filter.
        sampled: the probability that it is drawn.
    """

    text: str
    model: float
    sampled: float


@dataclass(frozen=True, slots=True)
class CurveSummary:
    """What is shown of a distribution.

    Attributes:
        bars: the tokens that are likeliest to the model, best first.
        num_survivors: tokens that can be drawn at all.
        vocab_size: of all.
        entropy: of what is drawn from, in bits.
        not_shown: names of parameters in effect that the picture leaves out.
    """

    bars: list[TokenOdds]
    num_survivors: int
    vocab_size: int
    entropy: float
    not_shown: tuple[str, ...]


class NextTokenCurve:
    """The next token's distribution after one prompt, under any parameters.

    Args:
        logprobs: [vocab_size] of the model, at temperature 1.
        token_text: the text of an id.
        eos_token_ids: what `min_tokens` forbids.
    """

    def __init__(
        self,
        logprobs: NDArray[np.float64],
        token_text: Callable[[int], str],
        eos_token_ids: Collection[int] = (),
    ) -> None:
        self.logprobs = np.asarray(logprobs, dtype=np.float64)
        self._eos_token_ids = list(eos_token_ids)
        # Sorting is most of the work, and no temperature changes the order.
        self._order = np.argsort(-self.logprobs, kind="stable")
        self._labels = {
            int(token_id): _visible(token_text(int(token_id)))
            for token_id in self._order[:_NUM_BARS]
        }

    @classmethod
    def of(cls, llm: LLM, prompt: Any) -> NextTokenCurve:
        """Ask an `LLM` for it: one request, or one for each 128 ids if it reports few at a time.

        Raises:
            InvalidRequestError: the prompt is wrong.
            EngineClosedError, EngineDeadError: no more requests are taken.
        """
        vocab_size, limit = llm.model_config.vocab_size, llm.config.max_logprobs
        greedy: dict[str, Any] = {"temperature": 0, "max_tokens": 1, "detokenize": False}
        if limit == -1 or limit >= vocab_size:
            params = [SamplingParams(logprobs=-1, **greedy)]
        else:
            starts = range(0, vocab_size, _CHUNK)
            chunks = [list(range(i, min(i + _CHUNK, vocab_size))) for i in starts]
            params = [SamplingParams(logprob_token_ids=ids, **greedy) for ids in chunks]
        logprobs = np.full(vocab_size, -np.inf)
        # The first alone: its pages are then there for the others.
        outputs = llm.generate(prompt, params[0], use_tqdm=False)
        rest = params[1:]
        outputs += llm.generate(list(repeat(prompt, len(rest))), rest, use_tqdm=False)
        for output in outputs:
            if output.error is not None:
                raise output.error
            for token_id, entry in (output.outputs[0].logprobs or [{}])[0].items():
                logprobs[token_id] = entry.logprob
        tokenizer = llm.get_tokenizer()

        def token_text(token_id: int) -> str:
            return tokenizer.token_text(token_id) or f"<{token_id}>"

        return cls(logprobs, token_text, llm.model_config.eos_token_ids)

    def probabilities(self, params: SamplingParams) -> NDArray[np.float64]:
        """[vocab_size]: with which probability each id is drawn.

        The steps and their order are those of the sampler: what is allowed, `min_tokens`,
        `logit_bias`, temperature, min_p, top_k, top_p. Penalties of the output have no output to
        work on yet.
        """
        logits, order = self.logprobs, self._order
        if params.allowed_token_ids is not None or params.logit_bias or params.min_tokens > 0:
            logits = self._restrict(params)
            order = np.argsort(-logits, kind="stable")
        if params.temperature == 0.0:
            drawn = np.zeros(len(logits))
            drawn[order[0]] = 1.0
            return drawn
        drawn = np.empty(len(logits))
        drawn[order] = _softmax(_filter(logits[order] / params.temperature, params))
        return drawn

    def _restrict(self, params: SamplingParams) -> NDArray[np.float64]:
        logits = self.logprobs.copy()
        if params.allowed_token_ids is not None:
            allowed = np.full(len(logits), -np.inf)
            allowed[params.allowed_token_ids] = 0.0
            logits += allowed
        if params.min_tokens > 0:
            logits[[*self._eos_token_ids, *(params.stop_token_ids or ())]] = -np.inf
        for token_id, bias in (params.logit_bias or {}).items():
            logits[token_id] += bias
        return logits

    def summary(self, params: SamplingParams) -> CurveSummary:
        """What the picture shows."""
        drawn = self.probabilities(params)
        survivors = drawn[drawn > 0]
        bars = [
            TokenOdds(label, float(np.exp(self.logprobs[token_id])), float(drawn[token_id]))
            for token_id, label in self._labels.items()
        ]
        default = SamplingParams()
        return CurveSummary(
            bars=bars,
            num_survivors=len(survivors),
            vocab_size=len(drawn),
            entropy=float(-(survivors * np.log2(survivors)).sum()) + 0.0,
            not_shown=tuple(
                name for name in _NOT_SHOWN if getattr(params, name) != getattr(default, name)
            ),
        )


def curve_text(summary: CurveSummary) -> str:
    """The bars as lines of text."""
    width = max(len(bar.text) for bar in summary.bars)
    lines = [
        f"{bar.text:<{width}}  {_percent(bar.sampled):>7}  {'#' * round(bar.sampled * 40)}".rstrip()
        for bar in summary.bars
    ]
    return "\n".join([_headline(summary), *lines])


def curve_svg(summary: CurveSummary, prompt: str) -> str:
    """The bars as SVG.

    Colours are attributes, which GitHub keeps, and read well on light and dark; a live view's
    style sheet overrides them through the classes.
    """
    height = _TOP + _ROW * len(summary.bars) + 4
    span = _WIDTH - _LEFT - _RIGHT
    title = f"The next token after {_shorten(_visible(prompt), 60)}: {_headline(summary)}"
    shapes = []
    for row, bar in enumerate(summary.bars):
        y = _TOP + _ROW * row
        opacity = "1" if bar.sampled > 0 else "0.45"
        shapes.append(
            f'<g opacity="{opacity}">'
            f'<text class="nbllm-curve-token" x="{_LEFT - 8}" y="{y + 13}" text-anchor="end" '
            f'fill="#6e7781" font-family="monospace">{html.escape(_shorten(bar.text))}</text>'
            f'<rect class="nbllm-curve-model" x="{_LEFT}" y="{y + 2}" height="14" rx="2" '
            f'width="{max(bar.model * span, 0.5):.1f}" fill="#8c959f" fill-opacity="0.35"/>'
            f'<rect class="nbllm-curve-sampled" x="{_LEFT}" y="{y + 5}" height="8" rx="2" '
            f'width="{bar.sampled * span:.1f}" fill="#2f81c7"/>'
            f'<text class="nbllm-curve-number" x="{_WIDTH - 4}" y="{y + 13}" text-anchor="end" '
            f'fill="#6e7781">{_percent(bar.model)} → {_percent(bar.sampled)}</text></g>'
        )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" '
        f'width="{_WIDTH}" height="{height}" role="img" font-size="12" font-family="sans-serif">'
        f"<title>{html.escape(title)}</title>"
        f'<text class="nbllm-curve-head" x="4" y="14" fill="#6e7781" font-weight="600">'
        f"{html.escape(_headline(summary))}</text>"
        f'<text class="nbllm-curve-number" x="4" y="32" fill="#6e7781">'
        "Blue: the probability that it is drawn. Grey: the model&#x27;s own.</text>"
        f"{''.join(shapes)}</svg>"
    )


def _filter(ordered: NDArray[np.float64], params: SamplingParams) -> NDArray[np.float64]:
    """Minus infinity for what min_p, top_k and top_p remove; the highest logit comes first."""
    if params.min_p > 0.0:
        ordered = np.where(ordered < ordered[0] + np.log(params.min_p), -np.inf, ordered)
    if 0 < params.top_k < len(ordered):
        ordered = np.where(ordered < ordered[params.top_k - 1], -np.inf, ordered)
    if params.top_p < 1.0:
        probability = _softmax(ordered)
        before = probability.cumsum() - probability
        ordered = np.where((before >= params.top_p) & (before > 0), -np.inf, ordered)
    return ordered


def _softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def _headline(summary: CurveSummary) -> str:
    of_all = f"{summary.num_survivors:,} of {summary.vocab_size:,} tokens can be drawn"
    without = f" (without {', '.join(summary.not_shown)})" if summary.not_shown else ""
    return f"{of_all}, entropy {summary.entropy:.2f} bits{without}"


def _visible(text: str) -> str:
    """Blanks as dots, line breaks as arrows: `' Paris'` is another token than `'Paris'`."""
    return "".join(
        "·" if char == " " else "↵" if char == "\n" else char if char.isprintable() else "�"
        for char in text
    )


def _shorten(text: str, limit: int = _MAX_LABEL) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _percent(share: float) -> str:
    if share == 0.0:
        return "0"
    return f"{share:.1%}" if share >= 0.001 else "<0.1%"
