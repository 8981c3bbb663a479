"""The options of `serve` and `simulate`: one for each field of FederationOptions, which also has their help texts."""

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import click
import typer
from click.core import ParameterSource
from pydantic import BeforeValidator
from pydantic.fields import FieldInfo

from maskdm.commands import command_line as cli
from maskdm.evaluation.extractors.features import RANDOM, open_extractor

from ..federation.folder import federation_config
from ..federation.settings import FederationConfig, FederationOptions

LAST = "federation"  # the argument of a command in which it gets what was chosen


def with_federation_options(**defaults: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the options of a federation beside its own.

    Its argument `federation` gets, by name, those that somebody gave, in whichever way, and `defaults`.

    Args:
        defaults: that are others for this command.
    """
    hints = get_type_hints(FederationOptions)  # without what is annotated
    options = [
        _option(name, field, hints[name], defaults.get(name, field.default))
        for name, field in FederationOptions.model_fields.items()
    ]

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = [p for p in inspect.signature(command).parameters.values() if p.name != LAST]

        def run(**values: Any) -> None:
            source = click.get_current_context().get_parameter_source
            chosen = {option.name: values.pop(option.name) for option in options}
            given = {name: value for name, value in chosen.items() if source(name) is not ParameterSource.DEFAULT}
            command(**values, **{LAST: defaults | given})

        parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in (*own, *options)]
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # what Typer reads
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        run.__name__, run.__doc__ = command.__name__, command.__doc__
        return run

    return decorate


def chosen_federation(prior: Path, chosen: Mapping[str, Any]) -> FederationConfig:
    """The federation that somebody chose.

    Args:
        chosen: options by name; `evaluate_features` still names a file.

    Raises:
        UsageError: a value that is not allowed.
    """
    features = _digest_of(chosen.get("evaluate_features") or RANDOM) if chosen.get("evaluate") else None
    return federation_config(prior, cli.configure(FederationOptions, {**chosen, "evaluate_features": features}))


def _option(name: str, field: FieldInfo, kind: Any, default: Any) -> inspect.Parameter:
    if any(isinstance(item, BeforeValidator) for item in field.metadata):  # the field reads text
        kind, default = str if default is not None else str | None, _text(default)
    annotation = Annotated[kind, typer.Option(help=field.description)]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _text(value: Any) -> str | None:
    """A value as people write it."""
    if value is None:
        return None
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _digest_of(features: str) -> str:
    """What sites know a feature network by: the sha256 of its file."""
    return open_extractor(features, "--evaluate-features").sha256
