"""The package for asyncio: the classes of the same names with ``Async`` before them, and the same arguments and results.

Every failure is raised, whatever ``raise_on_error`` says: nothing answers ``None`` or ``False``. Cancelling a task
cancels its operation here and in the guest: a program that ``run`` or ``send_command("exec", ...)`` waits for is killed, the VM goes on,
and a start is undone. What is worse by half (stop, pause, resume, suspend, snapshot, destroy) goes on without the task.

No call takes a thread. Any event loop with ``add_reader`` will do (uvloop's, too), as many as there are threads; a loop may be closed
while operations are under way, and their results are dropped.

Example:
    >>> async def hello():
    ...     async with AsyncMicroVMIsolationManager({"default_memory_mb": 128}) as manager:
    ...         async with manager.run_vm() as vm:
    ...             return await vm.run(["echo", "hello"])
    >>> asyncio.run(hello()).stdout
    'hello\\n'
"""

from ._attach import AsyncAttachedVM, attach, running_vms
from ._events import AsyncEventStream, AsyncEventSubscription
from ._instance import AsyncMicroVMInstance
from ._manager import AsyncMicroVMIsolationManager
from ._stream import AsyncProcessStream
from ._vm import AsyncVM

__all__ = [
    "AsyncAttachedVM",
    "AsyncEventStream",
    "AsyncEventSubscription",
    "AsyncMicroVMInstance",
    "AsyncMicroVMIsolationManager",
    "AsyncProcessStream",
    "AsyncVM",
    "attach",
    "running_vms",
]
