"""Beam search on top of `LLM.generate`.

Every step asks for one more token of every beam, with the log-probabilities of the 2 * beam_width
most likely ones: enough, since at most beam_width of them can be end-of-sequence. The prefix cache
makes the repeated prompts cheap. The algorithm and the score are those of vLLM's `beam_search`:
a finished beam's score is cumulative log-probability / length ** length_penalty.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from nbllm.outputs import BeamSearchOutput, BeamSearchSequence
from nbllm.sampling_params import BeamSearchParams, SamplingParams

if TYPE_CHECKING:
    from nbllm.inputs import Prompt
    from nbllm.llm import LLM


def beam_search(llm: LLM, prompt: Prompt, params: BeamSearchParams) -> BeamSearchOutput:
    """The best `beam_width` sequences for one prompt, best first.

    Raises:
        InvalidRequestError: the prompt is wrong, or 2 * beam_width exceeds `max_logprobs`.
    """
    step_params = SamplingParams(
        temperature=params.temperature,
        max_tokens=1,
        logprobs=2 * params.beam_width,
        detokenize=False,
    )
    eos_token_ids = frozenset() if params.ignore_eos else frozenset(llm.model_config.eos_token_ids)
    beams: list[BeamSearchSequence] | None = None
    finished: list[BeamSearchSequence] = []
    num_prompt_tokens = 0
    for _ in range(params.max_tokens):
        if beams is None:
            outputs = llm.generate(prompt, step_params, use_tqdm=False)
            num_prompt_tokens = len(outputs[0].prompt_token_ids)
            beams = [BeamSearchSequence(list(outputs[0].prompt_token_ids), 0.0, [])]
        else:
            prompts: list[Prompt] = [list(beam.tokens) for beam in beams]
            outputs = llm.generate(prompts, step_params, use_tqdm=False)
        candidates: list[BeamSearchSequence] = []
        for beam, output in zip(beams, outputs, strict=True):
            if output.error is not None:
                raise output.error
            logprobs = output.outputs[0].logprobs
            assert logprobs is not None
            for token_id, logprob in logprobs[0].items():
                extended = BeamSearchSequence(
                    [*beam.tokens, token_id],
                    beam.cum_logprob + logprob.logprob,
                    [*beam.logprobs, logprobs[0]],
                )
                if token_id in eos_token_ids:
                    extended.finish_reason = "stop"
                    finished.append(extended)
                else:
                    candidates.append(extended)
        candidates.sort(key=lambda beam: beam.cum_logprob, reverse=True)
        beams = candidates[: params.beam_width]
        if not beams:
            break
    for beam in beams or []:
        beam.finish_reason = "length"

    def score(beam: BeamSearchSequence) -> float:
        # vLLM counts the prompt too, but not the end-of-sequence token.
        length = len(beam.tokens) - (beam.finish_reason == "stop")
        return beam.cum_logprob / max(length, 1) ** params.length_penalty

    best = sorted(finished + (beams or []), key=score, reverse=True)[: params.beam_width]
    if llm._tokenizer is not None:
        for beam in best:
            output_ids = beam.tokens[num_prompt_tokens:]
            if beam.finish_reason == "stop" and not params.include_stop_str_in_output:
                output_ids = output_ids[:-1]
            beam.text = llm._tokenizer.decode(output_ids)
    return BeamSearchOutput(best)
