"""The cell of a notebook that runs: which it is, so that a cell that is run again replaces what it
made, and what is shown in it, so that it can be replaced."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class NotebookCell:
    """One run of one cell.

    Attributes:
        cell_id: the notebook's id of the cell (it stays when the cell is edited), or its source
            where the frontend sends none.
        execution_count: the number in `In [...]`.
    """

    cell_id: str
    execution_count: int

    def is_rerun_of(self, earlier: NotebookCell) -> bool:
        """True if this is a later run of the same cell."""
        return self.cell_id == earlier.cell_id and self.execution_count != earlier.execution_count


def current_cell() -> NotebookCell | None:
    """The cell that runs now; None outside a Jupyter kernel."""
    ipython = sys.modules.get("IPython")
    shell: Any = ipython.get_ipython() if ipython is not None else None
    kernel = getattr(shell, "kernel", None)
    if kernel is None:
        return None  # a script, or IPython in a terminal, where nothing is run again
    parent = kernel.get_parent("shell") or {}
    cell_id = (parent.get("metadata") or {}).get("cellId")
    if cell_id is None:
        cell_id = (parent.get("content") or {}).get("code", "")
    return NotebookCell(str(cell_id), int(shell.execution_count))


def show_replaceable(bundles: Mapping[str, Mapping[str, str]]) -> None:
    """Show outputs in the cell that runs, which `update_display` can replace.

    Args:
        bundles: display id -> MIME type -> what is shown.

    Raises:
        NotImplementedError: outside of a Jupyter kernel nothing that is shown can be replaced;
            IPython takes an object's other representations then.
    """
    from IPython.core.getipython import get_ipython
    from IPython.display import display

    if getattr(get_ipython(), "kernel", None) is None:  # a terminal, or no IPython at all
        raise NotImplementedError
    for display_id, bundle in bundles.items():
        display(dict(bundle), raw=True, display_id=display_id)
