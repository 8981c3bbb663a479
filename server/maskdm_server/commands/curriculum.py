"""Curricula: shipped recipes, and stages out of options and tables."""

import tomllib
from collections.abc import Collection, Mapping, Sequence
from importlib.resources import files
from typing import Any

import typer

from maskdm import quantities
from maskdm.commands import command_line as cli
from maskdm.config import MaskConfig, Stage, TrainingConfig
from maskdm.errors import UsageError

MASK_OPTIONS = {"mask": "kind", "mask_ratio": "ratio", "block_size": "block_size"}
# What a stage may say for itself; everything else holds for the whole run.
STAGE_OPTIONS = (*MASK_OPTIONS, "images", "batch_size", "lr", "warmup_images")


def recipe_names() -> list[str]:
    """Names of the shipped recipes."""
    return sorted(entry.name.removesuffix(".toml") for entry in _folder().iterdir() if entry.name.endswith(".toml"))


def read_recipe(name: str) -> dict[str, Any]:
    """A shipped recipe: options, and its `stages`.

    Raises:
        UsageError: there is none of that name.
    """
    if name not in recipe_names():
        raise UsageError(f"--recipe {name}: choose one of {', '.join(recipe_names())}")
    return tomllib.loads((_folder() / f"{name}.toml").read_text())


def use_recipe(context: typer.Context, name: str | None) -> str | None:
    """Callback of --recipe: its options become defaults, below those of --config."""
    if name is not None:
        cli.use_defaults(context, read_recipe(name), f"--recipe {name}", over=False)
    return name


def stages_from(
    values: Mapping[str, Any], tables: Sequence[Mapping[str, Any]], explicit: Collection[str]
) -> tuple[Stage, ...]:
    """One stage for each table, or a single one where there is none.

    Args:
        values: options of the whole run, by name with underscores, as TrainingConfig and MaskConfig take them.
        tables: `[[stages]]` of a recipe or a configuration file.
        explicit: options given on the command line or in the environment; they hold for every stage.

    Raises:
        UsageError: an unknown key, or a value that is not allowed; the message names the stage.
    """
    stages = []
    for number, table in enumerate(tables or [{}], start=1):
        own = {key.replace("-", "_"): value for key, value in table.items()}
        for key in own.keys() - set(STAGE_OPTIONS):
            raise UsageError(f"stage {number}: unknown key {key!r}; a stage has {', '.join(STAGE_OPTIONS)}")
        merged = {**values, **{key: value for key, value in own.items() if key not in explicit}}
        merged["images"] = quantities.count("--images", str(merged["images"]))
        try:
            mask = {field: merged.pop(option) for option, field in MASK_OPTIONS.items()}
            options = {"kind": "--mask", "ratio": "--mask-ratio"}
            stages.append(
                Stage(mask=cli.configure(MaskConfig, mask, options), training=cli.configure(TrainingConfig, merged))
            )
        except UsageError as error:
            raise UsageError(f"stage {number}: {error}" if tables else str(error)) from error
    return tuple(stages)


def _folder() -> Any:
    return files("maskdm.training") / "recipes"
