"""Writes `api.md` from what `maskdm` and `maskdm_server` export: signatures as they stand in the code, and docstrings.

python docs/make_api.py [FILE]     `make docs`; the default is api.md beside this script
"""

import ast
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent
from types import FunctionType, ModuleType
from typing import Literal, get_args, get_origin

import maskdm
import maskdm_server
from maskdm import config

PAGE = Path(__file__).with_name("api.md")
SECTION = re.compile(r"(Args|Returns|Raises):")

INTRODUCTION = """\
# Python

What `import maskdm` and `import maskdm_server` give, written by `make docs` from the code: change the code, not this
page. Nothing is loaded before it is first used; all of it is typed. Each function calls the very code that the command
of its name runs; [quickstart.ipynb](quickstart.ipynb) uses them all in ten minutes, and what they do is explained
where the commands are: [method.md](method.md), [data.md](data.md), [evaluation.md](evaluation.md),
[federation.md](federation.md). New networks, masks, samplers, rules, optimisers and layouts:
[extending.md](extending.md).
"""


def page() -> str:
    """The whole page."""
    parts = [INTRODUCTION]
    for package in (maskdm, maskdm_server):
        parts.append(f"## {package.__name__}\n")
        for name in package.__all__:
            if name != "__version__":
                parts += described(f"{package.__name__}.{name}", getattr(package, name))
    parts.append("## Choices\n\nWhat the names of types above stand for.\n")
    for name, choices in sorted(vars(config).items()):
        if get_origin(choices) is Literal:
            parts.append(f"- `{name}`: {', '.join(f'`{choice}`' for choice in get_args(choices))}")
    parts.append("")
    return "\n".join(parts)


def described(name: str, thing: object) -> Iterator[str]:
    """A heading, what stands in the code, and the docstring."""
    yield f"### {name}\n"
    if isinstance(thing, ModuleType):
        source = inspect.getsource(thing)
        yield prose(inspect.getdoc(thing) or "")
        for node in ast.parse(source).body:
            if isinstance(node, ast.ClassDef):
                yield from class_(node, source)
            elif isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                yield from function(node, source)
        return
    assert isinstance(thing, type | FunctionType)
    source = dedent(inspect.getsource(thing))
    (node,) = ast.parse(source).body
    if isinstance(node, ast.FunctionDef):
        yield from function(node, source)
    elif isinstance(node, ast.ClassDef):
        yield from class_(node, source)
        for below in node.body:
            if isinstance(below, ast.FunctionDef) and not below.name.startswith("_"):
                yield from function(below, source)


def class_(node: ast.ClassDef, source: str) -> Iterator[str]:
    """Its name, what it holds as it stands in the code, with comments, and its docstring."""
    lines = source.splitlines()
    found = [below for below in node.body if isinstance(below, ast.AnnAssign)]
    held = ["\n".join(lines[below.lineno - 1 : below.end_lineno]) for below in found]
    yield code("\n".join([f"class {node.name}:", *held]))
    yield prose(ast.get_docstring(node) or "")


def function(node: ast.FunctionDef, source: str) -> Iterator[str]:
    """Its head as it stands in the code, and its docstring."""
    lines = source.splitlines()
    head = dedent("\n".join(lines[node.lineno - 1 : node.body[0].lineno - 1]))
    decorators = "".join(f"@{ast.unparse(decorator)}\n" for decorator in node.decorator_list)
    yield code(f"{decorators}{head.rstrip().removesuffix(':')}")
    yield prose(ast.get_docstring(node) or "")


def code(text: str) -> str:
    """A block of Python."""
    return f"```python\n{text}\n```\n"


def prose(docstring: str) -> str:
    """A docstring, its sections as lists."""
    out: list[str] = []
    listed = False
    for line in docstring.splitlines():
        if section := SECTION.fullmatch(line.strip()):
            listed = True
            out.append(f"{section[1]}:\n")
        elif listed and line.startswith("    ") and not line.startswith("     "):
            name, colon, rest = line.strip().partition(": ")
            out.append(f"- `{name}`: {rest}" if colon else f"- {line.strip()}")
        elif listed and line.strip():
            out.append(f"  {line.strip()}")
        else:
            out.append(line)
    return "\n".join(out) + "\n"


if __name__ == "__main__":
    (Path(sys.argv[1]) if sys.argv[1:] else PAGE).write_text(page())
