"""Beam search on top of `LLM.generate_iter`.

Every step asks for one more token of every beam, with the log-probabilities of the 2 * beam_width
most likely ones: enough, since at most beam_width of them can be end-of-sequence. The prefix cache
makes the repeated prompts cheap. The algorithm and the score are those of vLLM's `beam_search`:
a beam's score is cumulative log-probability / length ** length_penalty, where the length counts
the prompt but not the end-of-sequence token.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from nbllm.outputs import BeamSearchOutput, BeamSearchSequence, RequestOutput
from nbllm.sampling_params import BeamSearchParams, SamplingParams

if TYPE_CHECKING:
    from nbllm.inputs import Prompt
    from nbllm.llm import LLM
    from nbllm.tokenizer import Tokenizer


def beam_search(llm: LLM, prompt: Prompt, params: BeamSearchParams) -> BeamSearchOutput:
    """The best `beam_width` sequences for one prompt, best first.

    A beam's `text` is the prompt's and its own together, as in vLLM. `temperature` has no effect:
    beams are compared by the model's own probabilities.

    Raises:
        InvalidRequestError: the prompt is wrong, or 2 * beam_width exceeds `max_logprobs`.
    """
    eos_token_ids = frozenset() if params.ignore_eos else frozenset(llm.model_config.eos_token_ids)
    max_model_len = llm.config.max_model_len
    assert max_model_len is not None
    (first,) = _step(llm, [prompt], params)
    beams = [BeamSearchSequence(list(first.prompt_token_ids), 0.0, [])]
    outputs = [first]
    finished: list[BeamSearchSequence] = []
    num_steps = min(params.max_tokens, max_model_len - len(first.prompt_token_ids))
    for step in range(num_steps):
        if step > 0:
            outputs = _step(llm, [list(beam.tokens) for beam in beams], params)
        candidates: list[BeamSearchSequence] = []
        for beam, output in zip(beams, outputs, strict=True):
            for extended in _extend(beam, output):
                if extended.tokens[-1] in eos_token_ids:
                    extended.finish_reason = "stop"
                    extended.stop_reason = extended.tokens[-1]
                    finished.append(extended)
                else:
                    candidates.append(extended)
        candidates.sort(key=lambda beam: beam.cum_logprob, reverse=True)
        beams = candidates[: params.beam_width]
        if not beams:
            break
    for beam in beams:
        beam.finish_reason = "length"

    def score(beam: BeamSearchSequence) -> float:
        length = len(beam.tokens) - (beam.finish_reason == "stop")
        return float(beam.cum_logprob / max(length, 1) ** params.length_penalty)

    best = sorted(finished + beams, key=score, reverse=True)[: params.beam_width]
    if llm._tokenizer is not None:
        for beam in best:
            beam.text = _text(llm._tokenizer, beam, params.include_stop_str_in_output)
    return BeamSearchOutput(best)


def _step(llm: LLM, prompts: list[Prompt], params: BeamSearchParams) -> list[RequestOutput]:
    """One more token of each prompt."""
    step_params = SamplingParams(
        temperature=0.0, max_tokens=1, logprobs=2 * params.beam_width, detokenize=False
    )
    outputs: dict[int, RequestOutput] = {}
    for index, output in llm.generate_iter(prompts, step_params):
        if output.error is not None:
            raise output.error
        outputs[index] = output
    return [outputs[index] for index in range(len(prompts))]


def _extend(beam: BeamSearchSequence, output: RequestOutput) -> list[BeamSearchSequence]:
    """The beam with each of the reported tokens."""
    logprobs = output.outputs[0].logprobs
    assert logprobs is not None
    return [
        BeamSearchSequence(
            [*beam.tokens, token_id],
            beam.cum_logprob + logprob.logprob,
            [*beam.logprobs, logprobs[0]],
        )
        for token_id, logprob in logprobs[0].items()
    ]


def _text(tokenizer: Tokenizer, beam: BeamSearchSequence, include_stop: bool) -> str:
    if beam.finish_reason != "stop":
        return tokenizer.decode(beam.tokens)
    text = tokenizer.decode(beam.tokens[:-1])
    return text + tokenizer.token_text(beam.tokens[-1]) if include_stop else text
