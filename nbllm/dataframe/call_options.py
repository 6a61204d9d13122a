"""CallOptions: how a call of an accessor treats its rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nbllm.errors import InvalidRequestError


@dataclass(slots=True)
class CallOptions:
    """How a call treats its rows; each is an argument of the accessors' methods.

    Attributes:
        na: "skip" leaves rows with missing values unanswered, "fill" makes empty texts of them,
            "raise" refuses them.
        errors: "column" puts why a row failed into a column, "warn" only warns, "raise" raises the
            first one.
        max_errors: once more rows than that have failed, the call stops and raises
            RequestFailedError: a number, or below 1.0 a share of all rows; None is no limit.
        on_interrupt: "raise" raises `Interrupted` with the frame so far, "return" returns it.
        dedupe: rows that are alike are computed once; "auto": where chance has no part.
        order: "prefix" computes together what begins alike, "given" as it stands.
        journal: name of a job, or a folder, where results are kept and found.
        use_tqdm: show progress; or a callable that makes a tqdm-like bar.
        label: what the progress says is done.
    """

    na: str = "skip"
    errors: str = "column"
    max_errors: int | float | None = None
    on_interrupt: str = "raise"
    dedupe: bool | str = "auto"
    order: str = "prefix"
    journal: Any = None
    use_tqdm: Any = True
    label: str = "Generating"

    def check(self) -> None:
        """Raise InvalidRequestError, which names the argument, for a value that is none."""
        for parameter, allowed in (
            ("na", ("skip", "fill", "raise")),
            ("errors", ("column", "warn", "raise")),
            ("on_interrupt", ("raise", "return")),
            ("dedupe", (True, False, "auto")),
            ("order", ("prefix", "given")),
        ):
            check_choice(parameter, getattr(self, parameter), allowed)
        limit: Any = self.max_errors
        is_number = type(limit) is int and limit >= 0
        is_share = type(limit) is float and 0.0 <= limit < 1.0
        if not (limit is None or is_number or is_share):
            raise InvalidRequestError(
                "max_errors must be a number of rows, a share of them below 1.0, or None, got "
                f"{limit!r}",
                parameter="max_errors",
            )


def check_choice(parameter: str, value: Any, allowed: tuple[Any, ...]) -> None:
    """Raise InvalidRequestError unless `value` is one of `allowed`."""
    if not any(
        value is other or (type(value) is type(other) and value == other) for other in allowed
    ):
        choices = ", ".join(map(repr, allowed))
        raise InvalidRequestError(
            f"{parameter} must be one of {choices}, got {value!r}", parameter=parameter
        )
