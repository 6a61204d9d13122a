"""Which servers a notebook's cells have made: a cell that is run again replaces its own."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nbllm.notebook_cell import NotebookCell
    from nbllm.server.handle import Server

_MAX_CELLS = 256


@dataclass(frozen=True, slots=True)
class Trace:
    """What is left of a server that a cell made.

    Attributes:
        port: where it listened.
        api_key: that was made for it, or None; clients that have it go on working.
        server: itself, while somebody holds it.
    """

    port: int
    api_key: str | None
    server: weakref.ref[Server]


@dataclass(slots=True)
class _CellRun:
    cell: NotebookCell
    traces: list[Trace]
    earlier: list[Trace]  # those of the run before


class CellServers:
    """Servers by the cell that made them."""

    def __init__(self) -> None:
        self._runs: dict[str, _CellRun] = {}

    def replaced_by(self, cell: NotebookCell | None) -> Trace | None:
        """Stop the servers of the cell's earlier run; the one whose turn it is to be replaced."""
        if cell is None:
            return None
        run = self._runs.get(cell.cell_id)
        if run is None or cell.is_rerun_of(run.cell):
            earlier = [] if run is None else run.traces
            for trace in earlier:
                server = trace.server()
                if server is not None:
                    server.stop()
            while len(self._runs) >= _MAX_CELLS:
                del self._runs[next(iter(self._runs))]
            run = self._runs[cell.cell_id] = _CellRun(cell, [], earlier)
        index = len(run.traces)
        return run.earlier[index] if index < len(run.earlier) else None

    def add(self, cell: NotebookCell | None, trace: Trace) -> None:
        """Remember a server that the cell has made, after `replaced_by`."""
        if cell is not None:
            self._runs[cell.cell_id].traces.append(trace)
