# %% [markdown]
# # Write a kernel
#
# You will see a Triton kernel written in a cell, checked against the reference, broken on purpose,
# and put into the running model, which then says the same with it. No GPU is needed: Triton's
# interpreter runs kernels on the CPU, slowly and exactly. With a GPU, the same cells compile for
# it.

# %%
import os

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when it is imported

import triton
import triton.language as tl

from nbllm_kernels import reference

# %% [markdown]
# ## The op
#
# Each layer of a Llama-like model ends in `silu(gate) * up`, where one matrix product has written
# gate and up side by side, `[rows, gate | up]`. In plain PyTorch,
# [reference.py](../kernels/nbllm_kernels/reference.py) says what is right:

# %%
torch.manual_seed(0)
x = torch.randn(5, 2 * 300, device=DEVICE)  # 300: no power of two, on purpose
expected = reference.silu_and_mul(x)
x.shape, expected.shape

# %%
gate, up = x.chunk(2, dim=-1)
torch.testing.assert_close(expected, gate * torch.sigmoid(gate) * up)

# %% [markdown]
# ## The kernel
#
# A kernel is a program for one block of the result. `program_id` says which block this is, `arange`
# makes the numbers of its columns, and `mask` keeps it from reading and writing behind the end of a
# row. Everything in between stays in registers: memory is read once and written once.


# %%
@triton.jit
def silu_and_mul_kernel(x_ptr, out_ptr, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < SIZE
    gate = tl.load(x_ptr + row * 2 * SIZE + column, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + row * 2 * SIZE + SIZE + column, mask=mask, other=0.0).to(tl.float32)
    out = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out_ptr + row * SIZE + column, out.to(out_ptr.dtype.element_ty), mask=mask)


def silu_and_mul(x: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up for x = [rows, gate | up]."""
    x = x.contiguous()
    size = x.shape[-1] // 2
    out = torch.empty(x.shape[0], size, dtype=x.dtype, device=x.device)
    grid = (x.shape[0], triton.cdiv(size, 128))
    silu_and_mul_kernel[grid](x, out, SIZE=size, BLOCK=128)
    return out


torch.testing.assert_close(silu_and_mul(x), expected)
print(f"largest difference: {(silu_and_mul(x) - expected).abs().max().item():.0e}")

# %% [markdown]
# ## Does the check check?
#
# A test that can't fail proves nothing. Here is a kernel with a classic mistake, sigmoid without
# its sign, and the comparison must find it.


# %%
@triton.jit
def wrong_kernel(x_ptr, out_ptr, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < SIZE
    gate = tl.load(x_ptr + row * 2 * SIZE + column, mask=mask, other=0.0)
    up = tl.load(x_ptr + row * 2 * SIZE + SIZE + column, mask=mask, other=0.0)
    tl.store(out_ptr + row * SIZE + column, gate / (1.0 + tl.exp(gate)) * up, mask=mask)


wrong = torch.empty_like(expected)
wrong_kernel[(5, triton.cdiv(300, 128))](x, wrong, SIZE=300, BLOCK=128)
try:
    torch.testing.assert_close(wrong, expected)
except AssertionError as error:
    print(str(error).splitlines()[0])
else:
    raise AssertionError("the check is blind")

# %% [markdown]
# ## Odd shapes
#
# Kernels break at edges: one row, one column, one more than a block, half precision. The project's
# tests go through [hundreds of such cases](../tests/kernels/test_activation.py); here are a few.

# %%
for rows, size, dtype in [(1, 1, "float32"), (3, 127, "float32"), (2, 129, "float16")]:
    x = torch.randn(rows, 2 * size, device=DEVICE).to(getattr(torch, dtype))
    torch.testing.assert_close(silu_and_mul(x), reference.silu_and_mul(x), rtol=2e-3, atol=2e-3)
    print(f"{rows} x {size} {dtype}: the same")

# %% [markdown]
# ## Why one kernel: count the bytes
#
# Such an op computes next to nothing; its time is that of its memory traffic. Written as three
# operators (sigmoid, times gate, times up) each reads and writes whole tensors:

# %%
rows, size, width = 4096, 3072, 2  # Qwen3-0.6B's width, 4,096 tokens, bfloat16
tensor = rows * size * width
three_operators = (1 + 1) * tensor + (2 + 1) * tensor + (2 + 1) * tensor
one_kernel = (2 + 1) * tensor
print(f"three operators move {three_operators / 1e6:.0f} MB, one kernel {one_kernel / 1e6:.0f} MB")
assert three_operators / one_kernel > 2.6

# %% [markdown]
# What that is worth in time, measured and with its share of the memory's speed, is in
# [kernels/README.md](../kernels/README.md). The interpreter says nothing about speed, so no time is
# shown here.
#
# ## Into the model
#
# [decoder.py](../nbllm/models/decoder.py) asks for norm, matrix product and activation in one call,
# `norm_gated_linear`. For one text we put three calls in its place, the last of them ours, in all
# six layers of the bundled model:

# %%
import nbllm.models.decoder as decoder
from nbllm import LLM, SamplingParams
from nbllm_kernels import linear, rms_norm

llm = LLM(device=DEVICE, dtype="float32", enforce_eager=True, enable_prefix_caching=False)
params = SamplingParams(temperature=0, max_tokens=4)
prompt = "The capital of France is"
before = llm.generate(prompt, params, use_tqdm=False)[0].outputs[0]

calls = 0


def with_our_kernel(x, norm_weight, eps, weight, bias=None, **_):
    """norm_gated_linear for silu."""
    global calls
    calls += 1
    return silu_and_mul(linear(rms_norm(x, norm_weight, eps), weight, bias))


original, decoder.norm_gated_linear = decoder.norm_gated_linear, with_our_kernel
try:
    after = llm.generate(prompt, params, use_tqdm=False)[0].outputs[0]
finally:
    decoder.norm_gated_linear = original
print(f"{calls} calls of our kernel: {after.text!r}")

# %%
assert calls > 0 and calls % 6 == 0  # in each of the six layers, step after step
assert after.token_ids == before.token_ids
assert "Paris" in after.text

# %% [markdown]
# ## Your turn
#
# Change the kernel's cell and run the cells below it again: another `BLOCK`, gelu instead of silu
# (`reference.gelu_and_mul` is what is right then), or two rows to a program. A kernel that is good
# enough belongs into [kernels/nbllm_kernels/gpu/](../kernels/nbllm_kernels/gpu/activation.py), with
# its reference and its tests.
#
# ## Give the memory back

# %%
llm.close()
