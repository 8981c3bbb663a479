"""Writes `reference.md` from the two command lines themselves: every command, every option.

python docs/make_reference.py [FILE]     `make docs`; the default is reference.md beside this script
"""

import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from maskdm.commands import command_line as cli
from maskdm_client.commands.app import app as client_app
from maskdm_server.commands.app import app as server_app

PAGE = Path(__file__).with_name("reference.md")
PROGRAMS = {"maskdm-server": server_app, "maskdm-client": client_app}
EVERYWHERE = ("config", "debug", "help", "version")  # told once, in the introduction
KINDS = {"integer": "whole number", "float": "number", "text": "text", "path": "path"}

INTRODUCTION = """\
# Reference

Every command and every option, written by `make docs` from the command lines themselves: change the code, not this
page.

An option's value is its default, then that of a `--recipe`, then the key in the TOML file of `--config`, then its
environment variable, then the flag; each beats the one before. A key of the file is the option's name without the
dashes in front, e.g. `batch-size = 64`; an unknown key is an error. A switch has a negation, `--no-NAME`; in the
environment it is `1` or `0`. What may be repeated is a list in the file; in the environment texts are parted by spaces,
paths by colons.

Beside its own options every command takes `--help` and `--debug` (tracebacks of errors), and each that does work
`--config FILE` (environment: `MASKDM_CONFIG`). Both programs take `--version`. Exit codes and what commands leave:
[commands.md](commands.md).
"""


def reference() -> str:
    """The whole page."""
    parts = [INTRODUCTION]
    for program, app in PROGRAMS.items():
        parts += described(cli.prepared(app, program), program)
    return "\n".join(parts)


def described(command: click.Command, path: str) -> Iterator[str]:
    """A command and those below it, each a heading, its help and a table."""
    yield f"## {path}\n"
    if command.help:
        yield f"{inspect.cleandoc(command.help)}\n"
    below = command.commands if isinstance(command, click.Group) else {}
    if below:
        links = (f"[`{name}`](#{f'{path} {name}'.replace(' ', '-')})" for name in below)
        yield f"Commands: {', '.join(links)}.\n"
    parameters = [parameter for parameter in command.params if parameter.name not in EVERYWHERE]
    if parameters:
        yield "| option | environment | values | default | |\n|---|---|---|---|---|"
        yield "\n".join(map(_row, parameters)) + "\n"
    for name, child in below.items():
        yield from described(child, f"{path} {name}")


def _row(parameter: click.Parameter) -> str:
    is_option = isinstance(parameter, click.Option)
    names = (
        ", ".join(f"`{name}`" for name in parameter.opts)
        if is_option
        else f"`{parameter.metavar or str(parameter.name).upper()}`"
    )
    environment = f"`{parameter.envvar}`" if is_option else ""
    cells = (names, environment, _values(parameter), _default(parameter), getattr(parameter, "help", None) or "")
    return f"| {' | '.join(' '.join(cell.split()).replace('|', chr(92) + '|') for cell in cells)} |"


def _values(parameter: click.Parameter) -> str:
    """What a parameter takes: a kind with its range, or a choice."""
    if getattr(parameter, "is_flag", False):
        return "switch"
    kind = parameter.type
    text = f"{len(kind.types)} × {_kind(kind.types[0])}" if isinstance(kind, click.Tuple) else _kind(kind)
    return f"{text}, may be repeated" if getattr(parameter, "multiple", False) else text


def _kind(kind: Any) -> str:
    """In words, with its range where it has one."""
    if isinstance(kind, click.Choice):
        return ", ".join(f"`{choice}`" for choice in kind.choices)
    name = KINDS[kind.name.removesuffix(" range")]
    low, high = getattr(kind, "min", None), getattr(kind, "max", None)
    if low is not None and high is not None:
        return f"{name}, {low} to {high}"
    return f"{name}, at least {low}" if low is not None else name if high is None else f"{name}, at most {high}"


def _default(parameter: click.Parameter) -> str:
    default = parameter.default
    if parameter.required:
        return "required"
    if isinstance(default, bool):
        return "on" if default else "off"
    assert not callable(default), f"{parameter.name}: a default that depends on the machine has no place in a reference"
    return "–" if default is None else f"`{default}`"


if __name__ == "__main__":
    (Path(sys.argv[1]) if sys.argv[1:] else PAGE).write_text(reference())
