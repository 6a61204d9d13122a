"""ScoreLabels: the probability of each of some labels as the answer to a row.

Nothing is generated and read back: the model is asked, at each inner node of the labels' trie, how
probable the tokens are that may follow. The prompt's pages are shared through the prefix cache, so
a row costs one prefill and a token or so for each further node.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, get_args, get_origin

import numpy as np

from nbllm.dataframe.generate_verb import Example, Generate
from nbllm.dataframe.journal import RowResult
from nbllm.dataframe.label_trie import LabelTrie
from nbllm.dataframe.prompts import is_missing
from nbllm.dataframe.row_job import Part
from nbllm.errors import InvalidRequestError
from nbllm.inputs import EncodedPrompt
from nbllm.llm import LLM
from nbllm.outputs import RequestOutput
from nbllm.sampling_params import SamplingParams

_MAX_CHILDREN = 128  # ids that one request reports


class ScoreLabels(Generate):
    """log p(label | prompt) for each label; `RowResult.numbers` holds them.

    Args:
        llm: does it.
        labels: as `read_labels` reads them. Without a chat template a space stands before each
            text, as after a word, except for texts that a dict gives.
        chat, system: as in `Generate`.
        examples: prompts, and labels or other texts as answers.
        instruction: stands before each prompt that is text, and a blank line between; None names
            the labels if prompts are chats, and is nothing otherwise.

    Attributes:
        labels: in the order of their numbers.
        trie: of their token ids.

    Raises:
        InvalidRequestError: the labels are not as they must be, see `read_labels` and `LabelTrie`,
            or an example's answer is none of them.
    """

    def __init__(
        self,
        llm: LLM,
        labels: Any,
        *,
        chat: bool | str = "auto",
        system: str | None = None,
        examples: Sequence[Example] = (),
        instruction: str | None = None,
    ) -> None:
        super().__init__(llm, lambda row: _PARAMS, chat=chat, system=system)
        texts = read_labels(labels)
        self.labels = list(texts)
        if instruction is None:
            listed = ", ".join(text.strip() for text in texts.values())
            named = f"Answer with the one of these that fits best: {listed}."
            instruction = named if self._chat else ""
        self._instruction = f"{instruction}\n\n" if instruction else ""
        if not self._chat and not isinstance(labels, Mapping):
            texts = {label: f" {text}" for label, text in texts.items()}
        self._examples = [
            (self._instructed(prompt), self._answer(answer, texts)) for prompt, answer in examples
        ]
        self.trie = LabelTrie([_label_ids(llm, text) for text in texts.values()], _end_id(llm))
        self._requests = [
            (place, list(node.path), _reporting(node.children[first : first + _MAX_CHILDREN]))
            for place, node in enumerate(self.trie.nodes)
            for first in range(0, len(node.children), _MAX_CHILDREN)
        ]

    def render(self, prompt: Any) -> Any:
        return super().render(self._instructed(prompt))

    def parts(self, row: int, prompt: EncodedPrompt) -> list[Part]:
        ids = prompt.token_ids
        return [
            (EncodedPrompt(None, ids + path) if path else prompt, params)
            for _, path, params in self._requests
        ]

    def identity(self, row: int) -> dict[str, Any] | None:
        return {"verb": "score_labels", "labels": self.trie.sequences}

    def result(self, outputs: list[RequestOutput], row: int) -> RowResult:
        logprobs: list[dict[int, float]] = [{} for _ in self.trie.nodes]
        for output, (place, _, _) in zip(outputs, self._requests, strict=True):
            entries = output.outputs[0].logprobs
            assert entries is not None
            logprobs[place] |= {token_id: entry.logprob for token_id, entry in entries[0].items()}
        return RowResult(
            num_prompt_tokens=len(outputs[0].prompt_token_ids), numbers=self.trie.sum(logprobs)
        )

    def _instructed(self, prompt: Any) -> Any:
        return self._instruction + prompt if isinstance(prompt, str) else prompt

    def _answer(self, label: Any, texts: Mapping[Any, str]) -> str:
        known = {str(name): text for name, text in texts.items()}
        if str(label) not in known:
            raise InvalidRequestError(
                f"examples: {label!r} is not one of the labels", parameter="examples"
            )
        return known[str(label)]


_PARAMS = SamplingParams(temperature=0.0, max_tokens=1, detokenize=False)


def read_labels(labels: Any) -> dict[Any, str]:
    """Labels and the text of each that is scored.

    Args:
        labels: a list; an Enum or a Literal, whose values are the labels; or texts by label.

    Raises:
        InvalidRequestError: there are fewer than two, one is missing or occurs twice, or a text is
            blank.
    """
    if isinstance(labels, type) and issubclass(labels, enum.Enum):
        labels = [member.value for member in labels]
    elif get_origin(labels) is Literal:
        labels = list(get_args(labels))
    if isinstance(labels, str) or not isinstance(labels, Iterable):
        raise _error(f"must be a list, an Enum, a Literal or a dict of texts, got {labels!r}")
    names = list(labels)
    if any(is_missing(name) or isinstance(name, (list, dict, set)) for name in names):
        raise _error(f"must be texts or numbers, got {names!r}")
    if len(set(names)) < len(names):
        raise _error(f"one occurs twice: {names!r}")
    if len(names) < 2:
        raise _error("there must be at least two")
    texts = labels if isinstance(labels, Mapping) else {name: str(name) for name in names}
    for name, text in texts.items():
        if not isinstance(text, str) or not text.strip():
            raise _error(f"the text of {name!r} must not be blank, got {text!r}")
    return dict(texts)


def probabilities(logprobs: np.ndarray[Any, Any], bias: np.ndarray[Any, Any]) -> Any:
    """Rows of log p(label), less what an input without content has, normalized over the labels.

    Zhao et al., "Calibrate Before Use", 2021: each p is divided by that of the content-free input.

    Args:
        logprobs: [N, L] float64; NaN in rows without a result.
        bias: [L] float64, log p of the content-free input; zeros do not calibrate.
    """
    scores = logprobs - bias
    scores = scores - scores.max(axis=1, keepdims=True, initial=-np.inf)
    weights = np.exp(scores)
    return weights / weights.sum(axis=1, keepdims=True)


def _label_ids(llm: LLM, text: str) -> list[int]:
    """The token ids of a text that goes on from another one."""
    encode = llm.get_tokenizer().encode
    if text.startswith(" "):  # some tokenizers begin every text with a space of their own
        before = encode("a", add_special_tokens=False)
        ids = encode(f"a{text}", add_special_tokens=False)
        if ids[: len(before)] == before:
            return ids[len(before) :]
    return encode(text, add_special_tokens=False)


def _reporting(token_ids: Sequence[int]) -> SamplingParams:
    return _PARAMS.clone(logprob_token_ids=list(token_ids))


def _end_id(llm: LLM) -> int | None:
    """The token that ends an answer of this model."""
    ends = llm.model_config.eos_token_ids
    end = llm.get_tokenizer().eos_token_id
    return end if end in ends or not ends else ends[0]


def _error(message: str) -> InvalidRequestError:
    return InvalidRequestError(f"labels: {message}", parameter="labels")
