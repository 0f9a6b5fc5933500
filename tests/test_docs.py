"""What the documents say is there: links, functions, options and code."""

import ast
import contextlib
import importlib
import importlib.util
import io
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import tyro
from PIL import Image

from fastgan.bench.__main__ import BenchConfig
from fastgan.errors import FastganError
from fastgan.sample import Options
from fastgan.train.config import TrainConfig, parse

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
LINK = re.compile(r"\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")
OPTIONS_OF_OTHERS = {"--no-build-isolation", "--logdir", "--nproc-per-node", "--benchmark-only", "--benchmark-columns"}

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def links(page: Path) -> list[tuple[str, str]]:
    """(text, target) of each link and image to something in the repository."""
    found = LINK.findall(FENCE.sub("", page.read_text(encoding="utf-8")))
    return [(text, target) for text, target in found if not target.startswith(("http://", "https://"))]


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text(encoding="utf-8")), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def defined(path: Path) -> set[str]:
    """Functions, classes, methods (`Class.method`) and names of a module's top level."""
    names = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{item.name}" for item in node.body if isinstance(item, ast.FunctionDef)}
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return names


def code(page: Path) -> list[str]:
    """The pieces of a page in code type: lines of shell blocks, and what stands between backticks."""
    text = page.read_text(encoding="utf-8")
    blocks = [line for language, block in FENCE.findall(text) if language == "sh" for line in block.splitlines()]
    return [*blocks, *re.findall(r"`([^`\n]+)`", FENCE.sub("", text))]


def commands(page: Path) -> list[list[str]]:
    """Arguments of each `python -m fastgan.X ...`, first X."""
    pieces = (part for piece in code(page) for part in re.split(r"&&|;", piece))
    found = (re.match(r"\s*python -m fastgan\.(\w+)\s*(.*)", part) for part in pieces)
    return [[match[1], *shlex.split(match[2])] for match in found if match]


def options_of(command: type) -> set[str]:
    text = io.StringIO()
    with contextlib.redirect_stdout(text), pytest.raises(SystemExit):
        tyro.cli(command, args=["--help"])
    return set(re.findall(r"--[a-z0-9][a-z0-9-]*", text.getvalue()))


KNOWN_OPTIONS = options_of(TrainConfig) | options_of(Options) | options_of(BenchConfig)


def accept(command: str, arguments: list[str]) -> None:
    """Parse as the command would; raises SystemExit or FastganError for what it would reject."""
    if command == "sample":
        tyro.cli(Options, args=arguments)
    elif command == "bench":
        tyro.cli(BenchConfig, args=arguments)
    elif "--resume" in arguments:  # looks into a run folder that does not exist here
        tyro.cli(TrainConfig, args=arguments)
    else:
        parse(arguments).check()


@every_page
def test_every_link_leads_somewhere(page):
    broken = []
    for _, target in links(page):
        path, _, anchor = target.partition("#")
        place = (page.parent / path).resolve() if path else page
        if not place.exists() or (anchor and anchor not in anchors(place)):
            broken.append(target)
    assert not broken


@every_page
def test_every_linked_function_is_in_its_file(page):
    named = [(text.strip("`"), target) for text, target in links(page) if re.fullmatch(r"`[\w.]+`", text)]
    missing = [(name, target) for name, target in named if name not in defined((page.parent / target).resolve())]
    assert not missing
    if page.name == "how-gans-work.md":
        assert len(named) > 30  # the pattern above still finds them


def test_every_name_beside_a_module_can_be_imported_from_it():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| \[fastgan/(\w+)(?:\.py)?\]\([^)]*\) \| (.*) \|$", text, re.M)
    named = [(module, name) for module, cell in rows for name in re.findall(r"`(\w+)`", cell)]
    assert len(named) > 10  # the pattern above still finds them
    assert [pair for pair in named if not hasattr(importlib.import_module(f"fastgan.{pair[0]}"), pair[1])] == []


@every_page
def test_every_command_is_accepted(page):
    for command, *arguments in commands(page):
        assert importlib.util.find_spec(f"fastgan.{command}"), command
        if arguments and "--help" not in arguments:
            accept(command, arguments)


@every_page
def test_every_option_named_alone_is_accepted(page):
    for piece in code(page):
        if re.match(r"--[\w-]+ ", piece):
            assert any(accepted(command, shlex.split(piece)) for command in ("train", "sample")), piece
        unknown = set(re.findall(r"(?<!\S)--[a-z0-9-]+", piece)) - KNOWN_OPTIONS - OPTIONS_OF_OTHERS
        assert not unknown, piece


def accepted(command: str, arguments: list[str]) -> bool:
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            accept(command, ["run", *arguments] if command == "sample" else arguments)
    except (SystemExit, FastganError):
        return False
    return True


def test_the_checks_above_can_fail():
    assert not accepted("train", ["--loss", "vanilla"])
    assert not accepted("train", ["--image-size", "100"])
    assert not accepted("sample", ["--format", "tiff"])
    assert "GanStep._descend" in defined(ROOT / "fastgan/step.py")
    assert "GanStep._climb" not in defined(ROOT / "fastgan/step.py")
    assert "a-healthy-run" in anchors(ROOT / "docs/how-gans-work.md")


SHRINK = (("range(10_000)", "range(2)"), ("kimg=2000", "kimg=0.008, batch_size=8, g_channels=2, d_channels=2"))


def python_blocks() -> list[str]:
    text = "\n".join(page.read_text(encoding="utf-8") for page in ROOT.glob("README*.md"))
    return [block for language, block in FENCE.findall(text) if language == "python"]


@pytest.fixture
def newcomer(tmp_path, monkeypatch):
    """A folder with what the README's examples take for granted: photos."""
    photos = tmp_path / "my_photos"
    photos.mkdir()
    random = np.random.default_rng(0)
    for index in range(20):
        Image.fromarray(random.integers(0, 256, (40, 48, 3), np.uint8)).save(photos / f"{index}.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FASTGAN_CACHE", str(tmp_path / "cache"))


def test_python_examples_run(newcomer):
    blocks = python_blocks()
    text = "\n".join(blocks)
    assert all(before in text for before, _ in SHRINK)
    for block in blocks:
        for before, after in SHRINK:
            block = block.replace(before, after)
        exec(compile(block, "README", "exec"), {"__name__": "example"})


def test_plots_are_drawn_from_the_committed_data(tmp_path):
    spec = importlib.util.spec_from_file_location("plots", ROOT / "docs/plots.py")
    plots = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(plots)
    said = []
    names = {path.name for path in plots.main(tmp_path, said.append)}
    assert names == {path.name for path in (ROOT / "docs/images").glob("*.png")} - {"digits.png"}
    text = (ROOT / "docs/how-gans-work.md").read_text(encoding="utf-8")
    for line in said:
        assert f"**{line.rsplit(' ', 1)[1]}**" in text  # the variety of each run's samples
