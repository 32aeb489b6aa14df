"""The pages: their examples and commands run, their links lead somewhere, and what they name is there."""

from __future__ import annotations

import json
import os
import re
import shlex
import statistics
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from conftest import ROOT, write_tensors

import weightload
from weightload import errors

GUIDE = ROOT / "weightload" / "README.md"
RESULTS = ROOT / "benchmarks" / "results"
NOTES = sorted((ROOT / "csrc" / "notes").glob("*.md"))
ROOT_PAGES = [ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "CHANGELOG", "SECURITY")]
PAGES = [*ROOT_PAGES, GUIDE, *(ROOT / name / "README.md" for name in ("benchmarks", "csrc", "tests")), *NOTES]
SOURCES = [path for kind in ("*.h", "*.cpp", "*.py", "*.sh") for path in (ROOT / "csrc").rglob(kind)]
SOURCES += [path for name in ("weightload", "benchmarks", "tests") for path in (ROOT / name).rglob("*.py")]

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def blocks(page: Path, language: str) -> list[str]:
    """The page's code in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """Return what a link to the page may have behind its #: the page's headings as GitHub writes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def run(command: list[str], folder: Path) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}{done.stderr[-4000:]}"
    return done.stdout


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the files that the examples name."""
    model = tmp_path / "path" / "to" / "model" / "transformer"
    model.mkdir(parents=True)
    tensors = [("embed.weight", "F32", [256, 8]), ("proj.weight", "F32", [8, 8]), ("proj.bias", "F32", [8])]
    for path in (model / "diffusion_pytorch_model.safetensors", tmp_path / "model.safetensors"):
        write_tensors(path, tensors)
    fusable = [("model.norm", "F32", [6]), ("rotary.inv_freq", "F32", [3])]
    fusable += [(f"attn.{part}", "F32", [rows, 6]) for part, rows in (("q", 8), ("k", 4), ("v", 4))]
    fusable += [(f"experts.{number}", "F32", [5, 6]) for number in range(2)]
    write_tensors(tmp_path / "fusable.safetensors", fusable)
    return tmp_path


@pytest.mark.parametrize("page", [ROOT / "README.md", GUIDE], ids=["README", "guide"])
def test_the_examples_run(page: Path, folder: Path) -> None:
    """In the page's order, in one process; on the CPU, where they say "cuda"."""
    examples = [text.replace('"cuda"', '"cpu"') for text in blocks(page, "python")]
    alone = [text for text in examples if text.startswith("# torchrun ")]
    assert len(examples) > len(alone)
    (folder / "page.py").write_text("".join(text for text in examples if text not in alone))
    run([sys.executable, "page.py"], folder)
    for text in alone:
        *options, name = shlex.split(text.splitlines()[0])[2:]
        (folder / name).write_text(text)
        out = run([sys.executable, "-m", "torch.distributed.run", "--standalone", *options, name], folder)
        for rank in (0, 1):
            for strategy in ("broadcast", "striped"):
                assert out.count(f"rank {rank}, {strategy}: 3 tensors") == 1


def test_the_commands_run(folder: Path) -> None:
    lines = [line for text in blocks(GUIDE, "console") for line in text.splitlines()]
    assert lines
    for line in lines:
        program, *arguments = shlex.split(line)
        assert program == "weightload"
        run([sys.executable, "-m", "weightload", *arguments], folder)


def links(page: Path) -> list[str]:
    """Return the targets of the page's links."""
    return re.findall(r"\]\(([^)]+)\)", page.read_text())


@every_page
def test_links_lead_somewhere(page: Path) -> None:
    for target in links(page):
        name, _, anchor = target.partition("#")
        there = page.parent / name if name else page
        assert there.exists(), target
        assert not anchor or anchor in anchors(there), target


@every_page
def test_what_a_page_names_is_there(page: Path) -> None:
    """Targets of make, and source files: of the root, of the page's own room, or of the package."""
    pairs = re.findall(r"^```\w*\n(.*?)^```$|`([^`\n]+)`", page.read_text(), re.DOTALL | re.MULTILINE)
    code = "\n".join(block or span for block, span in pairs)
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"^make ([a-z-]+)", code, re.MULTILINE)) <= targets
    room = page.parent if page.parent.name != "notes" else page.parent.parent
    for name in re.findall(r"(?<![\w/.-])[\w/*]+\.(?:py|sh|h|cpp)\b", code):
        if "/" in name or room not in (ROOT, GUIDE.parent):
            assert any(list(folder.glob(name)) for folder in (ROOT, room, GUIDE.parent)), name


def test_a_source_distribution_has_the_pages_and_what_they_lead_to(tmp_path: Path) -> None:
    egg, out = tmp_path / "egg", tmp_path / "dist"
    egg.mkdir()
    run([sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(egg), "sdist", "-d", str(out)], ROOT)
    (archive,) = out.iterdir()
    with tarfile.open(archive) as tar:
        there = {name.partition("/")[2] for name in tar.getnames()}
    for page in PAGES:
        folder = page.parent.relative_to(ROOT)
        for target in [page.name, *links(page)]:
            name = os.path.normpath(folder / target.partition("#")[0])
            assert name in there or name == ".", f"{page}: {target}"
    assert {"Makefile", "tests/conftest.py", "benchmarks/first_loads.py", "weightload/SETTINGS.md"} <= there


def test_the_guide_names_everything_public() -> None:
    text = GUIDE.read_text()
    for name in set(weightload.__all__) - {"__version__", "LoadStats"}:
        assert re.search(rf"\b{name}\b", text), name
    for kind in errors.WeightLoadError.__subclasses__():
        assert f"`{kind.__name__}`" in text, kind


@pytest.mark.parametrize(
    "command",
    ["report/results.py --overview compare-large compare-one-file compare-small",
     "report/results.py cpu-llama cpu-real cpu-small ranks-llama ranks-small ranks4-llama ranks4-small"],
)  # fmt: skip
def test_the_tables_are_those_of_the_results(command: str) -> None:
    script, *arguments = command.split()
    named = [text if text.startswith("--") else str(RESULTS / f"{text}.json") for text in arguments]
    made = run([sys.executable, str(RESULTS.parent / script), *named], ROOT)
    rows = [line for line in made.splitlines() if line.startswith("| ")]
    assert len(rows) > 20
    assert set(rows) <= set((RESULTS.parent / "README.md").read_text().splitlines())


def test_the_first_loads_are_those_of_the_results() -> None:
    kinds = {"mapped": ("safetensors", "weightload"), "private": ("safetensors clone", "weightload pread")}
    for cell in json.loads((RESULTS / "first-loads.json").read_text())["cells"]:
        for kind, ways in kinds.items():
            theirs, ours = (f"{statistics.median(cell['seconds'][way]):.3f} s" for way in ways)
            row = rf"\| {cell['cache']} \| {cell['memory'].split()[0]} [^|]+ \| {kind} \| {theirs} \| {ours} \|"
            assert re.search(row, (RESULTS.parent / "README.md").read_text()), row
            if cell["memory"] == "as it comes":
                assert f"| {theirs} | {ours} |" in (ROOT / "README.md").read_text()


def test_pages_that_sources_name_are_there() -> None:
    for source in SOURCES:
        for name in re.findall(r"\b(?:csrc|weightload|benchmarks|tests)/[\w/]*\.md\b", source.read_text()):
            assert (ROOT / name).exists(), f"{source}: {name}"


def test_front_pages_stay_short() -> None:
    for name in ("README.md", "csrc/README.md"):
        assert len((ROOT / name).read_text().splitlines()) <= 120, name
    assert {path.name for path in NOTES} == set(
        re.findall(r"\]\(notes/(\w+\.md)\)", (ROOT / "csrc" / "README.md").read_text())
    )
