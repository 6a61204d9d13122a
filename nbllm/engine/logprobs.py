"""Log-probabilities of sampled and prompt tokens, from the model's raw distribution."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nbllm.outputs import Logprob, PositionLogprobs


@dataclass(frozen=True, slots=True)
class LogprobTensors:
    """What is reported of N rows, as tensors: it may still be on its way to the host.

    Attributes:
        token_ids: [N] int64, the token that is reported whatever its rank.
        logprobs: [N] float32, its log-probability.
        ranks: [N] int64, its rank, from 1 on.
        top_ids, top_logprobs: [N, K] the most likely tokens, best first.
        num_top: how many of them each row wants.
        extra_logprobs, extra_ranks: [N, E] of further ids.
        extra_ids: per row, those ids, reported instead of the most likely ones; None is none.
    """

    token_ids: Tensor
    logprobs: Tensor
    ranks: Tensor
    top_ids: Tensor
    top_logprobs: Tensor
    num_top: list[int]
    extra_logprobs: Tensor
    extra_ranks: Tensor
    extra_ids: list[Sequence[int] | None]

    def map(self, function: Callable[[Tensor], Tensor]) -> LogprobTensors:
        """The same with every tensor replaced."""
        return replace(
            self,
            token_ids=function(self.token_ids),
            logprobs=function(self.logprobs),
            ranks=function(self.ranks),
            top_ids=function(self.top_ids),
            top_logprobs=function(self.top_logprobs),
            extra_logprobs=function(self.extra_logprobs),
            extra_ranks=function(self.extra_ranks),
        )

    def entries(self) -> list[PositionLogprobs]:
        """One dict per row: the given token first, then by falling probability."""
        top_ids, top_logprobs = self.top_ids.tolist(), self.top_logprobs.tolist()
        extra_logprobs, extra_ranks = self.extra_logprobs.tolist(), self.extra_ranks.tolist()
        chosen = zip(
            self.token_ids.tolist(), self.logprobs.tolist(), self.ranks.tolist(), strict=True
        )
        result: list[PositionLogprobs] = []
        for row, (token_id, logprob, rank) in enumerate(chosen):
            entry: PositionLogprobs = {token_id: Logprob(logprob, rank)}
            extra = self.extra_ids[row]
            if extra is None:
                for i in range(self.num_top[row]):
                    entry.setdefault(top_ids[row][i], Logprob(top_logprobs[row][i], i + 1))
            else:
                for i, extra_id in enumerate(extra):
                    logprob, rank = extra_logprobs[row][i], extra_ranks[row][i]
                    entry.setdefault(extra_id, Logprob(logprob, rank))
            result.append(entry)
        return result


def gather_logprobs(
    logits: Tensor,
    token_ids: Tensor,
    num_logprobs: Sequence[int],
    extra_token_ids: Sequence[Sequence[int] | None] | None = None,
) -> LogprobTensors:
    """Report, per row, the given token and the most likely ones.

    Args:
        logits: [N, vocab_size] float32, raw.
        token_ids: [N] int64, the token to report whatever its rank.
        num_logprobs: per row, how many of the most likely tokens to report; -1 is all.
        extra_token_ids: per row, further ids to report instead of the most likely ones.

    Returns:
        tensors on the device of `logits`; nothing waits for it.
    """
    vocab_size = logits.shape[-1]
    logprobs = torch.log_softmax(logits, dim=-1)
    chosen = logprobs.gather(1, token_ids[:, None])
    extra_ids: list[Sequence[int] | None] = [None] * len(logits)
    if extra_token_ids is not None:
        extra_ids = list(extra_token_ids)
    num_top = [vocab_size if k == -1 else min(k, vocab_size) for k in num_logprobs]
    top = torch.topk(
        logprobs,
        max((k for k, extra in zip(num_top, extra_ids, strict=True) if extra is None), default=0),
        dim=-1,
    )
    num_extra = max((len(extra) for extra in extra_ids if extra is not None), default=0)
    padded = [[*(extra or ()), *[0] * (num_extra - len(extra or ()))] for extra in extra_ids]
    index = torch.tensor(padded, dtype=torch.int64).view(len(logits), num_extra)
    extra_logprobs = logprobs.gather(1, index.to(logits.device, non_blocking=True))
    extra_ranks = torch.empty_like(extra_logprobs, dtype=torch.int64)
    for column in range(num_extra):  # one at a time: a comparison with all ids for each of them
        values = extra_logprobs[:, column, None]
        extra_ranks[:, column] = (logprobs > values).sum(dim=-1) + 1
    return LogprobTensors(
        token_ids=token_ids,
        logprobs=chosen[:, 0],
        ranks=(logprobs > chosen).sum(dim=-1) + 1,
        top_ids=top.indices,
        top_logprobs=top.values,
        num_top=num_top,
        extra_logprobs=extra_logprobs,
        extra_ranks=extra_ranks,
        extra_ids=extra_ids,
    )
