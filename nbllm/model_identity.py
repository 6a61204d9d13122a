"""model_identity: a name for what a model computes, that changes when its weights do."""

from __future__ import annotations

import hashlib
from pathlib import Path

_SAMPLES = 64  # places in a file that are read, beside its ends
_SAMPLE_BYTES = 4096
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
_NUMERICS = "1"  # raised whenever kernels change what a model computes, beyond rounding


def model_identity(folder: Path, device: str, dtype: str, load_format: str) -> str:
    """64 hex digits that stand for weights, tokenizer, configuration and how they are computed.

    Small files count whole. Of a weights file count its size, both ends (a safetensors file names
    its tensors at its beginning) and samples in between: gigabytes take milliseconds, and a model
    that was trained further differs in every sample.

    Args:
        folder: of the model.
        device, dtype: results of another kind of device or dtype differ in rounding.
        load_format: "dummy" weights are made, not read.
    """
    digest = hashlib.sha256(f"{_NUMERICS} {dtype} {device} {load_format}".encode())
    for path in sorted(folder.iterdir()):
        if not path.is_file():
            continue
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            if path.suffix not in _WEIGHTS or size <= 2 * _SAMPLES * _SAMPLE_BYTES:
                digest.update(file.read())
                continue
            last = size - _SAMPLE_BYTES
            for sample in range(_SAMPLES + 1):
                file.seek(last * sample // _SAMPLES)
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()
