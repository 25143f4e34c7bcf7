"""`manta completion`: completion scripts for bash, zsh and fish, generated from the parser, so that they cannot fall behind it."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from manta.cli.invocation import Invocation

_DIRECTORIES, _FILES = "directories", "files"
_PLACES = {"DIR": _DIRECTORIES, "FILE": _FILES}
"""What an argument of this name is completed with. Others (repos, revisions, sizes) only the person knows."""


@dataclass(frozen=True, slots=True)
class _Value:
    """What may follow an option, or stand as an argument."""

    words: tuple[str, ...] = ()
    place: str = ""


@dataclass(frozen=True, slots=True)
class _Option:
    names: tuple[str, ...]
    help: str
    value: _Value | None
    """None: a switch."""


@dataclass(frozen=True, slots=True)
class _Command:
    path: str
    """manta mount"""
    help: str
    options: tuple[_Option, ...]
    arguments: _Value
    commands: tuple[_Command, ...] = field(default=())

    def walk(self) -> Iterator[_Command]:
        yield self
        for command in self.commands:
            yield from command.walk()

    @property
    def name(self) -> str:
        return self.path.rpartition(" ")[2]


def completion(invocation: Invocation) -> int:
    from manta.cli.main import build_parser

    print(script(build_parser(), invocation.arguments.shell), end="")
    return 0


def script(parser: argparse.ArgumentParser, shell: str) -> str:
    """The completion script of one shell."""
    return {"bash": _bash, "zsh": _zsh, "fish": _fish}[shell](_read(parser, ""))


def _read(parser: argparse.ArgumentParser, summary: str) -> _Command:
    options: list[_Option] = []
    commands: list[_Command] = []
    arguments = _Value()
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            helps = {choice.dest: choice.help or "" for choice in action._choices_actions}
            commands += [_read(sub, helps.get(name, "")) for name, sub in action.choices.items()]
        elif action.help == argparse.SUPPRESS:
            continue
        elif action.option_strings:
            takes_none = action.nargs == 0 or isinstance(action, argparse.BooleanOptionalAction)
            options.append(
                _Option(tuple(action.option_strings), _plain(action.help or ""), None if takes_none else _value(action))
            )
        else:
            value = _value(action)
            arguments = _Value(arguments.words + value.words, arguments.place or value.place)
    return _Command(parser.prog, summary, tuple(options), arguments, tuple(commands))


def _value(action: argparse.Action) -> _Value:
    if action.choices is not None:
        return _Value(words=tuple(map(str, action.choices)))
    return _Value(place=_PLACES.get(str(action.metavar), ""))


def _plain(text: str) -> str:
    """A help text for one line of a menu: up to the first semicolon or parenthesis, without what shells would read."""
    return re.sub(r"[^\w ,.:/=@'-]", "", re.split(r" \(|; ", text.replace("%(default)s", ""))[0]).strip()


# bash ----------------------------------------------------------------------------------------------------------------


def _bash(root: _Command) -> str:
    commands = list(root.walk())
    lines = [
        "# bash completion for manta, printed by `manta completion bash`",
        "_manta() {",
        "  local cur=${COMP_WORDS[COMP_CWORD]} prev=${COMP_WORDS[COMP_CWORD-1]} at=manta i",
        "  COMPREPLY=()",
        *_position("COMP_WORDS[i]", "((i = 1; i < COMP_CWORD; i++))", root),
        '  case "$at $prev" in',
        *(
            f"    {'|'.join(_quoted(f'{command.path} {name}') for name in option.names)})"
            f" {_bash_value(option.value)} return ;;"
            for command in commands
            for option in command.options
            if option.value is not None
        ),
        "  esac",
        "  if [[ $cur == -* ]]; then",
        '    case "$at" in',
        *(
            f'      {_quoted(command.path)}) mapfile -t COMPREPLY < <(compgen -W "{_names(command)}" -- "$cur") ;;'
            for command in commands
        ),
        "    esac",
        "    return",
        "  fi",
        '  case "$at" in',
        *(f"    {_quoted(command.path)}) {_bash_value(_follows(command))} ;;" for command in commands),
        "  esac",
        "}",
        "complete -F _manta manta",
    ]
    return "\n".join(lines) + "\n"


def _bash_value(value: _Value) -> str:
    if value.words:
        return f'mapfile -t COMPREPLY < <(compgen -W "{" ".join(value.words)}" -- "$cur");'
    if value.place:
        flag = "-d" if value.place == _DIRECTORIES else "-f"
        # Names with spaces are quoted by readline, which it does for file names only; it says no outside of a completion.
        return f'compopt -o filenames 2>/dev/null; mapfile -t COMPREPLY < <(compgen {flag} -- "$cur");'
    return ":;"


def _position(word: str, loop: str, root: _Command) -> list[str]:
    """Shell lines that leave in `at` the command that the words before the cursor have reached."""
    below = [_quoted(command.path) for command in root.walk() if command is not root]
    return [
        f"  for {loop}; do",
        f'    case "$at ${{{word}}}" in',
        f'      {"|".join(below)}) at+=" ${{{word}}}" ;;',
        "    esac",
        "  done",
    ]


# zsh -----------------------------------------------------------------------------------------------------------------


def _zsh(root: _Command) -> str:
    commands = list(root.walk())
    lines = [
        "#compdef manta",
        "# zsh completion for manta, printed by `manta completion zsh`",
        "_manta() {",
        "  local at=manta i",
        "  local -a found",
        *_position("words[i]", "((i = 2; i < CURRENT; i++))", root),
        '  case "$at ${words[CURRENT-1]}" in',
        *(
            f"    {'|'.join(_quoted(f'{command.path} {name}') for name in option.names)})"
            f" {_zsh_value(option.value)} return ;;"
            for command in commands
            for option in command.options
            if option.value is not None
        ),
        "  esac",
        "  if [[ ${words[CURRENT]} == -* ]]; then",
        '    case "$at" in',
        *(
            f"      {_quoted(command.path)}) found=({_described([(n, o.help) for o in command.options for n in o.names])}) ;;"
            for command in commands
        ),
        "    esac",
        "    _describe -o option found",
        "    return",
        "  fi",
        '  case "$at" in',
        *(
            f"    {_quoted(command.path)}) found=({_described([(c.name, c.help) for c in command.commands])});"
            " _describe command found ;;"
            if command.commands
            else f"    {_quoted(command.path)}) {_zsh_value(command.arguments)} ;;"
            for command in commands
        ),
        "  esac",
        "}",
        # Loaded by fpath the file is the function's body; sourced, it has to say what it completes.
        'if [[ ${funcstack[1]} == _manta ]]; then _manta "$@"; else compdef _manta manta; fi',
    ]
    return "\n".join(lines) + "\n"


def _zsh_value(value: _Value) -> str:
    if value.words:
        return f"compadd -- {' '.join(value.words)};"
    if value.place:
        return "_files -/;" if value.place == _DIRECTORIES else "_files;"
    return ":;"


def _described(entries: list[tuple[str, str]]) -> str:
    return " ".join(_quoted(f"{name}:{text.replace(':', ' ')}") for name, text in entries)


# fish ----------------------------------------------------------------------------------------------------------------


def _fish(root: _Command) -> str:
    below = " ".join(_quoted(command.path) for command in root.walk() if command is not root)
    lines = [
        "# fish completion for manta, printed by `manta completion fish`",
        "function __manta_at",
        "    set -l at manta",
        "    for word in (commandline -opc)[2..]",
        f'        contains -- "$at $word" {below}; and set at "$at $word"',
        "    end",
        '    test "$at" = "$argv[1]"',
        "end",
        "complete -c manta -f",
    ]
    for command in root.walk():
        here = f"complete -c manta -n '__manta_at \"{command.path}\"'"
        lines += [f"{here} -a {sub.name} -d {_quoted(sub.help)}" for sub in command.commands]
        if not command.commands:
            lines += [f"{here}{_fish_value(command.arguments)}"] if command.arguments != _Value() else []
        for option in command.options:
            names = "".join(f" -l {n[2:]}" if n.startswith("--") else f" -s {n[1:]}" for n in option.names)
            value = ""
            if option.value is not None:
                # Exclusive: no files beside the given words.
                value = f"{' -r' if option.value.place == _FILES else ' -x'}{_fish_value(option.value)}"
            lines.append(f"{here}{names}{value} -d {_quoted(option.help)}")
    return "\n".join(lines) + "\n"


def _fish_value(value: _Value) -> str:
    if value.words:
        return f" -a '{' '.join(value.words)}'"
    if value.place:
        return " -a '(__fish_complete_directories)'" if value.place == _DIRECTORIES else " -F"
    return ""


def _follows(command: _Command) -> _Value:
    return _Value(words=tuple(sub.name for sub in command.commands)) if command.commands else command.arguments


def _names(command: _Command) -> str:
    return " ".join(name for option in command.options for name in option.names)


def _quoted(text: str) -> str:
    """In single quotes, in the one spelling of a quote inside them that all three shells read."""
    return "'" + text.replace("'", "'\\''") + "'"
