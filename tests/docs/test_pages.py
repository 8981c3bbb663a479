"""Every page: links that lead somewhere, commands that the programs would take, make targets and scripts that exist."""

import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import click
import pytest

from maskdm.commands import command_line as cli
from maskdm_client.commands.app import app as client_app
from maskdm_server.commands.app import app as server_app

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    str(path.relative_to(ROOT))
    for path in (
        *ROOT.glob("*.md"),
        *(p for name in ("docs", "benchmarks", "deploy") for p in (ROOT / name).rglob("*.md")),
    )
)
PROGRAMS = {"maskdm-server": server_app, "maskdm-client": client_app}
MODULES = {"maskdm_server": "maskdm-server", "maskdm_client": "maskdm-client"}

FENCE = re.compile(r"^([ \t]*)```(\w*)\n(.*?)^\1```", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
# What ends a simple command in a shell.
END = re.compile(r"\|\|?|&&?|;|\d?>>?|<")


@cache
def text_of(page: str) -> str:
    return (ROOT / page).read_text()


@cache
def anchors(page: str) -> frozenset[str]:
    """What GitHub makes of a page's headings."""
    prose = FENCE.sub("", text_of(page))
    found: list[str] = []
    for heading in re.findall(r"^#+ +(.+?) *$", prose, re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").replace("*", "")
        slug = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
        found.append(slug + (f"-{found.count(slug)}" if slug in found else ""))
    return frozenset(found)


def problem_of(page: str, target: str) -> str | None:
    """What is wrong with a link of a page."""
    path, _, anchor = target.partition("#")
    where = (ROOT / page).parent / path if path else ROOT / page
    if not where.exists():
        return f"{target}: there is no such file"
    if anchor and anchor not in anchors(str(where.resolve().relative_to(ROOT))):
        return f"{target}: there is no such heading"
    return None


@pytest.mark.parametrize("page", PAGES)
def test_every_link_within_the_repository_leads_somewhere(page: str) -> None:
    links = [link for link in LINK.findall(FENCE.sub("", text_of(page))) if not re.match(r"[a-z]+:", link)]
    assert [problem for link in links if (problem := problem_of(page, link))] == []


def shell_lines(page: str) -> Iterator[str]:
    """Lines of fenced blocks and of blocks that are indented, continuations joined."""
    text = text_of(page)
    blocks = [block for _, language, block in FENCE.findall(text) if language in ("", "bash", "sh", "ini")]
    blocks += re.findall(r"^ {4}(maskdm-(?:server|client) .*)$", FENCE.sub("", text), re.MULTILINE)
    for block in blocks:
        yield from (line.strip() for line in block.replace("\\\n", " ").splitlines())


def commands(page: str) -> Iterator[tuple[str, list[str]]]:
    """Calls of our programs in a page's blocks: the program's name, and its arguments."""
    for line in shell_lines(page):
        if "maskdm" not in line:
            continue
        try:
            lexer = shlex.shlex(line.removeprefix("ExecStart="), posix=True, punctuation_chars=True)
            lexer.whitespace_split = True
            words = list(lexer)
        except ValueError:  # a quotation over several lines: no command of ours
            continue
        simple: list[list[str]] = [[]]
        for word in words:
            if END.fullmatch(word):
                simple.append([])
            else:
                simple[-1].append(word)
        for command in simple:
            yield from called(command)


def called(words: list[str]) -> Iterator[tuple[str, list[str]]]:
    """The call within a simple command: alone, after `--`, or as a module."""
    for place, word in enumerate(words):
        before = words[:place]
        first = all(re.fullmatch(r"[A-Z_]+=.*", earlier) for earlier in before) or before[-1] == "--"
        if first and word.rpartition("/")[2] in PROGRAMS:
            yield word.rpartition("/")[2], words[place + 1 :]
            return
        if word in MODULES and before and before[-1] == "-m":
            yield MODULES[word], words[place + 1 :]
            return


def check(program: str, arguments: list[str]) -> None:
    """Parse arguments as the program would, without running anything.

    Raises:
        click.UsageError: the program would refuse them.
    """
    command = cli.prepared(PROGRAMS[program], program)
    context, rest = click.Context(command, info_name=program), [word for word in arguments if word != "…"]
    while True:
        options, rest, order = command.make_parser(context).parse_args(rest)
        for parameter in order:
            value = options.get(parameter.name)
            if value is not None and "$" not in str(value):
                parameter.type_cast_value(context, value)
        if not isinstance(command, click.Group):
            break
        if not rest:
            return
        if rest[0] not in command.commands:
            raise click.UsageError(f"No such command {rest[0]!r}.")
        command = command.commands[rest[0]]
        context, rest = click.Context(command, info_name=command.name, parent=context), rest[1:]
    if rest:
        raise click.UsageError(f"Unexpected {' '.join(rest)}.")


@pytest.mark.parametrize("page", [page for page in PAGES if page != "CHANGELOG.md"])
def test_the_programs_would_take_every_command_of_a_page(page: str) -> None:
    refused = []
    for program, arguments in commands(page):
        try:
            check(program, arguments)
        except click.UsageError as error:
            refused.append(f"{program} {' '.join(arguments)}: {error.format_message()}")
    assert refused == []


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("maskdm-server pretrain --data ./public --out prior", None),
        ("maskdm-server pretrain --data ./public --oot prior", "No such option"),
        ("maskdm-server pretrain --size XXL --data ./public", "'XXL' is not one of"),
        ("maskdm-server provision renew --out kits --client hospital-a", None),
        ("maskdm-server provision rebuild", "No such command"),
        ("maskdm-client ./local", "No such command"),
        ("maskdm-client audit-log show --last many", "not a valid int"),
    ],
)
def test_a_command_that_a_program_refuses_is_found(line: str, expected: str | None) -> None:
    ((program, arguments),) = called(shlex.split(line))
    if expected is None:
        check(program, arguments)
        return
    with pytest.raises(click.UsageError) as caught:
        check(program, arguments)
    assert expected in caught.value.format_message()


def test_commands_are_found_however_they_are_started() -> None:
    found = {page: list(commands(page)) for page in PAGES}
    assert sum(map(len, found.values())) > 40
    started = [
        "MASKDM_ROUNDS=3 maskdm-server serve --tls kits/server",
        "torchrun --nproc-per-node 8 -m maskdm_server pretrain --shard",
        "kubectl -n maskdm-client exec job/maskdm-client -c client -- maskdm-client approve",
        ".venv/bin/maskdm-client approve",
    ]
    assert [len(list(called(shlex.split(line)))) for line in started] == [1, 1, 1, 1]
    assert list(called(shlex.split("docker build -f deploy/Dockerfile --target client -t maskdm-client ."))) == []


@pytest.mark.parametrize("page", PAGES)
def test_make_targets_scripts_and_modules_that_a_page_names_exist(page: str) -> None:
    text = text_of(page)
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"(?:`|&& |^)make ([a-z]+)", text, re.MULTILINE))
    assert named <= targets
    scripts = set(re.findall(r"python ((?:benchmarks|docs)/\w+\.py)", text))
    assert [script for script in scripts if not (ROOT / script).exists()] == []
    modules = set(re.findall(r"python -m (maskdm[\w.]*\w)", text))
    assert [name for name in modules if not list(ROOT.glob(f"*/{name.replace('.', '/')}.py"))] == []


def test_the_one_command_of_contributing_is_there() -> None:
    assert "`make check && make test`" in text_of("CONTRIBUTING.md")
