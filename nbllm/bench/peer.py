"""transformers as the peer: the same weights, device and dtype, timed and used as the reference."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from nbllm.bench.workloads import Workload

if TYPE_CHECKING:
    from nbllm.outputs import RequestOutput


def write_random_weights(folder: Path, seed: int = 0) -> None:
    """Fill a folder that holds config.json with a checkpoint of random weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    generator_state = torch.get_rng_state()
    try:
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    finally:
        torch.set_rng_state(generator_state)
    model.save_pretrained(folder)


def load_peer(folder: Path | str, device: str, dtype: str) -> Any:
    """The model as transformers loads it."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    model.generation_config.eos_token_id = None  # every text has its full length
    return model.to(device).eval()


def time_peer(model: Any, workload: Workload, repeats: int) -> dict[str, Any]:
    """`model.generate` on the whole workload as one batch; prompts must be of one length.

    Raises:
        ValueError: prompts or outputs differ in length: padding would blur the comparison.
    """
    from nbllm.bench.run import rates

    if len(set(map(len, workload.prompts))) > 1 or len(set(workload.output_lens)) > 1:
        raise ValueError("the peer is timed on prompts and outputs of one length only")
    one_token = replace(workload, output_lens=[1] * len(workload.prompts))
    _generate(model, one_token)
    prefill_times: list[float] = []
    whole_times: list[float] = []
    for _ in range(repeats):
        for job, times in ((one_token, prefill_times), (workload, whole_times)):
            begin = time.perf_counter()
            _generate(model, job)
            times.append(time.perf_counter() - begin)
    result = rates(workload, statistics.median(prefill_times), statistics.median(whole_times))
    return {"name": "transformers.generate", **result}


def check_tokens(model: Any, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
    """Compare greedy outputs with the peer's own choice after the same tokens.

    The peer reads each whole text at once. A token that is not its first choice is wrong unless
    the two are nearly tied: their log-probabilities less than 0.05 apart (0.001 in float32).
    """
    tolerance = 0.001 if model.dtype == torch.float32 else 0.05
    num_equal = num_tokens = 0
    widest = 0.0
    for output in outputs:
        tokens = torch.tensor(output.outputs[0].token_ids, device=model.device)
        ids = torch.tensor([output.prompt_token_ids], device=model.device)
        with torch.inference_mode():
            text = torch.cat([ids, tokens[None]], dim=1)
            logits = model(text, use_cache=False, logits_to_keep=len(tokens) + 1).logits
        scores = torch.log_softmax(logits[0, :-1].float(), dim=-1)
        gaps = scores.amax(dim=-1) - scores.gather(-1, tokens[:, None])[:, 0]
        num_equal += int((gaps == 0).sum())
        num_tokens += len(tokens)
        widest = max(widest, float(gaps.max()))
    return {
        "against": "transformers",
        "tokens": num_tokens,
        "equal": num_equal,
        "widest_gap": round(widest, 4),
        "ok": widest < tolerance,
    }


@torch.inference_mode()
def _generate(model: Any, workload: Workload) -> None:
    ids = torch.tensor(workload.prompts, device=model.device)
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=workload.output_lens[0],
        do_sample=False,
        pad_token_id=0,
    )
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
