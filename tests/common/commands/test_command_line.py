"""What both command lines promise: precedence, one-line errors, exit codes."""

import os
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st

from maskdm import __version__, quantities
from maskdm.commands import command_line as cli
from maskdm.config import MaskConfig, ModelConfig
from maskdm.errors import (
    CheckpointError,
    DataError,
    FederationError,
    GateRefused,
    Interrupted,
    TrainingDiverged,
    UsageError,
)

FAILURES: dict[str, BaseException] = {
    "usage": UsageError("give less"),
    "data": DataError("no images"),
    "checkpoint": CheckpointError("torn"),
    "federation": FederationError("no quorum"),
    "gate": GateRefused("too large"),
    "diverged": TrainingDiverged("not finite"),
    "interrupted": Interrupted("saved"),
    "keyboard": KeyboardInterrupt(),
    "lines": RuntimeError("first\n  second"),
}

Seen = dict[str, Any]
Run = Callable[..., int]


@pytest.fixture
def seen() -> Seen:
    return {}


@pytest.fixture
def run(seen: Seen, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A small program of two commands, in an environment without MASKDM_ variables."""
    for name in [name for name in os.environ if name.startswith("MASKDM_")]:
        monkeypatch.delenv(name)
    app = typer.Typer(add_completion=False)

    @app.command()
    def train(
        batch_size: Annotated[int, typer.Option(min=1)] = 256,
        lr: float = 0.5,
        flip: bool = False,
    ) -> None:
        seen.update(batch_size=batch_size, lr=lr, flip=flip)

    @app.command()
    def fail(how: str) -> None:
        raise FAILURES[how]

    return lambda *arguments: cli.run(app, "program", list(arguments))


def config_file(folder: Path, text: str) -> str:
    (folder / "options.toml").write_text(text)
    return str(folder / "options.toml")


def test_a_flag_beats_the_environment_beats_the_file_beats_the_default(
    run: Run, seen: Seen, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run("train") == 0
    assert seen == {"batch_size": 256, "lr": 0.5, "flip": False}
    path = config_file(tmp_path, "batch-size = 2\nlr = 0.25\nflip = true")
    assert run("train", "--config", path) == 0
    assert seen == {"batch_size": 2, "lr": 0.25, "flip": True}
    monkeypatch.setenv("MASKDM_BATCH_SIZE", "3")
    assert run("train", "--config", path) == 0
    assert seen == {"batch_size": 3, "lr": 0.25, "flip": True}
    assert run("train", "--batch-size", "4", "--config", path) == 0
    assert seen == {"batch_size": 4, "lr": 0.25, "flip": True}


def test_the_file_of_options_can_be_named_in_the_environment(
    run: Run, seen: Seen, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MASKDM_CONFIG", config_file(tmp_path, "batch_size = 2"))
    assert run("train", "--lr", "1") == 0
    assert seen == {"batch_size": 2, "lr": 1.0, "flip": False}


def test_a_program_without_subcommands_reads_its_options_from_a_file_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = typer.Typer(add_completion=False)
    seen: list[int] = []

    @app.callback(invoke_without_command=True)
    def join(rounds: int = 1) -> None:
        seen.append(rounds)

    path = config_file(tmp_path, "rounds = 7")
    assert cli.run(app, "program", ["--config", path]) == 0
    monkeypatch.setenv("MASKDM_CONFIG", path)
    assert cli.run(app, "program", []) == 0
    assert seen == [7, 7]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--name", "child"], ("join", "child", 7)),  # a value that looks like a subcommand is none
        (["--name=x", "child"], ("child", 7)),
        (["child", "--rounds", "3"], ("child", 3)),
        (["child", "--name", "child"], ("child", 7)),
        (["--name", "child", "child"], ("child", 7)),
    ],
)
def test_a_file_named_in_the_environment_is_for_the_subcommand_where_there_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], expected: tuple[Any, ...]
) -> None:
    app = typer.Typer(add_completion=False)
    seen: list[tuple[Any, ...]] = []

    @app.callback(invoke_without_command=True)
    def join(context: typer.Context, name: str = "", rounds: int = 1) -> None:
        if not context.invoked_subcommand:
            seen.append(("join", name, rounds))
        else:
            assert rounds == 1

    @app.command()
    def child(name: str = "", rounds: int = 1) -> None:
        seen.append(("child", rounds))

    monkeypatch.setenv("MASKDM_CONFIG", config_file(tmp_path, "rounds = 7"))
    assert cli.run(app, "program", arguments) == 0
    assert seen == [expected]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("batch-sise = 2", "unknown key 'batch-sise'"),
        ("config = 'other.toml'", "unknown key 'config'"),
        ("batch-size = ", "is not TOML"),
        ("batch-size = 'many'", "'many' is not a valid integer"),
        ("batch-size = 0", "0 is not in the range"),
    ],
)
def test_a_mistake_in_the_file_of_options_is_named(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, message: str
) -> None:
    assert run("train", "--config", config_file(tmp_path, text)) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_file_of_options_that_is_missing_is_named(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("train", "--config", "/nowhere/options.toml") == 2
    assert "--config /nowhere/options.toml cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--batchsize", "2"], "No such option"),
        (["train", "--batch-size", "two"], "'two' is not a valid integer"),
        (["frain"], "No such command 'frain'"),
        (["fail"], "Missing argument"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line_that_points_to_help(
    run: Run, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert run(*arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert message in printed.err
    assert "--help" in printed.err
    assert printed.err.count("\n") == 1


@pytest.mark.parametrize(
    ("how", "code", "message"),
    [
        ("usage", 2, "program: give less"),
        ("data", 2, "program: no images"),
        ("checkpoint", 2, "program: torn"),
        ("federation", 1, "program: no quorum"),
        ("gate", 1, "program: too large"),
        ("diverged", 1, "program: not finite"),
        ("interrupted", 130, "program: saved"),
        ("keyboard", 130, "program: interrupted"),
        ("lines", 1, "program: unexpected RuntimeError: first second; --debug shows where"),
    ],
)
def test_a_failure_is_one_line_and_an_exit_code(
    run: Run, capsys: pytest.CaptureFixture[str], how: str, code: int, message: str
) -> None:
    assert run("fail", how) == code
    assert capsys.readouterr().err.strip("\n") == message


@pytest.mark.parametrize("how", ["usage", "lines"])
def test_debug_shows_where_a_failure_came_from(run: Run, capsys: pytest.CaptureFixture[str], how: str) -> None:
    assert run("fail", how, "--debug") > 0
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"]])
def test_asking_for_help_is_no_failure(run: Run, capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    assert run(*arguments) == 0
    assert "Usage" in capsys.readouterr().out


def test_help_names_the_environment_variable_of_an_option(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    run("train", "--help")
    assert "MASKDM_BATCH_SIZE" in capsys.readouterr().out


def test_values_become_a_configuration() -> None:
    assert cli.configure(MaskConfig, {"ratio": 0.5}) == MaskConfig(ratio=0.5)


def test_a_value_that_does_not_fit_names_its_option() -> None:
    with pytest.raises(UsageError, match=r"^--ratio 1\.5: Input should be less than or equal to 1"):
        cli.configure(MaskConfig, {"ratio": 1.5})
    with pytest.raises(UsageError, match=r"^--mask-ratio 1\.5: "):
        cli.configure(MaskConfig, {"ratio": 1.5}, {"ratio": "--mask-ratio"})
    with pytest.raises(UsageError, match=r"^--block-size 0: "):
        cli.configure(MaskConfig, {"block_size": 0})


def test_values_that_do_not_fit_together_are_explained() -> None:
    with pytest.raises(UsageError, match=r"^patch size 5 does not divide image size 64$"):
        cli.configure(ModelConfig, {"patch_size": 5})


@pytest.mark.parametrize(
    ("text", "number"),
    [("50000", 50_000), ("200K", 200_000), ("200k", 200_000), ("1.5M", 1_500_000), (" 3 M ", 3_000_000), ("2e3", 2000)],
)
def test_counts_are_read_with_their_unit(text: str, number: int) -> None:
    assert quantities.count("--images", text) == number


@pytest.mark.parametrize(
    ("text", "number"),
    [("1234", 1234), ("500KB", 500_000), ("50MB", 50_000_000), ("50 mb", 50_000_000), ("1.1GB", 1_100_000_000)],
)
def test_sizes_are_read_with_their_unit(text: str, number: int) -> None:
    assert quantities.size("--max-upload", text) == number


@given(st.integers(0, 10**9), st.sampled_from([("", 1), ("K", 10**3), ("M", 10**6)]))
def test_whole_numbers_are_read_exactly(number: int, unit: tuple[str, int]) -> None:
    assert quantities.count("--images", f"{number}{unit[0]}") == number * unit[1]
    assert quantities.size("--max-upload", f"{number}{unit[0]}{'B' if unit[0] else ''}") == number * unit[1]


@given(st.integers(0, 10**6))
def test_thousandths_of_a_unit_are_read_exactly(thousandths: int) -> None:
    text = f"{thousandths // 1000}.{thousandths % 1000:03d}"
    assert quantities.count("--images", f"{text}K") == thousandths
    assert quantities.size("--max-upload", f"{text}GB") == thousandths * 10**6


@pytest.mark.parametrize(
    "text", ["", "K", "many", "1,5K", "5K5", "KK", "5KM", "0x10", "nan", "inf", "-infM", "1e999", "2G"]
)
def test_what_is_no_count_is_refused_under_the_name_of_its_option(text: str) -> None:
    with pytest.raises(UsageError, match=r"^--images .*: give a number such as 50000, 200K or 1\.5M$"):
        quantities.count("--images", text)


@pytest.mark.parametrize("text", ["", "MB", "5M", "5B", "5MiB", "5TB", "50 M B", "nanKB", "1e999"])
def test_what_is_no_size_is_refused_under_the_name_of_its_option(text: str) -> None:
    with pytest.raises(UsageError, match=r"^--max-upload .*: give a number such as 500KB, 50MB or 1\.5GB$"):
        quantities.size("--max-upload", text)


@given(st.one_of(st.text(max_size=8), st.from_regex(r"\A[-+]?[0-9._eE]{0,8}[kKmMgGbB ]{0,3}\Z")))
def test_whatever_is_typed_is_a_number_or_a_mistake_of_the_user(text: str) -> None:
    for read in (quantities.count, quantities.size):
        with suppress(UsageError):
            assert type(read("--images", text)) is int


@pytest.mark.parametrize("program", ["maskdm-server", "maskdm-client"])
def test_a_program_says_its_version(
    program: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MASKDM_CONFIG", "missing.toml")
    app = import_module(f"{program.replace('-', '_')}.commands.app").app
    assert cli.run(app, program, ["--version"]) == 0
    assert capsys.readouterr().out == f"{program} {__version__}\n"
