"""A running VM with the names of ``subprocess`` and ``pathlib``."""

import io
from types import TracebackType
from typing import TYPE_CHECKING, Any, Callable, Mapping, Optional, Type, Union, overload

from .._errors import ChannelError, CommandError, VmNotFoundError
from .._vm import Args, CompletedProgram, Input, Run, Word, command, content_of, encoded
from ._instance import AsyncMicroVMInstance
from ._operations import Bytes, Opening, go_on
from ._ports import Ports
from ._stream import AsyncProcessStream

if TYPE_CHECKING:
    from typing_extensions import Literal

    from ._attach import AsyncAttachedVM
    from ._manager import AsyncMicroVMIsolationManager


class AsyncPrograms(Ports):
    """Programs, files and ports of a VM, whichever process has it."""

    instance: Union[AsyncMicroVMInstance, "AsyncAttachedVM"]

    @overload
    async def run(
        self,
        args: Args,
        *,
        shell: bool = ...,
        check: bool = ...,
        timeout: Optional[float] = ...,
        input: Optional[Input] = ...,
        text: "Literal[True]" = ...,
        capture_output: bool = ...,
        cwd: Optional[str] = ...,
        env: Optional[Mapping[str, str]] = ...,
        user: Optional[int] = ...,
        on_output: Optional[Callable[[str, str], Any]] = ...,
    ) -> CompletedProgram[str]: ...

    @overload
    async def run(
        self,
        args: Args,
        *,
        shell: bool = ...,
        check: bool = ...,
        timeout: Optional[float] = ...,
        input: Optional[Input] = ...,
        text: "Literal[False]",
        capture_output: bool = ...,
        cwd: Optional[str] = ...,
        env: Optional[Mapping[str, str]] = ...,
        user: Optional[int] = ...,
        on_output: Optional[Callable[[str, bytes], Any]] = ...,
    ) -> CompletedProgram[bytes]: ...

    async def run(
        self,
        args: Args,
        *,
        shell: bool = False,
        check: bool = False,
        timeout: Optional[float] = None,
        input: Optional[Input] = None,
        text: bool = True,
        capture_output: bool = True,
        cwd: Optional[str] = None,
        env: Optional[Mapping[str, str]] = None,
        user: Optional[int] = None,
        on_output: Optional[Callable[[str, Any], Any]] = None,
    ) -> Union[CompletedProgram[str], CompletedProgram[bytes]]:
        """Runs a program in the guest to its end, as ``subprocess.run`` does on the host.

        Does not block the loop, except where ``sys.stdout`` does. Cancelling, and every error, kills the program with all its
        descendants. ``VM.run`` has the errors.

        Args:
            args: The program and its arguments; a name without a slash is looked up on the guest's `PATH`.
            shell: Whether ``args`` is one line for the guest's `/bin/sh`.
            check: Whether an exit code other than 0 raises.
            timeout: Seconds that the program may run, more than 0 and at most 86400; no limit where left out.
            input: Its whole input; nothing where left out. A string is sent as UTF-8.
            text: Whether the output is decoded as UTF-8, with U+FFFD for what is not; else it is ``bytes``.
            capture_output: Whether the output is returned; else it goes to ``sys.stdout`` and ``sys.stderr`` as it comes.
            cwd: Its working directory; `/` where left out.
            env: Environment variables, beside the usual ones and in their place (docs/guest.md).
            user: The uid that it runs as, 0 to 4294967294; 0, which is root, where left out.
            on_output: A function that is called on the loop's thread with `"stdout"` or `"stderr"` and each piece of the output
                as it comes, beside what ``capture_output`` says; what it raises kills the program and is raised.
        """
        call = Run(args, shell, check, timeout, input, text, capture_output, cwd, env, user, on_output)
        async with self.instance.stream(**call.arguments) as stream:
            try:
                returncode = await stream.wait(call.left())
            except (ChannelError, CommandError) as error:
                if not call.is_timeout(error):
                    raise
                raise call.timed_out() from None
        return call.end(returncode)

    def popen(
        self,
        args: Args,
        *,
        shell: bool = False,
        cwd: Optional[str] = None,
        env: Optional[Mapping[str, str]] = None,
        user: Optional[int] = None,
        timeout: Optional[float] = None,
        pty: bool = False,
        rows: Optional[int] = None,
        columns: Optional[int] = None,
    ) -> Opening[AsyncProcessStream]:
        """Starts a program in the guest and returns a handle to its input and output, by ``await`` or ``async with``.

        Does not block the loop. Cancelling kills the program. It is ``AsyncMicroVMInstance.stream`` with the arguments of
        ``run``.

        Args:
            args: The program and its arguments; a name without a slash is looked up on the guest's `PATH`.
            shell: Whether ``args`` is one line for the guest's `/bin/sh`.
            cwd: Its working directory; `/` where left out.
            env: Environment variables, beside the usual ones and in their place (docs/guest.md).
            user: The uid that it runs as, 0 to 4294967294; 0, which is root, where left out.
            timeout: Seconds that it may run, more than 0 and at most 86400; no limit where left out.
            pty: Whether it runs on a terminal; stderr comes with stdout then.
            rows: The terminal's height in characters, 1 to 65535; 24 where left out.
            columns: The terminal's width in characters, 1 to 65535; 80 where left out.
        """
        program, rest = command(args, shell)
        return self.instance.stream(
            program, rest, env=env, cwd=cwd, uid=user, timeout=timeout, pty=pty, rows=rows, columns=columns
        )

    def exec(self, *args: Word) -> Opening[AsyncProcessStream]:
        """Starts a program in the guest: ``popen`` with each word as an argument.

        Does not block the loop. Cancelling kills the program.

        Args:
            args: The program and its arguments.
        """
        return self.popen(args)

    async def write_bytes(self, path: str, data: Bytes, *, mode: Optional[int] = None) -> None:
        """Replaces a file of the guest.

        Does not block the loop. Cancelling leaves the old file.

        Args:
            path: The path in the guest; its folder must be there.
            data: The content.
            mode: Permission bits of the file, 0 to 0o7777 (chmod(2)); 0644 for a new one where left out.
        """
        await self.instance.upload(content_of(data), path, mode=mode)

    async def write_text(self, path: str, text: str, *, mode: Optional[int] = None) -> None:
        """Replaces a file of the guest by a text, as UTF-8.

        Does not block the loop. Cancelling leaves the old file.

        Args:
            path: The path in the guest; its folder must be there.
            text: The content.
            mode: Permission bits of the file, 0 to 0o7777 (chmod(2)); 0644 for a new one where left out.
        """
        await self.write_bytes(path, encoded(text), mode=mode)

    async def read_bytes(self, path: str) -> bytes:
        """Returns the content of a file of the guest.

        Does not block the loop. Holds the file in memory, as far as the VM could hold it.

        Args:
            path: The path in the guest.
        """
        content = io.BytesIO()
        await self.instance.download(path, content)
        return content.getvalue()

    async def read_text(self, path: str) -> str:
        """Returns the content of a file of the guest, which must be UTF-8.

        Does not block the loop. Holds the file in memory, as far as the VM could hold it.

        Args:
            path: The path in the guest.

        Raises:
            UnicodeDecodeError: The file is not UTF-8; ``read_bytes`` takes any.
        """
        return (await self.read_bytes(path)).decode()


class AsyncVM(AsyncPrograms):
    """A running VM, as ``AsyncMicroVMIsolationManager.run_vm`` makes it: the twin of ``VM``.

    Leaving its ``async with`` block destroys it. Every failure is raised.

    Attributes:
        vm_id: The id of the VM.
        instance: The same VM with all that it can: pause, snapshot, upload, health and more.

    Args:
        manager: The manager that has the VM.
        instance: The VM, which runs.
    """

    vm_id: str
    instance: AsyncMicroVMInstance

    def __init__(self, manager: "AsyncMicroVMIsolationManager", instance: AsyncMicroVMInstance) -> None:
        self._manager = manager
        self.instance = instance
        self._operations = instance._operations
        self.vm_id = instance.vm_id

    async def __aenter__(self) -> "AsyncVM":
        return self

    async def __aexit__(
        self, kind: Optional[Type[BaseException]], error: Optional[BaseException], traceback: Optional[TracebackType]
    ) -> None:
        if kind is GeneratorExit:
            go_on(self._manager._operations.destroy_vm, self.vm_id)
        else:
            await self.destroy()

    def __repr__(self) -> str:
        return "<AsyncVM{}".format(repr(self.instance)[len("<AsyncMicroVMInstance") :])

    async def destroy(self) -> None:
        """Destroys the VM in any state, with its files and its suspended state, and gives its quota back.

        Does not block the loop. Goes on when cancelled. May be called twice.
        """
        if self._manager._blocking.get_vm(self.vm_id) is not self.instance._blocking:
            return
        try:
            await self._manager.destroy_vm(self.vm_id)
        except VmNotFoundError:
            # A policy or another task destroyed it at this moment.
            pass
