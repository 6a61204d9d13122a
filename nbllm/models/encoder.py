"""Encoder: what the engine expects of every model that reads whole texts, in both directions.

Texts of a step lie one after the other without padding, in products of matrices, norms and all else
but attention, which sees one text at a time. `AttentionPlan` says how, once for all layers that
attend alike: texts of nearly the same length are padded to the same and attended to together.

With a window, a long text is cut into pieces of queries, each with the keys that lie in the window
of some of them: the work grows with the text, not with its square.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nbllm.models.model import Model

_MIN_FILL = 0.8  # of the keys that a padded text has, so much are its own


class Encoder(Model):
    """A model whose tokens see all others of their text, those that follow them included."""

    @abstractmethod
    def forward(self, input_ids: Tensor, positions: Tensor, text_lens: Sequence[int]) -> Tensor:
        """Hidden states, [num_tokens, hidden_size], of whole texts.

        Args:
            input_ids: [num_tokens] int64, of one text after the other.
            positions: [num_tokens] int64, in each text from 0 on.
            text_lens: tokens of each, at least 1.
        """


@dataclass(frozen=True, slots=True)
class _Group:
    """Pieces of texts that are attended to together.

    Attributes:
        queries: [num_pieces, num_queries] int64, rows of the step.
        keys: [num_pieces, num_keys] int64.
        mask: bool, [num_pieces, 1, num_queries or 1, num_keys], what is seen; None is all.
    """

    queries: Tensor
    keys: Tensor
    mask: Tensor | None


class AttentionPlan:
    """Who sees whom in a step.

    Args:
        text_lens: tokens of each text.
        device: where the tensors are.
        window: tokens see others at most so far away; None is no bound.
        batch_invariant: each text is attended to alone, so that no other changes a bit of it.
    """

    def __init__(
        self,
        text_lens: Sequence[int],
        device: torch.device,
        *,
        window: int | None = None,
        batch_invariant: bool = False,
    ) -> None:
        places = np.empty(sum(text_lens), dtype=np.int64)  # of each token, in the groups' results
        arrays: list[np.ndarray] = [places]
        windows: list[int | None] = []
        num_places = 0
        for pieces in _group(_cut(text_lens, window), batch_invariant):
            first_query, num_queries, first_key, num_keys = pieces.T[:, :, None]
            # Padding repeats the last token, so that it sees something: its results are dropped.
            offsets = np.arange(num_queries.max())
            queries = first_query + np.minimum(offsets, num_queries - 1)
            keys = first_key + np.minimum(np.arange(num_keys.max()), num_keys - 1)
            is_query = offsets < num_queries
            places[queries[is_query]] = num_places + np.flatnonzero(is_query)
            num_places += queries.size
            arrays += [queries, keys, num_keys]
            # All is within the window of all in a text that is no longer.
            windows.append(window if window is not None and keys.shape[1] > window + 1 else None)
        sent = _to_device(arrays, device)
        self._places = sent[0]
        self._groups: list[_Group] = []
        for number, own_window in enumerate(windows):
            first = 1 + 3 * number
            is_padded = bool((arrays[first + 2] < arrays[first + 1].shape[1]).any())
            queries_t, keys_t, num_keys_t = sent[first : first + 3]
            mask = _make_mask(queries_t, keys_t, num_keys_t if is_padded else None, own_window)
            self._groups.append(_Group(queries_t, keys_t, mask))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention with scores scaled by head_dim ** -0.5.

        Args:
            q, k, v: [num_tokens, num_heads, head_dim].

        Returns:
            [num_tokens, num_heads * head_dim].
        """
        results: list[Tensor] = []
        for group in self._groups:
            attended = F.scaled_dot_product_attention(
                q[group.queries].transpose(1, 2),
                k[group.keys].transpose(1, 2),
                v[group.keys].transpose(1, 2),
                attn_mask=group.mask,
            )
            results.append(attended.transpose(1, 2).flatten(0, 1).flatten(1))
        return torch.cat(results).index_select(0, self._places)


def _cut(text_lens: Sequence[int], window: int | None) -> np.ndarray:
    """[num_pieces, 4]: first query, number of queries, first key, number of keys."""
    pieces: list[tuple[int, int, int, int]] = []
    first = 0
    for length in text_lens:
        # Shorter ones would see most of the text from every piece of it.
        step = length if window is None or length <= 6 * window else 2 * window
        reach = length if window is None else window
        for start in range(0, length, step):
            stop = min(start + step, length)
            begin, end = max(start - reach, 0), min(stop + reach, length)
            pieces.append((first + start, stop - start, first + begin, end - begin))
        first += length
    return np.array(pieces)


def _group(pieces: np.ndarray, batch_invariant: bool) -> Iterator[np.ndarray]:
    """The pieces in groups of nearly the same number of keys."""
    if batch_invariant:
        yield from pieces[:, None]
        return
    pieces = pieces[np.argsort(-pieces[:, 3], kind="stable")]
    while len(pieces):
        count = np.count_nonzero(pieces[:, 3] >= _MIN_FILL * pieces[0, 3])
        yield pieces[:count]
        pieces = pieces[count:]


def _to_device(arrays: Sequence[np.ndarray], device: torch.device) -> list[Tensor]:
    """Several int64 arrays to the device in one copy."""
    host = torch.from_numpy(np.concatenate([array.ravel() for array in arrays]))
    if device.type == "cuda":
        host = host.pin_memory()
    parts = host.to(device, non_blocking=True).split([array.size for array in arrays])
    return [part.view(array.shape) for part, array in zip(parts, arrays, strict=True)]


def _make_mask(
    queries: Tensor, keys: Tensor, num_keys: Tensor | None, window: int | None
) -> Tensor | None:
    """See `_Group.mask`; `num_keys` [num_pieces, 1] is None where there is no padding."""
    mask: Tensor | None = None
    if num_keys is not None:
        mask = (torch.arange(keys.shape[1], device=keys.device) < num_keys)[:, None, None]
    if window is not None:
        is_near = (queries[:, None, :, None] - keys[:, None, None]).abs() <= window
        mask = is_near if mask is None else mask & is_near
    return mask
