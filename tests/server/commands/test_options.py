"""Options of `serve` and `simulate`: none is missing, all can be given in every way, mistakes are one line."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
import typer

from maskdm import quantities
from maskdm.commands import command_line as cli
from maskdm.errors import UsageError
from maskdm.evaluation.extractors.features import random_extractor
from maskdm_server.commands import serve_command, simulate_command
from maskdm_server.commands.app import app
from maskdm_server.federation.settings import MAY_CHANGE, FederationConfig, FederationOptions

FIELDS = FederationOptions.model_fields

# A value for every field that is not its default, as one would write it.
OTHER: dict[str, tuple[str, Any]] = {
    "seed": ("7", 7),
    "rounds": ("12", 12),
    "min_clients": ("4", 4),
    "min_replies": ("3", 3),
    "clients_per_round": ("6", 6),
    "join_deadline": ("10.5", 10.5),
    "round_deadline": ("11.5", 11.5),
    "round_limit": ("12.5", 12.5),
    "patience": ("4", 4),
    "keep_every": ("3", 3),
    "sample_every": ("5", 5),
    "local_images": ("1.5K", 1500),
    "local_minutes": ("2.5", 2.5),
    "batch_size": ("16", 16),
    "lr": ("0.001", 1e-3),
    "proximal": ("0.1", 0.1),
    "keep_moments": ("true", True),
    "train": ("adapters", "adapters"),
    "adapter_rank": ("4", 4),
    "encoding": ("int8", "int8"),
    "topk_share": ("0.25", 0.25),
    "max_upload": ("50MB", 50_000_000),
    "aggregation": ("median", "median"),
    "byzantine": ("0", 0),
    "max_norm_ratio": ("5", 5.0),
    "server_optimizer": ("fedadam", "fedadam"),
    "server_lr": ("0.1", 0.1),
    "server_betas": ("0.8,0.95", (0.8, 0.95)),
    "server_epsilon": ("0.01", 0.01),
    "server_ema": ("0.9", 0.9),
    "evaluate": ("200", 200),
    "evaluate_features": ("random", random_extractor().sha256),
    "evaluate_sampler": ("ddim", "ddim"),
    "evaluate_steps": ("12", 12),
}
COMMANDS = ["serve", "simulate"]


def option(field: str) -> str:
    return f"--{field.replace('_', '-')}"


def parameters(command: str) -> dict[str, click.Parameter]:
    group = typer.main.get_command(app)
    assert isinstance(group, click.Group)
    return {str(parameter.name): parameter for parameter in group.commands[command].params}


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("MASKDM_"):
            monkeypatch.delenv(name)


@pytest.fixture
def serve(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., FederationConfig]:
    """What `serve` makes of options; nothing is served."""
    found: list[FederationConfig] = []

    def keep(prior: Path, out: Path, config: FederationConfig, **_: Any) -> Path:
        found.append(config)
        return out

    monkeypatch.setattr(serve_command, "serve", keep)

    def run(*options: str) -> FederationConfig:
        arguments = ["serve", "--prior", str(folder / "prior.safetensors"), "--out", str(tmp_path / "out")]
        arguments += ["--insecure", *options]
        assert cli.run(app, "maskdm-server", arguments) == 0
        return found.pop()

    return run


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("field", FIELDS)
def test_every_field_of_a_federation_is_an_option_with_an_explanation(command: str, field: str) -> None:
    found = parameters(command)
    assert field in found, f"{command} has no {option(field)}"
    assert option(field) in found[field].opts
    assert getattr(found[field], "help", None)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("field", sorted(set(FIELDS) - {"rounds"}))
def test_an_option_has_the_text_and_the_default_of_its_field(command: str, field: str) -> None:
    found, declared = parameters(command)[field], FIELDS[field]
    assert getattr(found, "help", None) == declared.description
    usual = {"local_images": "2048", "server_betas": "0.9,0.99"}  # as people write them
    assert found.default == usual.get(field, declared.default)


def test_the_defaults_reach_the_federation(serve: Callable[..., FederationConfig]) -> None:
    found = serve()
    assert {name: getattr(found, name) for name in FIELDS} == {n: f.get_default() for n, f in FIELDS.items()}


def test_what_may_change_when_a_federation_goes_on_are_fields_of_it() -> None:
    assert {name.removeprefix("federation.") for name in MAY_CHANGE} <= FIELDS.keys()


def test_this_list_of_other_values_is_complete() -> None:
    assert OTHER.keys() == FIELDS.keys()
    assert all(FIELDS[name].get_default() != value for name, (_, value) in OTHER.items())


@pytest.mark.parametrize("without", ["patience", "server_ema"])  # which exclude each other
@pytest.mark.parametrize("how", ["flag", "environment", "file"])
def test_every_option_reaches_the_federation_however_it_is_given(
    serve: Callable[..., FederationConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str, without: str
) -> None:
    given = {name: text for name, (text, _) in OTHER.items() if name != without}
    if how == "flag":
        parts = [(option(name),) if text == "true" else (option(name), text) for name, text in given.items()]
        found = serve(*(part for both in parts for part in both))
    elif how == "environment":
        for name, text in given.items():
            monkeypatch.setenv(f"MASKDM_{name.upper()}", text)
        found = serve()
    else:
        lines = [f"{option(name)[2:]} = {text!r}" for name, text in given.items()]
        (tmp_path / "mine.toml").write_text("\n".join(lines))
        found = serve("--config", str(tmp_path / "mine.toml"))
    assert {name: getattr(found, name) for name in given} == {name: OTHER[name][1] for name in given}


def test_numbers_in_a_file_need_no_quotes(serve: Callable[..., FederationConfig], tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text("rounds = 4\nlocal-images = 512\nmax-upload = 50_000_000\nlr = 0.01\n")
    found = serve("--config", str(tmp_path / "mine.toml"))
    assert (found.rounds, found.local_images, found.max_upload, found.lr) == (4, 512, 50_000_000, 0.01)


def test_a_flag_beats_the_environment_which_beats_the_file(
    serve: Callable[..., FederationConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.toml").write_text("rounds = 4\nbatch-size = 4\nlr = 0.4\n")
    monkeypatch.setenv("MASKDM_ROUNDS", "3")
    monkeypatch.setenv("MASKDM_BATCH_SIZE", "3")
    found = serve("--config", str(tmp_path / "mine.toml"), "--rounds", "2")
    assert (found.rounds, found.batch_size, found.lr) == (2, 3, 0.4)


def test_where_minutes_are_given_images_are_no_limit_unless_they_are_given_too(
    serve: Callable[..., FederationConfig],
) -> None:
    assert serve().local_images == 2048
    assert serve("--local-minutes", "5").local_images == 100_000_000
    assert serve("--local-minutes", "5", "--local-images", "4K").local_images == 4000
    assert serve("--local-images", "4K").local_minutes is None


def test_images_that_are_given_count_also_where_they_are_as_many_as_usual(
    serve: Callable[..., FederationConfig],
) -> None:
    assert serve("--local-minutes", "5", "--local-images", "2048").local_images == 2048


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--aggregation", "krum"), "--aggregation krum, --byzantine 1: needs --min-replies 5 or more"),
        (("--aggregation", "krum", "--min-replies", "4"), "needs --min-replies 5 or more"),
        (("--aggregation", "median", "--min-replies", "2"), "needs --min-replies 3 or more"),
        (("--aggregation", "trimmed-mean", "--byzantine", "2", "--min-replies", "4"), "needs --min-replies 5 or more"),
        (("--min-replies", "3", "--clients-per-round", "2"), "--clients-per-round 2 is less than --min-replies"),
        (("--aggregation", "average"), "--aggregation"),
        (("--encoding", "fp16"), "--encoding"),
        (("--patience", "2", "--server-ema", "0.9"), "--patience and --server-ema exclude each other"),
        (("--batch-size", "65537"), "--batch-size 65537"),
        (("--local-minutes", "200000"), "--local-minutes 200000"),
        (("--host", "::1"), "--host ::1 is an IPv6 address"),
        (("--rounds", "0"), "--rounds 0"),
        (("--rounds", "many"), "--rounds"),
        (("--lr", "2"), "--lr 2"),
        (("--lr", "nan"), "--lr nan"),
        (("--topk-share", "0"), "--topk-share 0"),
        (("--server-ema", "1"), "--server-ema 1"),
        (("--server-betas", "0.9"), "--server-betas 0.9: give two numbers such as 0.9,0.99"),
        (("--max-norm-ratio", "1"), "--max-norm-ratio 1"),
        (("--max-upload", "much"), "--max-upload much: give a number such as 500KB, 50MB or 1.5GB"),
        (("--max-upload", "0"), "--max-upload 0"),
        (("--local-images", "few"), "--local-images few: give a number such as 50000, 200K or 1.5M"),
        (("--round-deadline", "0"), "--round-deadline 0"),
        (("--byzantine", "-1"), "--byzantine -1"),
        (("--local-minutes", "0"), "--local-minutes 0"),
        ((), "--tls is missing: give the server's folder that maskdm-server provision made"),
        (("--host", "0.0.0.0"), "--tls is missing"),
        (("--host", "::1", "--insecure"), "--host ::1 is an IPv6 address"),
        (("--tls", "."), "--tls . holds no ca.crt"),
        (("--tls", ".", "--insecure"), "--tls and --insecure exclude each other"),
        (("--evaluate", "9"), "--evaluate 9: 10 images are the fewest"),
        (("--evaluate", "200", "--evaluate-features", "nowhere"), "--evaluate-features nowhere does not exist"),
        (("--evaluate-sampler", "magic"), "--evaluate-sampler"),
        (("--insecure", "--evaluate", "20", "--evaluate-steps", "51"), "--evaluate-steps 51 is more than the model's"),
        (("--unknown", "1"), "--unknown"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_option(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], message: str
) -> None:
    arguments = ["serve", "--prior", str(folder / "prior.safetensors"), "--out", str(tmp_path / "out"), *options]
    assert cli.run(app, "maskdm-server", arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize("betas", ["0.9,1", "-0.1,0.9", "2,2"])
def test_decay_rates_out_of_range_are_refused_before_anything_is_served(
    folder: Path, tmp_path: Path, betas: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve_command, "serve", lambda prior, out, config, **_: out)
    common = ["serve", "--prior", str(folder / "prior.safetensors"), "--out", str(tmp_path / "out")]
    assert cli.run(app, "maskdm-server", [*common, "--server-optimizer", "fedadam", f"--server-betas={betas}"]) == 2


@pytest.mark.parametrize("command", COMMANDS)
def test_help_lists_every_option(command: str, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert cli.run(app, "maskdm-server", [command, "--help"]) == 0
    printed = capsys.readouterr().out
    assert all(option(name) in printed for name in FIELDS)
    assert "MASKDM_SERVER_EMA" in printed


@pytest.fixture
def simulate(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., FederationConfig]:
    """What `simulate` makes of options; nothing is run."""
    found: list[FederationConfig] = []

    def keep(prior: Path, data: list[Path], out: Path, config: FederationConfig, **_: Any) -> Path:
        found.append(config)
        return out

    monkeypatch.setattr(simulate_command, "run", keep)

    def run(*options: str) -> FederationConfig:
        arguments = ["simulate", "--prior", str(folder / "prior.safetensors"), "--out", str(tmp_path / "out")]
        assert cli.run(app, "maskdm-server", [*arguments, "--data", str(tmp_path), *options]) == 0
        return found.pop()

    return run


def test_simulations_are_shorter_and_wait_for_everybody(simulate: Callable[..., FederationConfig]) -> None:
    assert parameters("simulate")["rounds"].default == 5
    assert parameters("serve")["rounds"].default == 10
    found = simulate("--clients", "4")
    assert (found.rounds, found.min_clients, found.min_replies) == (5, 4, 4)
    assert simulate("--clients", "4", "--clients-per-round", "2").min_replies == 2


def test_who_waits_for_a_turn_in_a_simulation_is_not_given_up(simulate: Callable[..., FederationConfig]) -> None:
    assert simulate().round_deadline == 3600
    assert simulate("--engine", "inline").round_deadline == 86_400
    assert simulate("--engine", "inline", "--round-limit", "50").round_deadline == 50
    assert simulate("--engine", "inline", "--round-deadline", "7").round_deadline == 7


@pytest.mark.parametrize("how", ["flag", "environment", "file"])
def test_what_is_asked_of_a_simulation_holds_however_it_is_given(
    simulate: Callable[..., FederationConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    options: tuple[str, ...] = ()
    if how == "flag":
        options = ("--min-clients", "2", "--min-replies", "1", "--rounds", "10")
    elif how == "environment":
        for name, value in {"MIN_CLIENTS": "2", "MIN_REPLIES": "1", "ROUNDS": "10"}.items():
            monkeypatch.setenv(f"MASKDM_{name}", value)
    else:
        (tmp_path / "mine.toml").write_text("min-clients = 2\nmin-replies = 1\nrounds = 10\n")
        options = ("--config", str(tmp_path / "mine.toml"))
    found = simulate("--clients", "4", *options)
    assert (found.min_clients, found.min_replies, found.rounds) == (2, 1, 10)


@pytest.mark.parametrize(("text", "number"), [("200", 200), ("200K", 200_000), ("1.5m", 1_500_000), ("1e3", 1000)])
def test_counts_of_images_have_units(text: str, number: int) -> None:
    assert quantities.count("--images", text) == number


@pytest.mark.parametrize(
    ("text", "number"),
    [("1000", 1000), ("500KB", 500_000), ("50MB", 50_000_000), ("1.5gb", 1_500_000_000), (" 2 MB ", 2_000_000)],
)
def test_sizes_have_units(text: str, number: int) -> None:
    assert quantities.size("--max-upload", text) == number


@pytest.mark.parametrize("text", ["", "K", "many", "nan", "inf", "3G", "1 0"])
@pytest.mark.parametrize("read", [quantities.count, quantities.size])
def test_other_numbers_are_refused(read: Callable[[str, str], int], text: str) -> None:
    with pytest.raises(UsageError, match=r"--images .*: give a number such as"):
        read("--images", text)


@pytest.mark.parametrize("text", ["", "1", "1,2,3", "a,b", "0.9;0.99"])
def test_a_pair_is_two_numbers(text: str) -> None:
    with pytest.raises(UsageError, match=r"give (two )?numbers such as"):
        quantities.pair("--betas", text)
