"""README and docs: every Python snippet runs, shell commands exist, links lead somewhere, the site builds strictly.

The ```` ```python ```` blocks of a page run in order, in one namespace, in a folder of their own. Two comments steer:

- ``<!-- setup``, lines of Python, ``-->``: run at that place and not shown, to give a snippet its data or to check its
  result. In a tutorial, which readers follow as it stands, what it names does not reach the page's own blocks;
- ``<!-- skip: reason -->``: the next block is not run. ``SKIPPED`` below lists all of them.

Weights cannot be downloaded here: ``timm.create_model(name, pretrained=True)`` gives the same random ones each time.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.machinery
import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
import torch
from conftest import EXTRAS, need
from hub_stand_in import WRITE, serving
from test_hub import point_to

import convlora
from convlora._methods.registry import METHODS

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(convlora.__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
NAMES = [page.relative_to(ROOT).as_posix() for page in PAGES]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
SKIPPED: dict[str, str] = {}
"""Page and reason of every snippet that is not run."""

_PIECE = re.compile(
    r"^<!-- setup\n(?P<setup>.*?)^-->$"
    r"|^<!-- skip: (?P<reason>.*?) -->$"
    r"|^(?P<indent> *)```(?P<language>\w*)[^\n]*\n(?P<body>.*?)^(?P=indent)```$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    """A fenced block or a hidden set-up, with the line of the page that its code begins in."""

    language: str
    code: str
    line: int
    skipped: str | None = None
    hidden: bool = False


def blocks_of(text: str) -> Iterator[Block]:
    reason = None
    for match in _PIECE.finditer(text):
        kind = "setup" if match["setup"] is not None else "body"
        if match["reason"] is not None:
            reason = match["reason"]
            continue
        line = text.count("\n", 0, match.start(kind)) + 1
        language = "python" if kind == "setup" else match["language"]
        hidden = kind == "setup"
        yield Block(language, dedent(match[kind]), line, None if hidden else reason, hidden)
        reason = reason if kind == "setup" else None


def blocks(page: Path, language: str) -> list[Block]:
    return [block for block in blocks_of(page.read_text(encoding="utf-8")) if block.language == language]


def run_page(page: Path) -> int:
    """Run the page's snippets; an error's traceback shows the line of the page."""
    namespace: dict[str, Any] = {"__name__": "page"}
    literal = page.parent.name == "tutorials"  # followed as it stands: a hidden block sees all and gives nothing
    ran = 0
    for block in blocks(page, "python"):
        if block.skipped is None:
            seen = dict(namespace) if block.hidden and literal else namespace
            exec(compile("\n" * (block.line - 1) + block.code, str(page), "exec"), seen)
            ran += 1
    return ran


@pytest.fixture
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A folder of its own, one seed, no downloads, and a stand-in of the hub."""
    need("timm")
    import timm

    need("huggingface_hub.hf_api")
    create = timm.create_model

    def create_model(name: str, pretrained: bool = False, **options: Any) -> torch.nn.Module:
        if not pretrained:
            return create(name, **options)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return create(name, **options)

    monkeypatch.setattr(timm, "create_model", create_model)
    monkeypatch.chdir(tmp_path)
    methods = dict(METHODS)  # a page may register one of its own
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # for very small images, where a second thread waits more than it works
    torch.manual_seed(0)
    with serving() as hub:
        point_to(monkeypatch, hub.url, tmp_path / "cache")
        monkeypatch.setenv("HF_TOKEN", WRITE)
        yield
    torch.set_num_threads(threads)
    METHODS.clear()
    METHODS.update(methods)


WITH_PYTHON = [name for name, page in zip(NAMES, PAGES, strict=True) if blocks(page, "python")]


CORE = {"convlora", "examples", "torch", "safetensors"}
"""What a page may import besides the packages of the extras and Python's own."""


def packages_of(page: Path) -> set[str]:
    """The packages outside of Python's own that the snippets import, or need though they do not name them."""
    code = "\n".join(block.code for block in blocks(page, "python") if block.skipped is None)
    found = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    own = {name.split(".")[1] for name in found if name.startswith("convlora.")}  # convlora.peft needs peft
    own |= set(re.findall(r"convlora\.(\w+)\.", code))
    needed = {"onnxscript"} if "torch.onnx" in code else set()
    return {name.split(".")[0] for name in found} - sys.stdlib_module_names | (own & {*EXTRAS}) | needed


@cache
def what_pages_run_with() -> str:
    """A digest of all that a page's snippets depend on besides the page: the library, this folder, torch."""
    files = sorted(file for folder in ("convlora", "tests") for file in (ROOT / folder).rglob("*.py"))
    return hashlib.sha256(b"\0".join([torch.__version__.encode(), *(file.read_bytes() for file in files)])).hexdigest()


@pytest.fixture
def passed(name: str, request: pytest.FixtureRequest) -> Callable[[], None]:
    """To be called when the page has passed: it runs again only when it, or what it runs with, has changed."""
    key, memory = f"convlora/pages/{name}", getattr(request.config, "cache", None)
    now = hashlib.sha256((ROOT / name).read_bytes() + what_pages_run_with().encode()).hexdigest()
    if memory and not request.config.getoption("--run-all") and memory.get(key, None) == now:
        pytest.skip("page and library are as when it last passed; --run-all runs it again")
    return lambda: memory.set(key, now) if memory else None


@pytest.mark.parametrize("name", WITH_PYTHON)
def test_every_snippet_of_a_page_runs(name: str, passed: Callable[[], None], alone: None):
    for package in packages_of(ROOT / name):
        need(package)
    assert run_page(ROOT / name) > 0
    passed()


@pytest.mark.parametrize("name", WITH_PYTHON)
def test_an_extra_brings_every_package_that_a_page_imports(name: str):
    assert packages_of(ROOT / name) <= {*EXTRAS, *CORE}


def test_skipped_snippets_are_those_listed():
    skipped = {n: b.skipped for n, page in zip(NAMES, PAGES, strict=True) for b in blocks(page, "python") if b.skipped}
    assert skipped == SKIPPED


def test_every_python_block_is_found():
    """None is missed because of how it is fenced: as many as there are fences."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        shown = blocks_of(re.sub(r"^<!-- setup\n.*?^-->$", "", text, flags=re.MULTILINE | re.DOTALL))
        fences = len(re.findall(r"```\s*(?:python|py)\b", text))
        assert sum(block.language == "python" for block in shown) == fences, page


def test_a_snippet_that_fails_is_an_error_at_its_line(tmp_path: Path):
    page = tmp_path / "page.md"
    page.write_text("# A\n\n<!-- setup\nx = 1\n-->\n\ntext\n\n```python\ny = x\nassert y == 2\n```\n", encoding="utf-8")
    with pytest.raises(AssertionError) as caught:
        run_page(page)
    assert caught.traceback[-1].lineno + 1 == 11


def commands() -> list[tuple[str, str]]:
    """Every line of every shell block, its continuation joined and its comment cut."""
    lines = []
    for name, page in zip(NAMES, PAGES, strict=True):
        for block in blocks(page, "bash"):
            joined = block.code.replace("\\\n", " ")
            lines += [(name, line.partition(" #")[0].strip()) for line in joined.splitlines() if line.strip()]
    return [(name, part.strip()) for name, line in lines for part in line.split("&&")]


TOOLS = {"accelerate", "curl", "hf", "mkdocs", "mypy", "ruff", *PROJECT.get("scripts", {})}


@pytest.mark.parametrize(("name", "command"), commands())
def test_shell_commands_exist(name: str, command: str):
    words = command.split()
    if words[0] == "accelerate":
        words = words[words.index("-m") - 1 :]
        words[0] = "python"
    if words[0] != "python":
        assert words[0] in TOOLS
        return
    if words[1].endswith(".py"):
        assert (ROOT / words[1]).is_file()
        return
    assert words[1] == "-m"
    find = importlib.util.find_spec
    if words[2] == "pip":  # asked for by the usual way, setuptools would leave its distutils out for all tests after
        find = importlib.machinery.PathFinder.find_spec
    assert find(words[2]), words[2]
    for extras in re.findall(r'"(?:\.|convlora)\[([\w,]+)\]"', command):
        assert set(extras.split(",")) <= PROJECT["optional-dependencies"].keys()


@pytest.mark.parametrize("page", ["torch.md", "threat-model.md", "reliability.md"])
def test_tests_that_a_page_names_exist(page: str):
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    rows = [row for row in text.splitlines() if row.startswith("|") and "✓" in row]
    assert page != "torch.md" or (rows and all("<!-- tests/" in row for row in rows))
    missing = []
    file = ""
    for named, test in re.findall(r"(?:tests/)?((?:example/)?test_\w+\.py)?::([^`;|]+?)(?=`|;| -->)", text):
        file = named or file  # a name without a file is of the one before it
        source = (ROOT / "tests" / file).read_text(encoding="utf-8")
        if f"def {test.split('[')[0]}(" not in source and f'"{test}"' not in source:
            missing.append(f"{file}::{test}")
    assert file and not missing


@pytest.mark.parametrize("name", NAMES)
def test_links_to_files_lead_to_files(name: str):
    """mkdocs checks those among the pages of docs, anchors too; this checks README's and the pictures."""
    page = ROOT / name
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not target.startswith(("http://", "https://", "#")):
            assert (page.parent / target.partition("#")[0]).exists(), target


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built strictly: a broken link, a missing page or an unknown name in the reference is an error."""
    need("mkdocstrings")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_the_site_has_every_public_name(site: Path):
    pages = "".join(page.read_text(encoding="utf-8") for page in (site / "reference").rglob("*.html"))
    missing = [name for name in convlora.__all__ if not re.search(rf'id="convlora\.(?:errors\.)?{name}"', pages)]
    assert not missing


def test_long_signatures_are_broken_over_lines(site: Path):
    text = re.sub(r"<[^>]+>", "", (site / "reference" / "inject" / "index.html").read_text(encoding="utf-8"))
    assert re.search(r"\binject\(\n\s+model: ", text)


@pytest.mark.parametrize("name", ["r=8", "print_trainable_parameters", "merge_and_unload"])
def test_a_search_for_a_name_of_pefts_finds_the_table_of_names(site: Path, name: str):
    index = json.loads((site / "search" / "search_index.json").read_text(encoding="utf-8"))
    separator = index["config"]["separator"]
    found = next(page for page in index["docs"] if page["location"] == "peft/#names-from-peft")
    assert name in re.split(separator, re.sub(r"<[^>]+>", " ", found["text"]))


def test_the_site_asks_no_other_host(site: Path):
    """What a browser fetches by itself: scripts, styles, pictures, fonts, frames."""
    for file in site.rglob("*.html"):
        text = file.read_text(encoding="utf-8")
        fetched = re.findall(r"<(?:script|img|iframe|source)[^>]*\ssrc=[\"']?(?:https?:)?//[^\s\"'>]+", text)
        fetched += re.findall(
            r"<link[^>]*rel=[\"']?(?:stylesheet|preconnect|preload|icon)[^>]*href=[\"']?(?:https?:)?//[^\s>]+", text
        )
        assert not fetched, file
    for file in site.rglob("*.css"):
        assert not re.findall(r"(?:url\(|@import )[\"']?(?:https?:)?//", file.read_text(encoding="utf-8")), file


def test_no_markup_of_docstrings_is_left_in_the_reference(site: Path):
    for file in (site / "reference").rglob("*.html"):
        text = file.read_text(encoding="utf-8")
        assert ":func:" not in text and "&gt;&gt;&gt;" not in text, file
