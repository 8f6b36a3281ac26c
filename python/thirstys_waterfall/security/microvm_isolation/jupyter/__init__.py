"""Cells of a notebook that run in a VM: ``%load_ext thirstys_waterfall.security.microvm_isolation.jupyter``.

Needs IPython, which the extra ``[jupyter]`` brings. ``%%microvm`` runs a cell in a VM that the notebook has from then on,
``%microvm`` shows, saves or removes it; docs/notebooks.md. Managers and VMs are shown as tables and cards.
"""

from typing import Any, Dict

from ._display import register, unregister
from ._magic import Notebook

__all__ = ["load_ipython_extension", "unload_ipython_extension"]

_loaded: Dict[int, Notebook] = {}


def load_ipython_extension(shell: Any) -> None:
    """Gives a shell the magics and the displays.

    Does not block. ``%load_ext`` calls it.

    Args:
        shell: The ``InteractiveShell``.
    """
    notebook = Notebook(shell)
    _loaded[id(shell)] = notebook
    notebook.load()
    register(shell)


def unload_ipython_extension(shell: Any) -> None:
    """Takes the magics and the displays back and destroys the VM of the cells.

    Blocks for about 100 ms. ``%unload_ext`` calls it.

    Args:
        shell: The ``InteractiveShell``.
    """
    unregister(shell)
    notebook = _loaded.pop(id(shell), None)
    if notebook is not None:
        notebook.unload()
