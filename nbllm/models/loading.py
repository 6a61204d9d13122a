"""From a checkpoint's tensors to a model's parameters: names matched strictly, parts fused."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from nbllm.errors import ModelLoadError

_LISTED = 8  # names in an error message


def load_parameters(
    model: nn.Module,
    weights: Iterable[tuple[str, Tensor]],
    *,
    strip_prefix: str = "",
    rename: Mapping[str, str] | None = None,
    fused: Mapping[str, tuple[str, int, int]] | None = None,
    ignored: Sequence[str] = (),
    transposed: Sequence[str] = (),
) -> None:
    """Copy tensors into the parameters of the same name, one at a time.

    Args:
        model: parameters allocated, content arbitrary.
        weights: names and tensors of the checkpoint.
        strip_prefix: taken off the front of a name that has it.
        rename: beginnings of names, old -> new.
        fused: module name -> (fused module, first row, number of rows): the tensor is a part.
        ignored: names that contain one of these are skipped on purpose.
        transposed: names that contain one of these are stored [in, out].

    Raises:
        ModelLoadError: lists missing and unexpected names, or both shapes of a tensor that does
            not fit.
    """
    parameters = dict(model.named_parameters())
    missing = {name: parameter.numel() for name, parameter in parameters.items()}
    unexpected: list[str] = []
    for original, tensor in weights:
        name = original.removeprefix(strip_prefix)
        if any(part in name for part in ignored):
            continue
        for old, new in (rename or {}).items():
            if name.startswith(old):
                name = new + name.removeprefix(old)
        rows = slice(None)
        parent, _, leaf = name.rpartition(".")
        head, _, module = parent.rpartition(".")
        if fused and module in fused:
            target, start, size = fused[module]
            name = f"{head}.{target}.{leaf}"
            rows = slice(start, start + size)
        parameter = parameters.get(name)
        if parameter is None:
            unexpected.append(original)
            continue
        if any(part in name for part in transposed):
            tensor = tensor.t()
        destination = parameter.data[rows]
        if destination.shape != tensor.shape:
            raise ModelLoadError(
                f"tensor {original}: shape {tuple(tensor.shape)}, and config.json says "
                f"{tuple(destination.shape)}"
            )
        if not tensor.dtype.is_floating_point:
            raise ModelLoadError(f"tensor {original}: dtype {tensor.dtype} is not a float type")
        destination.copy_(tensor)
        if not torch.isfinite(destination.sum(dtype=torch.float32)) and not bool(
            torch.isfinite(destination).all()
        ):
            raise ModelLoadError(
                f"tensor {original}: contains NaN or infinity in {destination.dtype}"
            )
        missing[name] -= tensor.numel()
        if missing[name] == 0:
            del missing[name]
    if missing or unexpected:
        raise ModelLoadError(
            "the checkpoint does not fit config.json: "
            f"missing {_list(sorted(missing))}; unexpected {_list(unexpected)}"
        )


def _list(names: Sequence[str]) -> str:
    if not names:
        return "nothing"
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more
