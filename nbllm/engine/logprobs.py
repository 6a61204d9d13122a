"""Log-probabilities of sampled and prompt tokens, from the model's raw distribution."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from nbllm.engine.request import MAX_DEVICE_LOGPROBS, Request
from nbllm.engine.scheduler_output import ScheduledRequest
from nbllm.outputs import Logprob, PositionLogprobs


@dataclass(frozen=True, slots=True)
class LogprobTensors:
    """What can be reported of N rows.

    Attributes:
        token_ids: [N] int64, the token that is reported whatever its rank.
        logprobs: [N] float32, its log-probability.
        ranks: [N] int64, its rank, from 1 on.
        top_ids: [N, K] int64, the most likely tokens, best first.
        top_logprobs: [N, K] float32.
        extra_logprobs: [N, E] float32, of further ids.
        extra_ranks: [N, E] int64.
    """

    token_ids: Tensor
    logprobs: Tensor
    ranks: Tensor
    top_ids: Tensor
    top_logprobs: Tensor
    extra_logprobs: Tensor
    extra_ranks: Tensor

    def map(self, function: Callable[[Tensor], Tensor]) -> LogprobTensors:
        """The same with every tensor replaced."""
        return LogprobTensors(*(function(tensor) for tensor in self._tensors()))

    def copy_(self, other: LogprobTensors) -> None:
        """Overwrite all numbers."""
        for tensor, source in zip(self._tensors(), other._tensors(), strict=True):
            tensor.copy_(source)

    def _tensors(self) -> list[Tensor]:
        return [getattr(self, field.name) for field in fields(self)]


@dataclass(slots=True)
class LogprobReport:
    """What is reported of some of the rows; the tensors may still be on their way to the host.

    Attributes:
        tensors: of the rows.
        rows: those of them that are reported.
        wanted: for each of these, how many of the most likely tokens (-1 is all), and further ids
            that are reported instead of them, or None.
    """

    tensors: LogprobTensors
    rows: Sequence[int]
    wanted: Sequence[tuple[int, Sequence[int] | None]]

    def entries(self) -> list[PositionLogprobs]:
        """One dict per reported row: the given token first, then by falling probability."""
        tensors = self.tensors
        token_ids, logprobs, ranks = (
            column.tolist() for column in (tensors.token_ids, tensors.logprobs, tensors.ranks)
        )
        result: list[PositionLogprobs] = []
        for row, (num_top, extra_ids) in zip(self.rows, self.wanted, strict=True):
            entry: PositionLogprobs = {token_ids[row]: Logprob(logprobs[row], ranks[row])}
            if extra_ids is not None:
                others = zip(
                    extra_ids,
                    tensors.extra_logprobs[row].tolist(),
                    tensors.extra_ranks[row].tolist(),
                    strict=False,
                )
            else:
                top_ids = tensors.top_ids[row].tolist()
                top_ids = top_ids if num_top == -1 else top_ids[:num_top]
                others = zip(
                    top_ids,
                    tensors.top_logprobs[row].tolist(),
                    range(1, len(top_ids) + 1),
                    strict=False,
                )
            for token_id, logprob, rank in others:
                entry.setdefault(token_id, Logprob(logprob, rank))
            result.append(entry)
        return result


def wanted_logprobs(request: Request) -> tuple[int, Sequence[int] | None]:
    """What a request reports of its tokens, as `LogprobReport.wanted` has it."""
    params = request.sampling_params
    return params.logprobs or 0, params.logprob_token_ids


def gather_logprobs(
    logits: Tensor, token_ids: Tensor, num_top: int, extra_ids: Tensor | None = None
) -> LogprobTensors:
    """Compute what can be reported of all rows; nothing waits for the device.

    Args:
        logits: [N, vocab_size], raw.
        token_ids: [N] int64.
        num_top: how many of the most likely tokens, at most all of them.
        extra_ids: [N, E] int64, or None.
    """
    logprobs = torch.log_softmax(logits, dim=-1, dtype=torch.float32)
    chosen = logprobs.gather(1, token_ids[:, None])
    top = torch.topk(logprobs, min(num_top, logits.shape[-1]), dim=-1)
    if extra_ids is None:
        extra_ids = token_ids.new_empty(len(token_ids), 0)
    extra_logprobs = logprobs.gather(1, extra_ids)
    extra_ranks = torch.empty_like(extra_ids)
    for column in range(extra_ids.shape[1]):  # one at a time: each is compared with all ids
        values = extra_logprobs[:, column, None]
        extra_ranks[:, column] = (logprobs > values).sum(dim=-1) + 1
    return LogprobTensors(
        token_ids=token_ids,
        logprobs=chosen[:, 0],
        ranks=(logprobs > chosen).sum(dim=-1) + 1,
        top_ids=top.indices,
        top_logprobs=top.values,
        extra_logprobs=extra_logprobs,
        extra_ranks=extra_ranks,
    )


def report_logprobs(
    logits: Tensor, token_ids: Tensor, wanted: Sequence[tuple[int, Sequence[int] | None]]
) -> LogprobReport:
    """Report of every row what it wants.

    Args:
        logits: [N, vocab_size], raw.
        token_ids: [N] int64, the token to report whatever its rank.
        wanted: one per row, as in `LogprobReport`.
    """
    vocab_size = logits.shape[-1]
    tops = [vocab_size if num_top == -1 else num_top for num_top, extra in wanted if extra is None]
    extras = [list(extra or ()) for _, extra in wanted]
    width = max(map(len, extras), default=0)
    extra_ids = torch.tensor(
        [ids + [0] * (width - len(ids)) for ids in extras], dtype=torch.int64, device=logits.device
    ).view(len(wanted), width)
    tensors = gather_logprobs(logits, token_ids, max(tops, default=0), extra_ids)
    return LogprobReport(tensors, range(len(wanted)), wanted)


def make_logprob_tensors(num_rows: int, vocab_size: int, device: torch.device) -> LogprobTensors:
    """Where a captured step leaves what it reports: always `MAX_DEVICE_LOGPROBS` of each row."""
    num_top = min(MAX_DEVICE_LOGPROBS, vocab_size)

    def zeros(dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.zeros((num_rows, *shape), dtype=dtype, device=device)

    return LogprobTensors(
        token_ids=zeros(torch.int64),
        logprobs=zeros(torch.float32),
        ranks=zeros(torch.int64),
        top_ids=zeros(torch.int64, num_top),
        top_logprobs=zeros(torch.float32, num_top),
        extra_logprobs=zeros(torch.float32, 0),
        extra_ranks=zeros(torch.int64, 0),
    )


def captured_report(
    tensors: LogprobTensors | None, sampled: Sequence[ScheduledRequest]
) -> LogprobReport | None:
    """What a captured step reports of its first rows, before the next one overwrites it; None if
    no row reports anything."""
    rows = [row for row, item in enumerate(sampled) if item.request.reports_logprobs]
    if tensors is None or not rows:
        return None
    wanted = [wanted_logprobs(sampled[row].request) for row in rows]
    return LogprobReport(tensors.map(Tensor.clone), rows, wanted)
