"""The engines that a run can be compared with, on the same weights, device and dtype.

transformers is the reference for the tokens, too: it can be asked for its own choice at every
place of a text. llama.cpp runs what this module's neighbour writes for it as GGUF.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from nbllm.bench.workloads import Workload

if TYPE_CHECKING:
    from nbllm.outputs import RequestOutput


class Peer(Protocol):
    """An engine with its model loaded."""

    def generate(self, workload: Workload) -> list[list[int]]:
        """Greedy continuations of all rows as one batch, each of its full length."""


def load_peer(name: str, folder: Path, device: str, dtype: str) -> Peer:
    """Load the model in `folder` into the named engine.

    Raises:
        ValueError: the engine can't run this model, device or dtype.
        ImportError: the engine is not installed; says how to.
    """
    if name == "transformers":
        return TransformersPeer(folder, device, dtype)
    from nbllm.bench.llama_cpp_peer import LlamaCppPeer

    return LlamaCppPeer(folder, device, dtype)


def time_peer(peer: Peer, workload: Workload, repeats: int) -> dict[str, Any]:
    """Rates of a peer, and its tokens of the last repeat; prompts must be of one length.

    Raises:
        ValueError: prompts or outputs differ in length: padding would blur the comparison.
    """
    from nbllm.bench.measure import rates

    if len(set(map(len, workload.prompts))) > 1 or len(set(workload.output_lens)) > 1:
        raise ValueError("the peer is timed on prompts and outputs of one length only")
    one_token = replace(workload, output_lens=[1] * len(workload.prompts))
    peer.generate(one_token)
    prefill_times: list[float] = []
    whole_times: list[float] = []
    tokens: list[list[int]] = []
    for _ in range(repeats):
        for job, times in ((one_token, prefill_times), (workload, whole_times)):
            begin = time.perf_counter()
            tokens = peer.generate(job)
            times.append(time.perf_counter() - begin)
    return {
        **rates(workload, statistics.median(prefill_times), statistics.median(whole_times)),
        "tokens": tokens,
    }


def count_equal_tokens(outputs: Sequence[RequestOutput], tokens: Sequence[list[int]]) -> int:
    """Tokens that two engines have in common, counted up to each row's first difference."""
    total = 0
    for output, other in zip(outputs, tokens, strict=True):
        for token, other_token in zip(output.outputs[0].token_ids, other, strict=True):
            if token != other_token:
                break
            total += 1
    return total


class TransformersPeer:
    """`transformers`, through `generate`.

    Args:
        folder: holds config.json and weights.
        device, dtype: names, as of the engine that it is compared with.
    """

    def __init__(self, folder: Path, device: str, dtype: str) -> None:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
        model.generation_config.eos_token_id = None  # every text has its full length
        self.model: Any = model.to(device).eval()

    @torch.inference_mode()
    def generate(self, workload: Workload) -> list[list[int]]:
        """See `Peer.generate`."""
        ids = torch.tensor(workload.prompts, device=self.model.device)
        texts = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=workload.output_lens[0],
            do_sample=False,
            pad_token_id=0,
        )
        tokens: list[list[int]] = texts[:, ids.shape[1] :].tolist()
        return tokens


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


def check_tokens(model: Any, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
    """Compare greedy outputs with transformers' own choice after the same tokens.

    The model reads each whole text at once. A token that is not its first choice is wrong unless
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
