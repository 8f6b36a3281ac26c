"""A running VM with the names of ``subprocess`` and ``pathlib``: everything raises, and nothing is ``Optional``."""

import io
import os
import shlex
import socket
import sys
import time
from dataclasses import dataclass
from types import TracebackType
from typing import (
    IO,
    TYPE_CHECKING,
    Any,
    AnyStr,
    Callable,
    Dict,
    Generic,
    List,
    Mapping,
    Optional,
    Sequence,
    Tuple,
    Type,
    Union,
    overload,
)

from . import _native
from ._errors import (
    ChannelError,
    CommandError,
    InvalidTypeError,
    InvalidValueError,
    MicroVMError,
    ProgramFailedError,
    ProgramTimeoutError,
    VmNotFoundError,
)
from ._text import TextDecoder
from ._types import PortInfo

if TYPE_CHECKING:
    from typing_extensions import Literal

Word = Union[str, "os.PathLike[str]"]
Args = Union[Word, Sequence[Word]]
Input = Union[str, bytes, bytearray, memoryview]


@dataclass(frozen=True)
class CompletedProgram(Generic[AnyStr]):
    """How a program of a guest ended, as ``VM.run`` returns it: the twin of ``subprocess.CompletedProcess``.

    Args:
        args: The program and its arguments, as they were given.
        returncode: The exit code, or the negative number of the signal that ended the program.
        stdout: What it wrote to stdout; empty with ``capture_output=False``.
        stderr: What it wrote to stderr; empty with ``capture_output=False``.

    Example:
        >>> CompletedProgram(["true"], 0, "", "").check_returncode()
    """

    args: Args
    returncode: int
    stdout: AnyStr
    stderr: AnyStr

    def check_returncode(self) -> None:
        """Raises an error unless the exit code is 0.

        Does not block.

        Raises:
            ProgramFailedError: The exit code is not 0, or a signal ended the program (`program_failed`).
        """
        if self.returncode != 0:
            raise ProgramFailedError(self.args, self.returncode, self.stdout, self.stderr)


class Programs:
    """Programs, files and ports of a VM, whichever process has it; every failure is raised."""

    instance: Union[_native.MicroVMInstance, _native.AttachedVM]

    @overload
    def run(
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
    def run(
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

    def run(
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

        Blocks until the program ends. Holds its whole output in memory; ``popen`` hands it on piece by piece.
        Ctrl-C and every error kill the program with all its descendants.

        Args:
            args: The program and its arguments; a name without a slash is looked up on the guest's `PATH`.
            shell: Whether ``args`` is one line for the guest's `/bin/sh`.
            check: Whether an exit code other than 0 raises.
            timeout: Seconds that the program may run, more than 0 and at most 86400; no limit where left out.
            input: Its whole input; nothing where left out. A string is sent as UTF-8.
            text: Whether the output is decoded as UTF-8, with U+FFFD for what is not; else it is ``bytes``.
            capture_output: Whether the output is returned; else it goes to ``sys.stdout`` and ``sys.stderr``
                as it comes.
            cwd: Its working directory; `/` where left out.
            env: Environment variables, beside the usual ones and in their place (docs/guest.md).
            user: The uid that it runs as, 0 to 4294967294; 0, which is root, where left out.
            on_output: A function that is called, here, with `"stdout"` or `"stderr"` and each piece of the output as it
                comes, beside what ``capture_output`` says; what it raises kills the program and is raised.

        Raises:
            InvalidTypeError: An argument has the wrong type.
            InvalidValueError: An argument is out of range, or ``args`` is one string with spaces.
            CommandError: The guest does not start it (`program_not_found`, `permission_denied`).
            ProgramFailedError: With ``check``, the exit code is not 0 (`program_failed`).
            ProgramTimeoutError: The program did not end in time and was killed (`program_timeout`).
            VmStateError: The VM does not run (`invalid_state`).
            ChannelError: The channel to the guest failed.

        Example:
            >>> vm.run(["tr", "a-z", "A-Z"], input="hello", check=True).stdout
            'HELLO'
            >>> vm.run("exit 3", shell=True).returncode
            3
            >>> vm.run(["echo", "hello"], on_output=print).returncode
            stdout hello
            <BLANKLINE>
            0
        """
        call = Run(args, shell, check, timeout, input, text, capture_output, cwd, env, user, on_output)
        with self.instance.stream(**call.arguments) as stream:
            try:
                returncode = stream.wait(call.left())
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
    ) -> _native.ProcessStream:
        """Starts a program in the guest and returns a handle to its input and output.

        Blocks until the program runs. It is ``MicroVMInstance.stream`` with the arguments of ``run``.

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

        Raises:
            MicroVMError: Every error of ``MicroVMInstance.stream``.

        Example:
            >>> with vm.popen("echo hello; exit 2", shell=True) as program:
            ...     list(program), program.exit_code
            ([('stdout', b'hello\\n')], 2)
        """
        program, rest = command(args, shell)
        return self.instance.stream(
            program, rest, env=env, cwd=cwd, uid=user, timeout=timeout, pty=pty, rows=rows, columns=columns
        )

    def exec(self, *args: Word) -> _native.ProcessStream:
        """Starts a program in the guest: ``popen`` with each word as an argument.

        Blocks until the program runs.

        Args:
            args: The program and its arguments.

        Raises:
            MicroVMError: Every error of ``popen``.

        Example:
            >>> with vm.exec("echo", "hello") as program:
            ...     list(program)
            [('stdout', b'hello\\n')]
        """
        return self.popen(args)

    def connect(self, port: int, address: Optional[str] = None, timeout: Optional[float] = None) -> socket.socket:
        """Connects to a TCP port of the guest and returns a socket, as ``socket.create_connection`` does.

        Blocks until the guest has connected. Needs no network of the VM. ``MicroVMInstance.connect`` has the details.

        Args:
            port: The port, 1 to 65535.
            address: Where in the guest it is, as an IPv4 or IPv6 address; where left out, 127.0.0.1, and ``::1`` where that
                refuses.
            timeout: Seconds that it may take, 0 to 86400; ``command_timeout_s`` where left out. The socket itself has none.

        Raises:
            PortRefusedError: No program of the guest listens there (`connection_refused`).
            MicroVMError: Every other error of ``MicroVMInstance.connect``.

        Example:
            >>> import http.client
            >>> server = vm.run(["httpd", "-p", "8002", "-h", "/etc"], check=True)
            >>> client = http.client.HTTPConnection("vm")
            >>> client.sock = vm.connect(8002)
            >>> client.request("GET", "/hostname")
            >>> client.getresponse().status
            200
        """
        return self.instance.connect(port, address, timeout)

    def publish(
        self,
        port: int,
        host_port: int = 0,
        address: str = "127.0.0.1",
        protocol: "Literal['tcp']" = "tcp",
        guest_address: Optional[str] = None,
    ) -> _native.PublishedPort:
        """Has this host listen at a port, and carries the connections that come to a TCP port of the guest.

        Does not block. Needs no network of the VM, and no privilege. ``MicroVMInstance.publish`` has the details.

        Args:
            port: The port of the guest, 1 to 65535.
            host_port: The port of the host, 0 to 65535; one that is free where it is 0.
            address: The address of the host to listen at. Every program of the host may connect to 127.0.0.1; ``0.0.0.0`` or
                ``::`` lets other machines connect, too.
            protocol: ``tcp``.
            guest_address: Where in the guest the port is, as for ``connect``.

        Raises:
            HostError: The host cannot listen there: the port is taken, or needs a privilege (`port_unavailable`).
            MicroVMError: Every other error of ``MicroVMInstance.publish``.

        Example:
            >>> with vm.publish(8000) as published:
            ...     published.address, published.guest_port, published.host_port > 0
            ('127.0.0.1', 8000, True)
        """
        return self.instance.publish(port, host_port, address, protocol, guest_address)

    def ports(self) -> List[PortInfo]:
        """Returns what is published of the VM, in the order of the host's addresses.

        Does not block, but for a VM of another process, whose owner is asked.

        Raises:
            ChannelError: The owner has ended or let go of the VM (`channel_closed`).
        """
        return self.instance.ports()

    def write_bytes(self, path: str, data: Union[bytes, bytearray, memoryview], *, mode: Optional[int] = None) -> None:
        """Replaces a file of the guest.

        Blocks until the whole file is written.

        Args:
            path: The path in the guest; its folder must be there.
            data: The content.
            mode: Permission bits of the file, 0 to 0o7777 (chmod(2)); 0644 for a new one where left out.

        Raises:
            MicroVMError: Every error of ``MicroVMInstance.upload``.
        """
        self.instance.upload(content_of(data), path, mode=mode)

    def write_text(self, path: str, text: str, *, mode: Optional[int] = None) -> None:
        """Replaces a file of the guest by a text, as UTF-8.

        Blocks until the whole file is written.

        Args:
            path: The path in the guest; its folder must be there.
            text: The content.
            mode: Permission bits of the file, 0 to 0o7777 (chmod(2)); 0644 for a new one where left out.

        Raises:
            MicroVMError: Every error of ``MicroVMInstance.upload``.
        """
        self.write_bytes(path, encoded(text), mode=mode)

    def read_bytes(self, path: str) -> bytes:
        """Returns the content of a file of the guest.

        Blocks until the whole file is read; holds it in memory, as far as the VM could hold it.

        Args:
            path: The path in the guest.

        Raises:
            MicroVMError: Every error of ``MicroVMInstance.download``.
        """
        content = io.BytesIO()
        self.instance.download(path, content)
        return content.getvalue()

    def read_text(self, path: str) -> str:
        """Returns the content of a file of the guest, which must be UTF-8.

        Blocks until the whole file is read; holds it in memory, as far as the VM could hold it.

        Args:
            path: The path in the guest.

        Raises:
            MicroVMError: Every error of ``MicroVMInstance.download``.
            UnicodeDecodeError: The file is not UTF-8; ``read_bytes`` takes any.

        Example:
            >>> vm.write_text("/tmp/note", "caf\u00e9")
            >>> vm.read_text("/tmp/note"), vm.read_bytes("/tmp/note")
            ('caf\u00e9', b'caf\\xc3\\xa9')
        """
        return self.read_bytes(path).decode()


class VM(Programs):
    """A running VM, as ``MicroVMIsolationManager.run_vm`` makes it; leaving its ``with`` block destroys it.

    Every failure is raised, whatever ``raise_on_error`` of the manager says. A method may be called from any
    thread, releases the GIL and sees Ctrl-C within 50 ms.

    Attributes:
        vm_id: The id of the VM.
        instance: The same VM with all that it can: pause, snapshot, upload, health and more.

    Args:
        manager: The manager that has the VM.
        instance: The VM, which runs.

    Example:
        >>> with manager.run_vm() as machine:
        ...     machine.write_text("/tmp/greeting", "hello")
        ...     machine.run(["cat", "/tmp/greeting"]).stdout
        'hello'
    """

    vm_id: str
    instance: _native.MicroVMInstance

    def __init__(self, manager: _native.MicroVMIsolationManager, instance: _native.MicroVMInstance) -> None:
        self._manager = manager
        self.instance = instance
        self.vm_id = instance.vm_id

    def __enter__(self) -> "VM":
        return self

    def __exit__(
        self,
        exc_type: Optional[Type[BaseException]],
        exc_value: Optional[BaseException],
        traceback: Optional[TracebackType],
    ) -> None:
        self.destroy()

    def __repr__(self) -> str:
        return "<VM{}".format(repr(self.instance)[len("<MicroVMInstance") :])

    def destroy(self) -> None:
        """Destroys the VM in any state, with its files and its suspended state, and gives its quota back.

        Blocks for about 100 ms. May be called twice.

        Raises:
            HostError: The host did not let go of something (`host_error`).
        """
        if self._manager.get_vm(self.vm_id) is not self.instance:
            return
        try:
            if not self._manager.destroy_vm(self.vm_id):
                raise reason(self._manager)
        except VmNotFoundError:
            # A policy or another thread destroyed it at this moment.
            pass


def reason(handle: Union[_native.MicroVMIsolationManager, _native.MicroVMInstance]) -> MicroVMError:
    """The error for which a method of a handle answered ``False`` or ``None``."""
    error = handle.last_error
    assert error is not None, "a method that fails keeps its error"
    return error


class _Captured:
    """Output that is kept."""

    def __init__(self) -> None:
        self._streams: Dict[str, List[bytes]] = {"stdout": [], "stderr": []}

    def take(self, channel: str, data: bytes) -> None:
        self._streams[channel].append(data)

    def end(self) -> Tuple[bytes, bytes]:
        return b"".join(self._streams["stdout"]), b"".join(self._streams["stderr"])


class _PassedOn(_Captured):
    """Output that goes to ``sys.stdout`` and ``sys.stderr``, which may take text alone, as in a notebook."""

    def __init__(self) -> None:
        super().__init__()
        self._decoder = TextDecoder()

    def take(self, channel: str, data: bytes) -> None:
        stream: IO[str] = getattr(sys, channel)
        buffer: Any = getattr(stream, "buffer", None)
        if buffer is None:
            stream.write(self._decoder.decode(channel, data))
        else:
            stream.flush()
            buffer.write(data)
        stream.flush()


class _HandedOn:
    """Output that a function has as it comes, beside where it goes."""

    def __init__(self, output: _Captured, on_output: Callable[[str, Any], Any], text: bool) -> None:
        self._output, self._on_output = output, on_output
        self._decoder = TextDecoder() if text else None

    def take(self, channel: str, data: bytes) -> None:
        self._output.take(channel, data)
        piece: Union[str, bytes] = data if self._decoder is None else self._decoder.decode(channel, data)
        if piece:
            self._on_output(channel, piece)

    def end(self) -> Tuple[bytes, bytes]:
        for channel, rest in () if self._decoder is None else self._decoder.end():
            self._on_output(channel, rest)
        return self._output.end()


class Run:
    """One call of ``run``: what it asks of the guest, and what it makes of the program's end."""

    def __init__(
        self,
        args: Args,
        shell: bool,
        check: bool,
        timeout: Optional[float],
        input: Optional[Input],
        text: bool,
        capture_output: bool,
        cwd: Optional[str],
        env: Optional[Mapping[str, str]],
        user: Optional[int],
        on_output: Optional[Callable[[str, Any], Any]],
    ) -> None:
        program, rest = command(args, shell)
        given = input.encode() if isinstance(input, str) else input
        self._args, self._check, self._timeout, self._text = args, check, timeout, text
        output = _Captured() if capture_output else _PassedOn()
        if on_output is not None and not callable(on_output):
            raise InvalidTypeError("on_output: it must be callable, not {}".format(type(on_output).__name__), "invalid_type")
        self._output: Union[_Captured, _HandedOn] = output if on_output is None else _HandedOn(output, on_output, text)
        self._begun = time.monotonic()
        self.arguments: Dict[str, Any] = {
            "program": program,
            "args": rest,
            "env": env,
            "cwd": cwd,
            "stdin": given or b"",
            "uid": user,
            "timeout": timeout,
            "on_output": self._output.take,
        }

    def left(self) -> Optional[float]:
        """Seconds until the timeout."""
        return None if self._timeout is None else max(0.0, self._begun + self._timeout - time.monotonic())

    def is_timeout(self, error: MicroVMError) -> bool:
        # `timeout` is the guest's own look at the time, `channel_timeout` this process's.
        return self._timeout is not None and error.code in ("timeout", "channel_timeout")

    def timed_out(self) -> ProgramTimeoutError:
        stdout, stderr = self._output.end()
        said = (_decode(stdout), _decode(stderr)) if self._text else (stdout, stderr)
        return ProgramTimeoutError(self._args, self._timeout or 0.0, *said)

    def end(self, returncode: Optional[int]) -> Union[CompletedProgram[str], CompletedProgram[bytes]]:
        assert returncode is not None, "wait() without an error returns the program's exit code"
        stdout, stderr = self._output.end()
        done: Union[CompletedProgram[str], CompletedProgram[bytes]]
        if self._text:
            done = CompletedProgram(self._args, returncode, _decode(stdout), _decode(stderr))
        else:
            done = CompletedProgram(self._args, returncode, stdout, stderr)
        if self._check:
            done.check_returncode()
        return done


def content_of(data: Union[bytes, bytearray, memoryview]) -> io.BytesIO:
    """What ``write_bytes`` uploads."""
    if not isinstance(data, (bytes, bytearray, memoryview)):
        raise InvalidTypeError("data: it must be bytes, not {}".format(type(data).__name__), "invalid_type")
    return io.BytesIO(data)


def encoded(text: str) -> bytes:
    """What ``write_text`` writes."""
    if not isinstance(text, str):
        raise InvalidTypeError("text: it must be a str, not {}".format(type(text).__name__), "invalid_type")
    return text.encode()


def _decode(data: bytes) -> str:
    return data.decode("utf-8", "replace")


def command(args: Args, shell: bool) -> Tuple[str, List[str]]:
    """The program and its arguments."""
    if shell:
        if not isinstance(args, str):
            raise InvalidTypeError("args: with shell=True it is one line, a str, not {}".format(type(args).__name__), "invalid_type")
        return "/bin/sh", ["-c", args]
    if isinstance(args, str) and len(args.split()) > 1:
        hint = "args: {!r} names one program; give the program and its arguments as a list, such as {}, or a line with shell=True"
        raise InvalidValueError(hint.format(args, _words(args)), "invalid_value")
    try:
        program, *rest = [os.fspath(word) for word in ([args] if isinstance(args, (str, os.PathLike)) else args)]
    except TypeError:
        raise InvalidTypeError("args: {!r} is no list of str".format(args), "invalid_type") from None
    except ValueError:
        raise InvalidValueError("args: the list is empty; it begins with the program", "invalid_value") from None
    return program, rest


def _words(line: str) -> List[str]:
    try:
        return shlex.split(line)
    except ValueError:
        return line.split()
