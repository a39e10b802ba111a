# SPDX-License-Identifier: GPL-2.0-or-later
"""The linters, as tests: one gate, the same on every machine. `make check` runs this file.

Each tool is called by this interpreter's `-m`, so a missing tool fails instead of letting another
version in from PATH. Only shellcheck, which is no Python package, may be absent.
"""

from __future__ import annotations

import ast
import io
import re
import shutil
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

TOP = Path(__file__).resolve().parent.parent
MODULES = sorted((TOP / "zswapd").rglob("*.py"))
TOOLS_MODULES = sorted((TOP / "tools").rglob("*.py"))
MAX_FUNCTION_LINES = 60
SNAPSHOTS = ("Statistics", "Report")
LICENCE = "SPDX-License-Identifier: GPL-2.0-or-later"
COLUMNS = 100
GENERATED = {"docs/configuration.md", "docs/metrics.md"}
PRAGMA = re.compile(r"\s*#\s*(noqa|type: ignore)\b.*")
LINK_ALONE = re.compile(r"\s*([-*] |\[[^]]*\]: )?(<?https?://\S+|!?\[[^]]*\]\(\S+\)\S?)$")
VAGUE = re.compile(r"\b(whoever|nobody|somebody|anybody|so\s+many|such\s+an?)\b", re.IGNORECASE)
UNIX_USER = re.compile(r"([`\"'])nobody\1")

TOOLS = {
    "ruff-check": ["-m", "ruff", "check", "."],
    "ruff-format": ["-m", "ruff", "format", "--check", "--diff", "."],
    "mypy": ["-m", "mypy"],  # pyproject.toml: strict, zswapd, tools, tests/support
    "import-linter": [
        "-c",
        "import sys; from importlinter.cli import lint_imports_command as c; sys.exit(c())",
        "--no-cache",
    ],
}


def _run(*command: str, timeout: float = 240) -> None:
    result = subprocess.run(
        command, cwd=TOP, check=False, capture_output=True, text=True, timeout=timeout
    )
    assert result.returncode == 0, f"{' '.join(command[1:4])}\n{result.stdout}\n{result.stderr}"


@pytest.mark.parametrize("tool", TOOLS)
def test_linter_finds_nothing(tool: str) -> None:
    _run(sys.executable, *TOOLS[tool])


def test_codespell_finds_nothing() -> None:
    written = [
        "zswapd",
        "tests",
        "tools",
        "scripts",
        "docs",
        "systemd",
        ".ci",
        ".github",
        "Makefile",
        "pyproject.toml",
        "setup.py",
    ]
    written += [page.name for page in TOP.glob("*.md")]
    _run(
        sys.executable, "-m", "codespell_lib", *(name for name in written if (TOP / name).exists())
    )


def test_vulture_finds_no_dead_code(tmp_path: Path) -> None:
    # Statistics are read by name, as JSON, by metrics and by people: a field that no line of code
    # names is not dead.
    fields = sorted(
        {field for path in MODULES for field in _snapshot_fields(ast.parse(path.read_text()))}
    )
    snapshots = tmp_path / "snapshots.py"
    snapshots.write_text("".join(f"_.{field}\n" for field in fields))
    _run(sys.executable, "-m", "vulture", "zswapd", "tests/vulture_whitelist.py", str(snapshots))


def _snapshot_fields(module: ast.Module) -> Iterator[str]:
    """Yield the field names of the classes that are snapshots, by their names."""
    for node in ast.walk(module):
        if isinstance(node, ast.ClassDef) and node.name.endswith(SNAPSHOTS):
            for line in node.body:
                if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name):
                    yield line.target.id


@pytest.mark.parametrize(
    "path", [*MODULES, *TOOLS_MODULES], ids=lambda path: str(path.relative_to(TOP))
)
def test_functions_are_short(path: Path) -> None:
    too_long = [
        f"{node.name}: {lines} lines"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (lines := (node.end_lineno or node.lineno) - node.lineno + 1) > MAX_FUNCTION_LINES
    ]
    assert not too_long


def _sources() -> list[Path]:
    found = [TOP / "setup.py"]
    for directory in ("zswapd", "tests", "tools"):
        found += [
            path for suffix in ("py", "c", "h") for path in (TOP / directory).rglob(f"*.{suffix}")
        ]
    for directory in ("scripts", ".ci"):
        found += [
            path for path in (TOP / directory).rglob("*") if path.is_file() and _is_script(path)
        ]
    return sorted(path for path in found if "__pycache__" not in path.parts)


def _is_script(path: Path) -> bool:
    return path.suffix in {".py", ".sh"} or path.read_bytes()[:2] == b"#!"


@pytest.mark.parametrize(
    "path",
    [path for path in _sources() if path.suffix == ".py"],
    ids=lambda path: str(path.relative_to(TOP)),
)
def test_nothing_waits_by_select(path: Path) -> None:
    """select(2) takes no descriptor above 1023, and a daemon or a long test run has more."""
    calls = [
        node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)
    ]
    assert not [
        node.lineno
        for node in calls
        if node.attr == "select" and isinstance(node.value, ast.Name) and node.value.id == "select"
    ]


@pytest.mark.parametrize("path", _sources(), ids=lambda path: str(path.relative_to(TOP)))
def test_source_names_its_licence_at_the_top(path: Path) -> None:
    top = path.read_text().splitlines()[:2]  # the second line where the first is #!
    assert any(LICENCE in line for line in top)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(TOP)))
def test_module_explains_itself(path: Path) -> None:
    text = path.read_text()
    assert re.search(r'^r?"""', text, re.MULTILINE), "no docstring says what this module is for"
    if path.name != "__init__.py":
        assert "from __future__ import annotations" in text


SHELL_SCRIPTS = [
    path
    for path in _sources()
    if path.suffix != ".py" and re.match(rb"#!.*\b(ba|da)?sh\b", path.read_bytes()[:64])
]


@pytest.mark.skipif(
    not shutil.which("shellcheck"),
    reason="shellcheck is not installed; install the package shellcheck",
)
@pytest.mark.parametrize("path", SHELL_SCRIPTS, ids=lambda path: str(path.relative_to(TOP)))
def test_shell_script_is_clean(path: Path) -> None:
    _run("shellcheck", "--severity=style", str(path), timeout=60)


def test_no_class_name_is_there_twice() -> None:
    places: dict[str, list[str]] = {}
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                places.setdefault(node.name, []).append(str(path.relative_to(TOP)))
    assert not {name: files for name, files in places.items() if len(files) > 1}


def _markdown() -> list[Path]:
    return [*sorted(TOP.glob("*.md")), *sorted((TOP / "docs").rglob("*.md"))]


def _named(path: Path) -> str:
    return str(path.relative_to(TOP))


def _too_wide(line: str) -> bool:
    return len(PRAGMA.sub("", line).expandtabs(8)) > COLUMNS


def test_no_line_of_code_is_above_100_columns() -> None:
    stubs = [path for name in ("zswapd", "tools", "tests") for path in (TOP / name).rglob("*.pyi")]
    wide = [
        f"{_named(path)}:{number}"
        for path in (*_sources(), *stubs)
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if _too_wide(line)
    ]
    assert not wide, "\n".join(wide)


def test_no_line_of_markdown_is_above_100_columns() -> None:
    """Table rows, code blocks, links that stand alone and generated pages may be wider."""
    wide = []
    for path in (page for page in _markdown() if _named(page) not in GENERATED):
        is_code = False
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if line.lstrip().startswith("```"):
                is_code = not is_code
            is_exempt = is_code or line.lstrip().startswith("|") or LINK_ALONE.match(line)
            if not is_exempt and _too_wide(line):
                wide.append(f"{_named(path)}:{number}")
    assert not wide, "\n".join(wide)


def _python_prose(text: str) -> Iterator[tuple[int, str]]:
    """Yield comments and strings with their line; neighbours of a kind are one piece."""
    first, piece, last = 0, "", ""
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        kind = tokenize.tok_name[token.type].partition("_")[0]
        if kind in {"NL", "NEWLINE", "INDENT", "DEDENT"}:
            continue
        if kind not in {"COMMENT", "STRING", "FSTRING"}:
            kind = ""
        if kind != last and last:
            yield first, piece
        if kind and kind != last:
            first, piece = token.start[0], ""
        gap = "\n" * (token.start[0] - first - piece.count("\n")) or " "
        piece = (piece + gap + token.string) if kind else ""
        last = kind
    if last:
        yield first, piece


def _prose(path: Path) -> Iterator[tuple[int, str]]:
    """Yield pieces of prose with their first line, without marks between two lines."""
    text = path.read_text()
    if path.suffix in {".py", ".pyi"}:
        for line, piece in _python_prose(text):
            joined = re.sub(r"\n\s*#", "\n", piece)
            yield line, re.sub(r"([\"'])(\n+| )[rbfRBF]*\1", r"\2", joined)
    else:
        yield 1, re.sub(r"\n[ \t]*(\*|//|>)", "\n", text)


def test_prose_names_things_and_numbers() -> None:
    """A vague word has a better one: the thing, or the number with its unit."""
    pages = [TOP / "README.md", TOP / "CONTRIBUTING.md", *(TOP / "man").iterdir()]
    pages += (TOP / "docs").rglob("*.md")
    for name in ("zswapd", "tools"):
        pages += [path for path in (TOP / name).rglob("*.py*") if path.suffix in {".py", ".pyi"}]
        pages += (TOP / name).rglob("*.[ch]")
    found = []
    for path in sorted(path for path in pages if path.exists()):
        for first, piece in _prose(path):
            text = UNIX_USER.sub("", piece)
            for word in VAGUE.finditer(text):
                line = first + text.count("\n", 0, word.start())
                found.append(f"{_named(path)}:{line}: {' '.join(word[0].split())}")
    assert not found, "\n".join(found)
