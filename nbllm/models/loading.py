"""From a checkpoint's tensors to a model's parameters: names matched strictly, parts fused."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import nn

from nbllm.errors import ModelLoadError
from nbllm.models.upload import Upload
from nbllm.models.weights import CheckpointTensor

_LISTED = 8  # names in an error message


def load_parameters(
    model: nn.Module,
    weights: Iterable[CheckpointTensor],
    *,
    strip_prefixes: Sequence[str] = (),
    rename: Mapping[str, str] | None = None,
    fused: Mapping[str, tuple[str, int, int]] | None = None,
    ignored: Sequence[str] = (),
    transposed: Sequence[str] = (),
) -> None:
    """Copy tensors into the parameters of the same name, one at a time.

    Args:
        model: parameters allocated, content arbitrary.
        weights: the tensors of the checkpoint.
        strip_prefixes: taken off the front of a name that has them, one after the other.
        rename: parts of names, old -> new.
        fused: module name -> (fused module, first row, number of rows): the tensor is a part.
        ignored: names that contain one of these are skipped on purpose.
        transposed: parameters whose names contain one of these are stored [in, out].

    Raises:
        ModelLoadError: lists missing and unexpected names; or names the tensor, and its file,
            that has another shape or dtype, or holds NaN or infinity.
    """
    parameters = dict(model.named_parameters())
    upload = Upload(next(iter(parameters.values())).device)
    missing = {name: parameter.numel() for name, parameter in parameters.items()}
    seen: set[str] = set()
    unexpected: list[str] = []
    for original, tensor, file in weights:
        name = original
        for prefix in strip_prefixes:
            name = name.removeprefix(prefix)
        if any(part in name for part in ignored):
            continue
        where = f"{file}, tensor {original}"
        if name in seen:  # with and without a prefix
            raise ModelLoadError(f"{where}: is there twice")
        seen.add(name)
        for old, new in (rename or {}).items():
            name = name.replace(old, new)
        name, rows = _fuse(name, fused or {})
        if name not in parameters:
            unexpected.append(f"{original} ({file})")
            continue
        if tensor.ndim == 2 and any(part in name for part in transposed):
            tensor = tensor.t()
        upload.copy(tensor, parameters[name].data[rows], where)
        missing[name] -= tensor.numel()
    upload.finish()
    lacking = sorted(name for name, count in missing.items() if count)
    if lacking or unexpected:
        raise ModelLoadError(
            "the weights do not fit config.json: "
            f"missing {_list(lacking)}; unexpected {_list(unexpected)}"
        )


def _fuse(name: str, fused: Mapping[str, tuple[str, int, int]]) -> tuple[str, slice]:
    """The parameter that a tensor belongs to, and the rows of it that the tensor fills."""
    parent, _, leaf = name.rpartition(".")
    head, _, module = parent.rpartition(".")
    if module not in fused:
        return name, slice(None)
    target, start, size = fused[module]
    return f"{head}.{target}.{leaf}", slice(start, start + size)


def _list(names: Sequence[str]) -> str:
    if not names:
        return "nothing"
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more
