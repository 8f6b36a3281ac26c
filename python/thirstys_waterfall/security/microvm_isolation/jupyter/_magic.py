"""``%%microvm`` and ``%microvm``."""

import argparse
import shlex
import sys
from typing import Any, Callable, Dict, List, NoReturn, Optional, TypeVar

from .. import MicroVMError, MicroVMIsolationManager, ProgramFailedError, ProgramTimeoutError, VMState, running_vms
from .._cli import owner, run, session
from .._vm import VM
from ._display import Progress, VMTable

NAME = "microvm"
# Where the text of a cell lies in the guest; the messages of a shell name it.
CELL = "/tmp/cell"
USABLE = (VMState.RUNNING, VMState.PAUSED)
LINE_USAGE = "%microvm [ps | reset | snapshot NAME]"
LINE_DOC = """{}

Shows the VM in which the cells run; its value is that VM, a ``VM``, or ``None`` before the first cell.

  ps             shows all VMs of this user
  reset          destroys the VM; the next cell has a new one
  snapshot NAME  keeps its state under a name, for %%microvm --template NAME
""".format(LINE_USAGE)
LINE_WORDS = ["ps", "reset", "snapshot"]
T = TypeVar("T")


class Parser(argparse.ArgumentParser):
    """A parser whose bad usage is one line in the notebook."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(add_help=False, allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        from IPython.core.error import UsageError

        raise UsageError("{}; {}? has the options".format(message, self.prog))


def make_parser() -> Parser:
    parser = Parser(
        prog="%%" + NAME,
        usage="%%%%microvm [OPTION]... [PROGRAM [ARGUMENT]...]",
        description="Runs the cell in a VM that the notebook keeps: as a script of PROGRAM, which is sh where left out.",
    )
    session.configure_program(parser.add_argument_group("of the program"))
    of_vm = parser.add_argument_group("of the VM, when the first cell makes it")
    run.configure_vm(of_vm)
    run.configure_one(of_vm)
    parser.add_argument("program", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    return parser


class Notebook:
    """The VM of one shell's cells, and the magics that use it."""

    def __init__(self, shell: Any) -> None:
        self._shell = shell
        self._manager: Optional[MicroVMIsolationManager] = None
        self._vm: Optional[VM] = None
        # What it was made with.
        self._made: Dict[str, Any] = {}
        self._parser = make_parser()
        # What the VM has when no option says otherwise.
        self._defaults = self._of_vm(self._parser.parse_args([]))

    def load(self) -> None:
        def microvm_cell(line: str, cell: str) -> None:
            return self._shown(lambda: self._run_cell(line, cell))

        def microvm_line(line: str) -> Any:
            return self._shown(lambda: self._do_line(line))

        microvm_cell.__doc__, microvm_line.__doc__ = self._parser.format_help(), LINE_DOC
        self._shell.register_magic_function(microvm_cell, "cell", NAME)
        self._shell.register_magic_function(microvm_line, "line", NAME)
        options = [option for action in self._parser._actions for option in action.option_strings]
        self._shell.set_hook("complete_command", lambda _, event: LINE_WORDS, str_key="%" + NAME)
        self._shell.set_hook("complete_command", lambda _, event: options, str_key="%%" + NAME)

    def unload(self) -> None:
        for kind in ("cell", "line"):
            self._shell.magics_manager.magics[kind].pop(NAME, None)
        if self._manager is not None:
            self._manager.stop()
        self._manager, self._vm = None, None

    def _run_cell(self, line: str, cell: str) -> None:
        options = self._parser.parse_args(_words(line))
        command = options.program[1:] if options.program[:1] == ["--"] else options.program
        command = [*(command or ["sh"]), CELL]
        env = {name: value for name, value in options.env if value is not None}
        vm = self._vm_for(options)
        vm.write_text(CELL, cell)
        # Leaving the block, by Ctrl-C, too, ends the program with all its descendants.
        with vm.popen(command, env=env, cwd=options.workdir, user=options.user, timeout=options.timeout) as program:
            program.close_stdin()
            try:
                for channel, text in program.text():
                    stream = sys.stdout if channel == "stdout" else sys.stderr
                    stream.write(text)
                    stream.flush()
            except MicroVMError as error:
                if options.timeout is None or error.code != "timeout":
                    raise
                raise ProgramTimeoutError(command, options.timeout, "", "") from None
            code = program.exit_code
        if code:
            raise ProgramFailedError(command, code, "", "")

    def _do_line(self, line: str) -> Any:
        command, *rest = _words(line) or [""]
        if (command, len(rest)) == ("ps", 0):
            return VMTable(running_vms())
        if (command, len(rest)) == ("", 0):
            return self._vm if self._is_usable() else None
        if (command, len(rest)) == ("reset", 0):
            if self._vm is not None:
                self._vm.destroy()
            self._vm = None
            return None
        if (command, len(rest)) == ("snapshot", 1):
            if self._vm is None or not self._is_usable():
                self._parser.error("there is no VM yet: a cell with %%microvm makes it")
            self._vm.instance.snapshot(rest[0])
            return None
        self._parser.error("{!r} is not {}".format(line, LINE_USAGE))

    def _is_usable(self) -> bool:
        return self._vm is not None and self._vm.instance.get_state() in USABLE

    def _vm_for(self, options: argparse.Namespace) -> VM:
        asked = self._of_vm(options)
        if self._vm is not None and self._is_usable():
            differing = [name for name, value in asked.items() if value not in (self._defaults[name], self._made[name])]
            if differing:
                self._parser.error("the VM has another {}: %microvm reset has the next cell make a new one".format(", ".join(differing)))
            return self._vm
        if self._manager is None:
            manager = MicroVMIsolationManager(owner.CONFIG)
            manager.start()
            self._manager = manager
        if self._vm is not None:
            self._vm.destroy()
            self._vm = None
        # What is made here is for VMs without a network; others make theirs when they start.
        if options.template is None and options.backend in (None, "qemu") and not (options.net or options.egress):
            with Progress() as progress:
                self._manager.prepare(run.limits(options), progress=progress)
        self._vm = run.start(options, self._manager)
        self._made = asked
        return self._vm

    @staticmethod
    def _of_vm(options: argparse.Namespace) -> Dict[str, Any]:
        """What the options say of the VM."""
        return {name: value for name, value in vars(options).items() if name not in ("env", "workdir", "user", "timeout", "program")}

    def _shown(self, work: Callable[[], T]) -> T:
        """Does it; an error of this package is shown by its words, without the lines of these files."""
        try:
            return work()
        except MicroVMError as error:
            lines = _lines(error)
            # IPython asks an exception for it (InteractiveShell.showtraceback).
            vars(error)["_render_traceback_"] = lambda: lines
            raise


def _lines(error: MicroVMError) -> List[str]:
    """An error, the stage of a start in which it came, and the remedy."""
    text = str(error)
    lines = ["{}: {}".format(type(error).__name__, text)]
    for name in ("stage", "remedy"):
        value = error.details.get(name)
        if isinstance(value, str) and value not in text:
            lines.append("{}: {}".format(name, value))
    return lines


def _words(line: str) -> List[str]:
    from IPython.core.error import UsageError

    try:
        return shlex.split(line)
    except ValueError as error:
        raise UsageError("{!r}: {}".format(line, error)) from None
