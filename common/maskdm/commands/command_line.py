"""What the two command lines share: precedence of options, errors as one line, exit codes.

Precedence: default < `--config FILE` (TOML) < environment (`MASKDM_…`) < flag.
"""

import sys
import tomllib
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import click
import typer
from click.core import ParameterSource
from pydantic import ValidationError

from .. import __version__
from ..config import Frozen
from ..errors import Interrupted, MaskDMError, UsageError

INTERRUPTED = 130
STAGES = "maskdm.stages"  # where a command finds the [[stages]] of its configuration

Config = TypeVar("Config", bound=Frozen)


def run(app: typer.Typer, program: str, arguments: list[str] | None = None) -> int:
    """Run a command line and return its exit code: 0 done, 1 failed, 2 the user's mistake, 130 interrupted."""
    arguments = sys.argv[1:] if arguments is None else arguments
    command = prepared(app, program)
    try:
        result = command.main(args=arguments, prog_name=program, standalone_mode=False)
        if result == INTERRUPTED:  # what Typer makes of a KeyboardInterrupt, without a word
            return _fail(program, "interrupted", INTERRUPTED)
        return result if isinstance(result, int) else 0
    except click.exceptions.Exit as done:
        return done.exit_code
    except (Interrupted, KeyboardInterrupt, click.Abort) as stopped:
        return _fail(program, str(stopped) or "interrupted", INTERRUPTED)
    except click.ClickException as error:
        where = error.ctx.command_path if isinstance(error, click.UsageError) and error.ctx else program
        return _fail(where, f"{error.format_message()} (see {where} --help)", 2)
    except MaskDMError as error:
        if "--debug" in arguments:
            traceback.print_exc()
        return _fail(program, str(error), error.exit_code)
    except Exception as error:
        if "--debug" in arguments:
            traceback.print_exc()
        return _fail(program, f"unexpected {type(error).__name__}: {error}; --debug shows where", 1)


def prepared(app: typer.Typer, program: str) -> click.Command:
    """A command line with what all of ours have: environment variables, --config, --debug, and --version."""
    command = typer.main.get_command(app)
    _prepare(command)
    return click.version_option(__version__, prog_name=program, message="%(prog)s %(version)s")(command)


def configure(build: type[Config], values: dict[str, Any], options: dict[str, str] | None = None) -> Config:
    """Build a configuration; a bad value becomes a UsageError that names its option.

    Args:
        options: field → option, where the option is not simply the field's name.
    """
    try:
        return build.model_validate(values)
    except ValidationError as error:
        problem = error.errors()[0]
        message = str(problem["msg"]).removeprefix("Value error, ")
        if not problem["loc"]:
            raise UsageError(message) from error
        name = str(problem["loc"][0])
        option = (options or {}).get(name, f"--{name.replace('_', '-')}")
        raise UsageError(f"{option} {problem.get('input')}: {message}") from error


def _fail(where: str, message: str, code: int) -> int:
    print(f"{where}: {' '.join(message.split())}", file=sys.stderr, flush=True)
    return code


def _prepare(command: click.Command) -> None:
    """Give every option its environment variable, every command --debug, and those that do the work --config."""
    for parameter in command.params:
        if isinstance(parameter, click.Option) and parameter.name and parameter.envvar is None:
            parameter.envvar = f"MASKDM_{parameter.name.upper()}"
            parameter.show_envvar = True
    if not isinstance(command, click.Group) or command.invoke_without_command:
        command.params.append(
            _Config(
                ["--config"],
                type=click.Path(path_type=Path),
                envvar="MASKDM_CONFIG",
                is_eager=True,
                expose_value=False,
                help="TOML file of options, e.g. batch-size = 64; the environment and flags come first.",
            )
        )
    command.params.append(click.Option(["--debug"], is_flag=True, expose_value=False, help="Show tracebacks."))
    if isinstance(command, click.Group):
        for child in command.commands.values():
            _prepare(child)


class _Config(click.Option):
    """--config. MASKDM_CONFIG is meant for the subcommand, where a command that also works alone has been given one."""

    def handle_parse_result(
        self, context: click.Context, options: Mapping[str, Any], rest: list[str]
    ) -> tuple[Any, list[str]]:
        path, rest = super().handle_parse_result(context, options, rest)
        in_environment = context.get_parameter_source("config") is ParameterSource.ENVIRONMENT
        if isinstance(path, Path) and not (in_environment and rest and isinstance(context.command, click.Group)):
            use_defaults(context, _read(path), f"--config {path}", over=True)
        return path, rest


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--config {path} cannot be read: {error}") from error
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"--config {path} is not TOML: {error}") from error


def use_defaults(context: click.Context, document: dict[str, Any], origin: str, *, over: bool) -> None:
    """Take options from a document as defaults; `over` says whether they beat those taken before.

    A command with an option --recipe also takes `[[stages]]`, which land in `context.meta[STAGES]`.

    Raises:
        UsageError: an unknown key.
    """
    known = {p.name for p in context.command.params if isinstance(p, click.Option) and p.expose_value}
    values = {key.replace("-", "_"): value for key, value in document.items()}
    stages = values.pop("stages", None) if "recipe" in known else None
    for key in document:
        if key.replace("-", "_") in values.keys() - known:
            raise UsageError(f"{origin}: unknown key {key!r}: see {context.command_path} --help for the options")
    if stages is not None:
        if not isinstance(stages, list) or not all(isinstance(stage, dict) for stage in stages):
            raise UsageError(f"{origin}: stages must be tables: [[stages]]")
        if over or STAGES not in context.meta:
            context.meta[STAGES] = stages
    before = dict(context.default_map or {})
    context.default_map = {**before, **values} if over else {**values, **before}


def given(context: click.Context) -> set[str]:
    """Names of the options that were given on the command line or in the environment."""
    chosen = (ParameterSource.COMMANDLINE, ParameterSource.ENVIRONMENT)
    return {name for name in context.params if context.get_parameter_source(name) in chosen}
