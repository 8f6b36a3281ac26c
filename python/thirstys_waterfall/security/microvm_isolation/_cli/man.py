"""The man page ``microvm.1``, made from the parser itself; ``make man`` writes it (tools/man.py)."""

import argparse
import re
from typing import List

from .completion import commands_of

SECTIONS = """.SH EXIT STATUS
.B run
and
.B exec
end with the exit code of the program; with 128 + n when signal n ended it, 124 after
.BR \\-\\-timeout ,
125 when no VM could run it or an option is wrong, 126 when it cannot be executed and 127 when it is not there.
.PP
Other commands end with 0; with 1 when something failed, which stderr says in one sentence with the remedy; with 2 when an option is
wrong; and with 130 after Ctrl\\-C.
.SH ENVIRONMENT
.TP
.B NO_COLOR
.B top
uses no colour.
.TP
.BR XDG_RUNTIME_DIR ", " XDG_CACHE_HOME
Where an ordinary user's VMs and their cache are.
.SH SEE ALSO
.BR qemu\\-system\\-x86_64 (1)
"""


def page(parser: argparse.ArgumentParser) -> str:
    """It in the language of man(7)."""
    commands, helps = commands_of(parser)
    lines = ['.TH MICROVM 1', ".SH NAME", "microvm \\- run programs in virtual machines of their own", ".SH SYNOPSIS"]
    lines += [".B microvm", "COMMAND [OPTION]... [ARGUMENT]...", ".SH DESCRIPTION", _text(parser.description or "") + ".", ".SH COMMANDS"]
    for name, command in commands.items():
        lines += [".SS " + _text(" ".join([name, *map(_argument, _arguments(command))])), _sentence(helps[name])]
        if command.description:
            lines += [".PP", _text(command.description)]
        for action in command._actions:
            if action.dest != "help" and action.help != argparse.SUPPRESS:
                lines += [".TP", _heading(action), _text(_plain(action.help or ""))]
    return "\n".join(lines) + "\n" + SECTIONS


def _arguments(command: argparse.ArgumentParser) -> List[argparse.Action]:
    return [action for action in command._actions if not action.option_strings]


def _argument(action: argparse.Action) -> str:
    name = str(action.metavar or action.dest)
    if action.nargs == argparse.REMAINDER:
        return "[--] {} [ARGUMENT]...".format(name)
    return {"+": name + "...", "*": "[{}]...".format(name), "?": "[{}]".format(name)}.get(str(action.nargs), name)


def _heading(action: argparse.Action) -> str:
    if not action.option_strings:
        return ".I " + _text(str(action.metavar or action.dest))
    value = "" if action.nargs == 0 else " " + str(action.metavar or "|".join(map(str, action.choices or [action.dest.upper()])))
    return ".B " + _text(", ".join(action.option_strings) + value)


def _plain(help: str) -> str:
    return help.replace("%%", "%")


def _sentence(help: str) -> str:
    return _text(help[:1].upper() + _plain(help)[1:]) + "."


def _text(text: str) -> str:
    """It with nothing that roff(7) would take for a request or an escape."""
    return re.sub(r"^([.'])", r"\\&\1", text.replace("\\", "\\e").replace("-", "\\-"), flags=re.MULTILINE)
