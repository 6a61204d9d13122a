"""Every op in plain PyTorch: slow, obvious, and what all kernels are tested against.

Signatures and layouts are those of the ops themselves.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from nbllm_kernels.attention_metadata import AttentionMetadata
from nbllm_kernels.gumbel import gumbel_noise
from nbllm_kernels.sampling_tensors import SamplingTensors

if TYPE_CHECKING:
    from nbllm_kernels.decode_state import DecodeInputs, DecodeState
    from nbllm_kernels.penalties import Penalties

BAD_LOGITS = -2  # in place of a token, see `nbllm_kernels.decode_state`
MAX_COUNT, PROMPT_FLAG = 0x7FFF, -0x8000  # halves of an int16, see `nbllm_kernels.penalties`


def paged_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    metadata: AttentionMetadata,
    *,
    scale: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """softmax(scale * q k^T) v over the pages of each sequence, in float32 or wider."""
    output = torch.empty_like(query)
    loc = metadata.query_start_loc.tolist()
    compute = torch.promote_types(query.dtype, torch.float32)
    for i, seq_len in enumerate(metadata.seq_lens.tolist()):
        q = query[loc[i] : loc[i + 1]].to(compute)  # [query_len, num_heads, head_dim]
        k = gather_pages(key_cache, metadata.block_tables[i], seq_len).to(compute)
        v = gather_pages(value_cache, metadata.block_tables[i], seq_len).to(compute)
        group = q.shape[1] // k.shape[1]
        k = k.repeat_interleave(group, dim=1)  # [seq_len, num_heads, head_dim]
        v = v.repeat_interleave(group, dim=1)
        scores = torch.einsum("qhd,khd->hqk", q, k) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        mask = visible_keys(q.shape[0], seq_len, sliding_window, device=query.device)
        scores = scores.masked_fill(~mask, -torch.inf)
        attended = torch.einsum("hqk,khd->qhd", torch.softmax(scores, dim=-1), v)
        output[loc[i] : loc[i + 1]] = attended.to(query.dtype)
    return output


def gather_pages(cache: Tensor, block_table: Tensor, seq_len: int) -> Tensor:
    """[seq_len, num_kv_heads, head_dim]: one sequence's keys or values, page after page."""
    block_size = cache.shape[2]
    pages = raw_numbers(cache)[block_table[: -(-seq_len // block_size)].long()].view(cache.dtype)
    return pages.transpose(1, 2).flatten(0, 1)[:seq_len]


def visible_keys(
    query_len: int, seq_len: int, sliding_window: int | None, *, device: torch.device
) -> Tensor:
    """[query_len, seq_len] bool: the last `query_len` positions look back, each at most so far."""
    position = torch.arange(seq_len - query_len, seq_len, device=device)[:, None]
    key = torch.arange(seq_len, device=device)[None, :]
    mask = key <= position
    if sliding_window is not None:
        mask &= key > position - sliding_window
    return mask


def store_kv(
    key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor
) -> None:
    """Write each token's key and value into its slot; negative slots are skipped."""
    block_size = key_cache.shape[2]
    if bool((slot_mapping < 0).any()):
        kept = slot_mapping >= 0
        key, value, slot_mapping = key[kept], value[kept], slot_mapping[kept]
    block = torch.div(slot_mapping, block_size, rounding_mode="floor")
    offset = slot_mapping % block_size
    for source, cache in ((key, key_cache), (value, value_cache)):
        raw_numbers(cache)[block, :, offset] = raw_numbers(to_cache(source, cache.dtype))


def to_cache(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Keys or values as they are stored: what float8 can't hold becomes the largest that it can."""
    if dtype == torch.float8_e4m3fn:
        largest = torch.finfo(dtype).max
        x = x.float().clamp(-largest, largest)
    return x.to(dtype)


def raw_numbers(cache: Tensor) -> Tensor:
    """The same memory in a dtype that can be indexed: PyTorch moves no float8."""
    return cache.view(torch.uint8) if cache.dtype == torch.float8_e4m3fn else cache


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    *,
    residual: Tensor | None = None,
    weight_offset: float = 0.0,
) -> Tensor | tuple[Tensor, Tensor]:
    """x / sqrt(mean(x^2) + eps) * (weight + weight_offset), after x = x + residual if given."""
    if residual is not None:
        x = x + residual
    wide = x.float()
    normed = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    if weight_offset != 0.0:  # Gemma scales before it rounds
        output = (normed * (weight.float() + weight_offset)).to(x.dtype)
    else:  # Llama rounds before it scales
        output = normed.to(x.dtype) * weight
    return output if residual is None else (output, x)


def rotary(
    query: Tensor, key: Tensor, cos_sin_cache: Tensor, positions: Tensor
) -> tuple[Tensor, Tensor]:
    """Rotate pairs (i, i + half) of the first 2 * half dimensions by the angle of the position."""
    cos, sin = cos_sin_cache[positions].to(query.dtype)[:, None].chunk(2, dim=-1)
    return _rotate(query, cos, sin), _rotate(key, cos, sin)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = cos.shape[-1]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)


def silu_and_mul(x: Tensor) -> Tensor:
    """silu(first half) * second half of the last dimension."""
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


def gelu_and_mul(x: Tensor, approximate: str = "none") -> Tensor:
    """gelu(first half) * second half of the last dimension."""
    gate, up = x.chunk(2, dim=-1)
    return F.gelu(gate, approximate=approximate) * up


def matmul_batch_invariant(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b in products of sixteen rows each, the last one padded."""
    num_rows = x.shape[0]
    if num_rows == 0:
        return x.new_empty(0, weight.shape[0])
    padded = F.pad(x, (0, 0, 0, -num_rows % 16))
    return torch.cat([F.linear(tile, weight, bias) for tile in padded.split(16)])[:num_rows]


def sample(logits: Tensor, params: SamplingTensors) -> Tensor:
    """argmax(filtered logits / temperature + noise); the plain argmax where temperature is 0."""
    greedy = logits.argmax(dim=-1)
    if params.all_greedy:
        return mark_bad_rows(greedy, logits)
    logits = logits.float()
    is_greedy = params.temperature == 0
    scaled = logits / torch.where(is_greedy, 1.0, params.temperature)[:, None]
    if params.any_filter:
        scaled = filter_logits(scaled, params.top_k, params.top_p, params.min_p)
    noise = gumbel_noise(params.seeds, params.positions, logits.shape[-1])
    tokens = torch.where(is_greedy, greedy, noise.add_(scaled).argmax(dim=-1))
    return mark_bad_rows(tokens, logits)


def mark_bad_rows(token_ids: Tensor, logits: Tensor) -> Tensor:
    """-1 in place of a token where the largest logit is no finite number."""
    return token_ids.masked_fill(~torch.isfinite(logits.amax(dim=-1)), -1)


def filter_logits(logits: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """Set what min_p, top_k and top_p remove to minus infinity.

    Args:
        logits: [N, vocab_size] float32, temperature applied.
        top_k, top_p, min_p: [N], as in SamplingTensors.
    """
    vocab_size = logits.shape[-1]
    highest = logits.amax(dim=-1, keepdim=True)
    # p >= min_p * p_max; log(0) is -inf, which keeps everything.
    logits = logits.masked_fill(logits < highest + torch.log(min_p)[:, None], -torch.inf)
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    k = torch.where(top_k > 0, top_k, vocab_size).clamp(max=vocab_size).long()
    kth = ordered.gather(-1, k[:, None] - 1)
    ordered = ordered.masked_fill(ordered < kth, -torch.inf)
    probability = torch.softmax(ordered, dim=-1)
    before = probability.cumsum(dim=-1) - probability
    ordered = ordered.masked_fill(
        (before >= top_p[:, None]) & (top_p[:, None] < 1.0) & (before > 0), -torch.inf
    )
    return torch.empty_like(logits).scatter_(-1, order, ordered)


def apply_penalties(logits: Tensor, rows: Tensor, penalties: Penalties) -> Tensor:
    """Lower the logits of ids that occurred already; rows without penalties cost nothing."""
    presence, frequency = penalties.presence[rows], penalties.frequency[rows]
    repetition = penalties.repetition[rows]
    index = torch.nonzero((presence != 0) | (frequency != 0) | (repetition != 1))[:, 0]
    if not len(index):
        return logits.float()
    logits = logits.to(torch.float32, copy=True)
    x = logits[index]
    occurred = penalties.occurrences[rows[index]]
    counts = occurred & MAX_COUNT
    factor = repetition[index, None]
    x = torch.where(occurred != 0, torch.where(x > 0, x / factor, x * factor), x)
    x = x - frequency[index, None] * counts
    x = x - presence[index, None] * (counts > 0)
    logits[index] = x
    return logits


def count_tokens(penalties: Penalties, rows: Tensor, token_ids: Tensor) -> None:
    """Add one to the counts of generated ids."""
    rows, token_ids = rows[token_ids >= 0], token_ids[token_ids >= 0]
    occurred = penalties.occurrences[rows, token_ids]
    is_full = (occurred & MAX_COUNT) == MAX_COUNT
    penalties.occurrences[rows, token_ids] = torch.where(is_full, occurred, occurred + 1)


def start_rows(state: DecodeState, columns: Tensor) -> None:
    """Write the columns of new sequences into their rows."""
    rows = columns[:, 0]
    integers = (state.last_token, state.num_tokens, state.max_tokens, state.top_k, state.seeds)
    for column, table in enumerate(integers, start=1):
        table[rows] = columns[:, column].to(table.dtype)
    floats = columns[:, 6:9].to(torch.int32).view(torch.float32)
    for column, table in enumerate((state.temperature, state.top_p, state.min_p)):
        table[rows] = floats[:, column]
    state.stop_ids[rows] = columns[:, 9:]
    state.is_active[rows] = (columns[:, 2] < columns[:, 3]).to(state.is_active.dtype)
    state.generated[rows] = -1


def decode_inputs(
    state: DecodeState, rows: Tensor, inputs: DecodeInputs, *, block_size: int
) -> None:
    """Look up what the next step of some sequences computes."""
    is_active = state.is_active[rows] != 0
    num_tokens = torch.where(is_active, state.num_tokens[rows], 0)
    positions = (num_tokens - 1).clamp_(min=0).long()
    tables = state.block_tables[rows]
    pages = tables.gather(1, positions[:, None] // block_size)[:, 0].long()
    slots = pages * block_size + positions % block_size
    inputs.input_ids.copy_(state.last_token[rows])
    inputs.positions.copy_(positions)
    inputs.next_positions.copy_(num_tokens)
    inputs.seq_lens.copy_(num_tokens)
    inputs.slot_mapping.copy_(torch.where(is_active, slots, -1))
    inputs.block_tables.copy_(tables)
    for name in ("temperature", "top_p", "min_p", "top_k", "seeds"):
        getattr(inputs, name).copy_(getattr(state, name)[rows])


def append_tokens(state: DecodeState, rows: Tensor, token_ids: Tensor) -> None:
    """Give sequences their next tokens and end those that a token or their length ends."""
    is_active = state.is_active[rows] != 0
    rows, token_ids = rows[is_active], token_ids[is_active]
    is_bad = token_ids < 0
    positions = state.num_tokens[rows].long()
    entries = (positions << 32) + torch.where(is_bad, BAD_LOGITS, token_ids)
    state.generated[rows, positions % state.generated.shape[1]] = entries
    ends = is_bad | (state.stop_ids[rows] == token_ids[:, None]).any(dim=1)
    ends |= positions + 1 >= state.max_tokens[rows]
    state.last_token[rows] = torch.where(is_bad, 0, token_ids)
    state.num_tokens[rows] = (positions + 1).to(state.num_tokens.dtype)
    state.is_active[rows] = (~ends).to(state.is_active.dtype)


def fill_last_tokens(state: DecodeState, input_ids: Tensor) -> None:
    """Replace -1 - row by the last token of that row."""
    unknown = input_ids < 0
    input_ids[unknown] = state.last_token[-1 - input_ids[unknown]]
