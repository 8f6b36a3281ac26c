"""A program at this terminal: what ``run``, ``exec`` and ``shell`` have in common, with the habits of ``docker run``."""

import argparse
import contextlib
import os
import select
import signal
import threading
import time
from types import FrameType
from typing import Callable, Dict, Iterator, List, NoReturn, Optional, Tuple

from .. import CommandError, MicroVMError, ProcessStream
from .._vm import Programs
from . import terminal
from .fail import complain

# As docker run and env(1) have them; 124 is timeout(1)'s.
TIMED_OUT, FAILED, NOT_EXECUTABLE, NOT_FOUND = 124, 125, 126, 127
CODES = {"program_not_found": NOT_FOUND, "permission_denied": NOT_EXECUTABLE}
# Added to the number of a signal that ended the program, as shells do.
SIGNALLED = 128
PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
# A second Ctrl-C within this time ends the program, which did not care about the first.
TWICE_S = 1.0
MAX_TIMEOUT_S = 86_400
READ_BYTES = 64 * 1024
# How long the thread of the input may take to see that the program has ended.
JOIN_S = 2.0

def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-i", "--interactive", action="store_true", help="pass stdin on to the program")
    parser.add_argument("-t", "--tty", action="store_true", help="give the program a terminal")
    configure_program(parser)
    parser.set_defaults(usage=parser.error)


def configure_program(parser: "argparse._ActionsContainer") -> None:
    """What a program has wherever its output goes."""
    add = parser.add_argument
    add("-e", "--env", action="append", default=[], metavar="K=V", type=_variable, help="set a variable; K alone takes this shell's")
    add("-w", "--workdir", metavar="DIR", help="the program's working directory (default: /)")
    add("-u", "--user", type=_user, metavar="UID", help="the uid that it runs as (default: 0)")
    add("--timeout", type=seconds, metavar="S", help="end the program after this many seconds, with exit code 124")


def command_of(options: argparse.Namespace, example: str) -> List[str]:
    """The program and its arguments, which may follow a ``--``."""
    command: List[str] = options.program[1:] if options.program[:1] == ["--"] else options.program
    if not command:
        options.usage("name a program, such as: " + example)
    return command


def carry_out(options: argparse.Namespace, command: List[str], look: str, use: Callable[["Session"], int]) -> int:
    """Has ``use`` run the program in a VM; returns the exit code with which the process is to exit.

    ``look`` is a command line that lists the programs of the guest.
    """
    _open_closed_descriptors()
    session = Session(options, command)
    try:
        with session.signals():
            return use(session)
    except _Ended as end:
        if end.why:
            complain(end.why)
        return end.code
    except CommandError as error:
        if error.code == "program_not_found":
            words = len(command) == 1 and len(command[0].split()) > 1
            remedy = "write its arguments as words of their own, or sh -c LINE" if words else look + " lists what is there"
            complain("{}: there is no such program in the guest; {}".format(command[0], remedy))
        elif error.code == "permission_denied":
            complain("{}: it cannot be executed in the guest; check its mode and -u".format(command[0]))
        else:
            complain(error)
        return CODES.get(error.code, FAILED)
    except MicroVMError as error:
        complain(error)
        return FAILED


class _Ended(Exception):
    """The command ends now, whatever the program does."""

    def __init__(self, code: int, why: str = "") -> None:
        super().__init__(code, why)
        self.code, self.why = code, why


class Session:
    """One program in one VM, a new one or one that runs: its input, its output, and the signals that are passed on to it."""

    def __init__(self, options: argparse.Namespace, command: List[str]) -> None:
        self._options = options
        self._command = command
        self._program: Optional[ProcessStream] = None
        self._raw: Optional[terminal.Raw] = None
        self._is_over = False
        self._interrupted_at = -TWICE_S

    def run(self, vm: Programs) -> int:
        """Runs the program to its end; returns its exit code."""
        options = self._options
        rows, columns = (options.tty and terminal.size()) or (None, None)
        env = {name: value for name, value in options.env if value is not None}
        with contextlib.ExitStack() as stack:
            program = stack.enter_context(
                vm.popen(self._command, env=env, cwd=options.workdir, user=options.user, pty=options.tty, rows=rows, columns=columns)
            )
            self._program = program
            if options.timeout is not None:
                signal.setitimer(signal.ITIMER_REAL, options.timeout)
                stack.callback(signal.setitimer, signal.ITIMER_REAL, 0)
            if options.interactive:
                if options.tty and os.isatty(0):
                    self._raw = terminal.Raw()
                    stack.callback(self._raw.leave)
                    self._raw.enter()
                stack.enter_context(_input_to(program))
            elif not options.tty:
                program.close_stdin()
            with self._ending():
                for channel, data in program:
                    _write(1 if channel == "stdout" else 2, data)
            code = program.exit_code
            assert code is not None, "the output was taken to its end"
            return code if code >= 0 else SIGNALLED - code

    @contextlib.contextmanager
    def _ending(self) -> Iterator[None]:
        """What follows the block restores the terminal and destroys the VM, which no signal interrupts."""
        try:
            yield
        finally:
            self._is_over = True

    @contextlib.contextmanager
    def signals(self) -> Iterator[None]:
        """While the block runs, signals are the program's; one that is ignored, as under nohup(1), stays so.

        Afterwards they are ignored: the process exits, and a late Ctrl-C would interrupt that and show in its exit code.
        """
        handlers: Dict[signal.Signals, Callable[[int, Optional[FrameType]], None]] = {number: self._pass_on for number in PASSED_ON}
        handlers.update({signal.SIGALRM: self._time_over, signal.SIGWINCH: self._resize, signal.SIGTSTP: self._stop})
        for number, handler in handlers.items():
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, handler)
        try:
            yield
        finally:
            for number in handlers:
                signal.signal(number, signal.SIG_IGN)

    def _end(self, code: int, why: str = "") -> NoReturn:
        self._is_over = True
        raise _Ended(code, why)

    def _pass_on(self, number: int, _: Optional[FrameType]) -> None:
        if self._is_over:
            return
        if self._program is None:
            self._end(SIGNALLED + number)
        if number == signal.SIGINT:
            now = time.monotonic()
            if now - self._interrupted_at < TWICE_S:
                self._end(SIGNALLED + number)
            self._interrupted_at = now
        # The loop of the output sees what is wrong with the channel.
        with contextlib.suppress(MicroVMError):
            self._program.signal(number)

    def _time_over(self, _: int, __: Optional[FrameType]) -> None:
        if not self._is_over:
            self._end(TIMED_OUT, "{} did not end within {:g} s (--timeout)".format(self._command[0], self._options.timeout))

    def _resize(self, _: int, __: Optional[FrameType]) -> None:
        size = terminal.size()
        if self._program is not None and self._options.tty and size:
            with contextlib.suppress(MicroVMError):
                self._program.resize(*size)

    def _stop(self, _: int, __: Optional[FrameType]) -> None:
        """Stops this process as the default does, with the terminal as it was before."""
        if self._raw is not None:
            self._raw.leave()
        os.kill(os.getpid(), signal.SIGSTOP)
        if self._raw is not None and not self._is_over:
            self._raw.enter()
        self._resize(signal.SIGWINCH, None)


@contextlib.contextmanager
def _input_to(program: ProcessStream) -> Iterator[None]:
    """While the block runs, a thread passes stdin on: the program may wait with reading until its output is taken."""
    ours, its = os.pipe()
    thread = threading.Thread(target=_pass_input, args=(program, ours), name="microvm-stdin", daemon=True)
    thread.start()
    try:
        yield
    finally:
        # It may be writing to a program that reads no more.
        program.kill()
        os.close(its)
        thread.join(JOIN_S)
        os.close(ours)


def _pass_input(program: ProcessStream, end: int) -> None:
    poll = select.poll()
    poll.register(0, select.POLLIN)
    poll.register(end, select.POLLIN)
    with contextlib.suppress(MicroVMError, RuntimeError):
        while True:
            if end in dict(poll.poll()):
                return
            try:
                data = os.read(0, READ_BYTES)
            except BlockingIOError:
                continue
            except OSError:
                # A terminal that has hung up (EIO), or a folder: there is no more input.
                data = b""
            if not data:
                program.close_stdin()
                return
            if not program.write(data):
                return


def _write(descriptor: int, data: bytes) -> None:
    """Writes all of it, also to a descriptor that does not block because another process set it so."""
    rest = memoryview(data)
    while rest:
        try:
            rest = rest[os.write(descriptor, rest) :]
        except BlockingIOError:
            select.select([], [descriptor], [])
        except BrokenPipeError:
            raise _Ended(SIGNALLED + signal.SIGPIPE) from None
        except OSError as error:
            raise _Ended(FAILED, "{}: {}".format(("stdin", "stdout", "stderr")[descriptor], error.strerror)) from None


def _open_closed_descriptors() -> None:
    """Opens /dev/null where stdin, stdout or stderr is closed: the next file that is opened would take its place."""
    for descriptor, mode in ((0, os.O_RDONLY), (1, os.O_WRONLY), (2, os.O_WRONLY)):
        try:
            os.fstat(descriptor)
        except OSError:
            opened = os.open(os.devnull, mode)
            if opened != descriptor:
                os.dup2(opened, descriptor)
                os.close(opened)


def seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= MAX_TIMEOUT_S:
        raise argparse.ArgumentTypeError("{!r} is not above 0 and at most {} seconds".format(text, MAX_TIMEOUT_S))
    return value


def _user(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError("{!r} is no uid; a number is needed, as guests differ in their names".format(text))
    return int(text)


def pair(text: str) -> Tuple[str, str]:
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise argparse.ArgumentTypeError("{!r} is not K=V".format(text))
    return name, value


def _variable(text: str) -> Tuple[str, Optional[str]]:
    return pair(text) if "=" in text else (text, os.environ.get(text))
