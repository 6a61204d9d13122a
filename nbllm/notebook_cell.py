"""Which cell of a notebook is running: so that a cell that is run again replaces what it made."""

from __future__ import annotations

import sys
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
