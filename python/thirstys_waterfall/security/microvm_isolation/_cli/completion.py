"""``completion``: a script that has a shell complete ``microvm``, made from the parser itself."""

import argparse
from typing import Dict, List, Tuple

BASH = """_microvm() {{
    local words="{commands}"
    if [ "$COMP_CWORD" -gt 1 ]; then
        case ${{COMP_WORDS[1]}} in
{cases}
            *) words="" ;;
        esac
    fi
    COMPREPLY=($(compgen -W "$words" -- "${{COMP_WORDS[COMP_CWORD]}}"))
}}
complete -o default -F _microvm microvm"""
BASH_CASE = '            {command}) words="{words}" ;;'

ZSH = """#compdef microvm
_microvm() {{
    if (( CURRENT == 2 )); then
        compadd -- {commands}
        return
    fi
    case $words[2] in
{cases}
    esac
    _files
}}
compdef _microvm microvm"""
ZSH_CASE = "        {command}) compadd -- {words} ;;"

VMS = "$(microvm ps -q 2>/dev/null)"
FISH_VMS = "complete -c microvm -f -n '__fish_seen_subcommand_from {command}' -a '(microvm ps -q 2>/dev/null)'"
FISH_COMMAND = "complete -c microvm -f -n __fish_use_subcommand -a {command} -d '{help}'"
FISH_OPTION = "complete -c microvm -n '__fish_seen_subcommand_from {command}' {flags} -d '{help}'"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=["bash", "zsh", "fish"], help="source <(microvm completion bash), for example")


def run(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    print({"bash": _bash, "zsh": _zsh, "fish": _fish}[options.shell](*commands_of(parser)))
    return 0


Commands = Dict[str, argparse.ArgumentParser]


def commands_of(parser: argparse.ArgumentParser) -> Tuple[Commands, Dict[str, str]]:
    """The parser and the help of each command; argparse has no public way to ask for them."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices), {choice.dest: choice.help or "" for choice in action._choices_actions}
    raise AssertionError("the parser has commands")


def _words(parser: argparse.ArgumentParser) -> List[str]:
    """The options of a command, and the values of its arguments; VMs are asked for when they are completed."""
    options = [option for action in parser._actions for option in action.option_strings]
    vms = [VMS] if any(action.dest == "vm" for action in parser._actions) else []
    return options + [str(value) for action in parser._actions if not action.option_strings for value in action.choices or []] + vms


def _bash(commands: Commands, helps: Dict[str, str]) -> str:
    cases = [BASH_CASE.format(command=command, words=" ".join(_words(parser))) for command, parser in commands.items()]
    return BASH.format(commands=" ".join(commands), cases="\n".join(cases))


def _zsh(commands: Commands, helps: Dict[str, str]) -> str:
    cases = [ZSH_CASE.format(command=command, words=" ".join(_words(parser))) for command, parser in commands.items()]
    return ZSH.format(commands=" ".join(commands), cases="\n".join(cases))


def _fish(commands: Commands, helps: Dict[str, str]) -> str:
    lines = [FISH_COMMAND.format(command=command, help=_quoted(helps[command])) for command in commands]
    for command, parser in commands.items():
        for action in parser._actions:
            if action.option_strings:
                flags = ["-l " + one[2:] if one.startswith("--") else "-s " + one[1:] for one in action.option_strings]
                flags += ["-r"] if action.nargs != 0 else []
                lines.append(FISH_OPTION.format(command=command, flags=" ".join(flags), help=_quoted(action.help or "")))
            elif action.dest == "vm":
                lines.append(FISH_VMS.format(command=command))
            elif action.choices:
                flags = ["-f", "-a", "'{}'".format(" ".join(map(str, action.choices)))]
                lines.append(FISH_OPTION.format(command=command, flags=" ".join(flags), help=_quoted(action.help or "")))
    return "\n".join(lines)


def _quoted(text: str) -> str:
    return text.replace("\\", "\\\\").replace("'", "\\'")
