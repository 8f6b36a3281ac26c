"""A process that has a VM without a terminal: ``run -d``, and ``resume`` of a VM that is suspended."""

import contextlib
import os
import signal
from typing import Any, Callable, Dict, NoReturn, Optional

from .. import CommunicationChannel, MicroVMError, MicroVMIsolationManager, ProcessStream, VMState
from .._vm import VM
from . import output
from .fail import complain

# The quota is for managers of many VMs; the only VM of one may have what was asked for.
CONFIG: Dict[str, Any] = {"raise_on_error": True, "max_vcpus": 1 << 20, "max_memory_mb": 1 << 32}
ENDED = (VMState.STOPPED, VMState.ERROR, VMState.DESTROYED)
# Events wake the owner; this is for those that were told before the VM was what they say.
LOOK_AGAIN_S = 1.0


def begin(
    start: Callable[[MicroVMIsolationManager], VM],
    open_program: Callable[[VM], Optional[ProcessStream]] = lambda _: None,
) -> Optional[str]:
    """Has a new process start a VM and keep it while its program runs, or, without one, while it runs itself.

    Returns the VM's id once it and its program run, ``None`` when they do not: the new process has said why on stderr.
    Ctrl-C until then ends the start. It comes too late once an id is returned, and is blocked: the caller has but to print it.
    """
    ours, its = os.pipe()
    # Until it is known whom Ctrl-C is to end.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    child = os.fork()
    if child == 0:
        os.close(ours)
        # Of no session of a terminal's, and a child of init's, which reaps it.
        os.setsid()
        if os.fork():
            os._exit(0)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        os._exit(_own(start, open_program, its))
    os.close(its)
    os.waitpid(child, 0)
    with os.fdopen(ours, "rb") as pipe:
        pid = int(pipe.readline() or 0)
        try:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            vm_id = pipe.readline().decode().strip() or None
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            return vm_id
        except KeyboardInterrupt:
            # The pipe is open at its end, so the process is there.
            os.kill(pid, signal.SIGTERM)
            raise


class _Terminated(BaseException):
    """The process ends: its manager destroys the VM, unless that is suspended."""


def _terminate(*_: object) -> NoReturn:
    raise _Terminated


def _own(
    start: Callable[[MicroVMIsolationManager], VM],
    open_program: Callable[[VM], Optional[ProcessStream]],
    pipe: int,
) -> int:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _terminate)
    os.write(pipe, b"%d\n" % os.getpid())
    os.chdir("/")
    with contextlib.suppress(_Terminated):
        try:
            with MicroVMIsolationManager(CONFIG) as manager, manager.events() as events:
                vm = start(manager)
                program = open_program(vm)
                keeper = None if program is None else output.Keeper(_folder_of(vm))
                _leave_the_terminal()
                os.write(pipe, vm.vm_id.encode() + b"\n")
                os.close(pipe)
                if program is not None and keeper is not None:
                    # It ends early when the VM does, or is suspended.
                    with contextlib.suppress(MicroVMError), program:
                        for channel, data in program:
                            keeper.take(channel, data)
                    return 0
                while vm.instance.get_state() not in ENDED and not vm.instance.get_info()["suspended"]:
                    events.get(LOOK_AGAIN_S)
        except MicroVMError as error:
            complain(error)
            return 1
    return 0


def _folder_of(vm: VM) -> str:
    """The VM's folder, which its lock makes ours; it goes with the VM, and so does all that is in it."""
    return os.path.dirname(CommunicationChannel(vm.vm_id).socket_path)


def _leave_the_terminal() -> None:
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    os.close(null)
