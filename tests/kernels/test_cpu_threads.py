"""A thread's pool ends, and comes back when it is needed; small work has one thread."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from nbllm_kernels import cpu_threads, one_thread

CODE = """
import os, threading, time
import torch
from nbllm_kernels import release_threads

def num_threads():
    return len(os.listdir("/proc/self/task"))

def settle(expected):
    deadline = time.monotonic() + 5
    while num_threads() != expected and time.monotonic() < deadline:
        time.sleep(0.01)
    assert num_threads() == expected, (num_threads(), expected)

release_threads()  # nothing to end
before = num_threads()
for _ in range(2):
    assert torch.ones(1 << 20).exp().sum() > 0
    assert num_threads() == before + 1, (num_threads(), before)
    release_threads()
    settle(before)
assert torch.get_num_threads() == 2

# Another thread's pool is left alone.
go, done = threading.Event(), threading.Event()
def compute():
    torch.ones(1 << 20).exp()
    done.set()
    go.wait()
    torch.ones(1 << 20).exp()
thread = threading.Thread(target=compute)
thread.start()
done.wait()
release_threads()
assert num_threads() == before + 2, (num_threads(), before)
go.set()
thread.join()
"""


@pytest.mark.skipif(cpu_threads._pause is None, reason="not GCC's OpenMP")
def test_the_pool_of_the_calling_thread_ends() -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "2"}
    command = [sys.executable, "-c", CODE]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@pytest.mark.skipif(cpu_threads._set_num_threads is None, reason="no OpenMP")
def test_one_thread_is_for_the_calling_thread_and_ends() -> None:
    before = torch.get_num_threads()
    with ThreadPoolExecutor() as other:
        with one_thread():
            assert torch.get_num_threads() == 1
            assert other.submit(torch.get_num_threads).result() == before
        assert torch.get_num_threads() == before
        with pytest.raises(ZeroDivisionError), one_thread():
            _ = 1 / 0
    assert torch.get_num_threads() == before
