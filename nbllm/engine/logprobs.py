"""Log-probabilities of sampled and prompt tokens, from the model's raw distribution."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nbllm.outputs import Logprob, PositionLogprobs


def gather_logprobs(
    logits: Tensor,
    token_ids: Tensor,
    num_logprobs: Sequence[int],
    extra_token_ids: Sequence[Sequence[int] | None] | None = None,
) -> list[PositionLogprobs]:
    """Report, per row, the given token and the most likely ones.

    Args:
        logits: [N, vocab_size] float32, raw.
        token_ids: [N] int64, the token to report whatever its rank.
        num_logprobs: per row, how many of the most likely tokens to report; -1 is all.
        extra_token_ids: per row, further ids to report instead of the most likely ones.

    Returns:
        one dict per row: the given token first, then by falling probability.
    """
    vocab_size = logits.shape[-1]
    logprobs = torch.log_softmax(logits, dim=-1)
    chosen = logprobs.gather(1, token_ids[:, None])
    ranks = (logprobs > chosen).sum(dim=-1) + 1
    counts = [vocab_size if k == -1 else min(k, vocab_size) for k in num_logprobs]
    top = torch.topk(logprobs, max(counts, default=0), dim=-1)
    columns = zip(
        token_ids.tolist(),
        chosen[:, 0].tolist(),
        ranks.tolist(),
        top.indices.tolist(),
        top.values.tolist(),
        strict=True,
    )
    result: list[PositionLogprobs] = []
    for row, (token_id, logprob, rank, top_ids, top_values) in enumerate(columns):
        entry: PositionLogprobs = {token_id: Logprob(logprob, rank)}
        extra = extra_token_ids[row] if extra_token_ids is not None else None
        if extra is not None:
            values = logprobs[row, torch.tensor(list(extra), device=logits.device).long()]
            extra_ranks = (logprobs[row] > values[:, None]).sum(dim=-1) + 1
            for extra_id, value, extra_rank in zip(
                extra, values.tolist(), extra_ranks.tolist(), strict=True
            ):
                entry.setdefault(extra_id, Logprob(value, extra_rank))
        else:
            for i in range(counts[row]):
                entry.setdefault(top_ids[i], Logprob(top_values[i], i + 1))
        result.append(entry)
    return result
