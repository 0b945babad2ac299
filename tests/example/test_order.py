"""Imports of the example face one way: each folder uses those above it, and in a folder each file those above it."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2] / "examples" / "histopathology"

FOLDERS: dict[str, list[str]] = {
    "errors": [],
    "files": [],
    "data": [
        "stored",
        "layout",
        "pictures",
        "rgb",
        "stain",
        "rows",
        "indexing",
        "challenge",
        "packed",
        "pcam",
        "wholeslide",
        "tiles",
        "wilds",
        "dataset",
        "packing",
    ],
    "making": ["writing", "nuclei", "hospitals", "tissue", "synthetic", "slides"],
    "methods": ["method", "catalogue", "ablation"],
    "augment": ["draws", "resampling", "colour", "hed", "transforms"],
    "training": [
        "processes",
        "backbones",
        "loading",
        "checkpoints",
        "memory",
        "progress",
        "trackers",
        "logs",
        "recipe",
        "features",
        "prediction",
        "verify",
    ],
    "runs": [
        "configuration",
        "content",
        "leakage",
        "rates",
        "scores",
        "clinical",
        "shards",
        "experiment",
        "sending",
        "comparison",
    ],
    "predicting": ["outlines", "slidemap", "heatmap", "exporting"],
    "report": ["figures", "charts", "costs", "explain", "exhibits", "published", "outputs", "inspection", "sheet"],
    "minimal": [],
    "__main__": [],
    "__init__": [],
}


def imports_of(path: Path) -> set[tuple[str, ...]]:
    """What a file imports of the example, as (folder or file, file): relative to it, or by the full name."""
    package = path.parent.relative_to(ROOT.parents[1]).parts
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            before = package[: len(package) - node.level + 1] if node.level else ()
            whole = (*before, *(node.module.split(".") if node.module else ()))
            if whole[:2] == ("examples", "histopathology"):
                inside = whole[2:]
                names = {inside} if len(inside) > 1 or (inside and not FOLDERS.get(inside[0])) else set()
                found |= names or {(*inside, alias.name) for alias in node.names}
    return found


def test_imports_between_folders_face_one_way():
    names = list(FOLDERS)
    here = {path.stem for path in ROOT.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    assert here == set(names)
    for place, name in enumerate(names):
        files = sorted((ROOT / name).glob("*.py")) or [ROOT / f"{name}.py"]
        used = {first for path in files for first, *_ in imports_of(path)}
        assert used <= {*names[:place], *([name] if FOLDERS[name] else [])}, name


@pytest.mark.parametrize("folder", [name for name, files in FOLDERS.items() if files])
def test_imports_inside_a_folder_face_one_way(folder):
    files = FOLDERS[folder]
    assert {path.stem for path in (ROOT / folder).glob("*.py")} == {*files, "__init__"}
    assert not imports_of(ROOT / folder / "__init__.py")
    for place, name in enumerate(files):
        used = {rest[0] for first, *rest in imports_of(ROOT / folder / f"{name}.py") if first == folder}
        assert used <= set(files[:place]), name


def test_imports_are_read_whichever_way_they_are_written():
    path = ROOT / "runs" / "comparison.py"
    assert {("errors",), ("runs", "rates"), ("data", "dataset"), ("training", "recipe")} <= imports_of(path)
    assert ("making", "synthetic") in imports_of(ROOT / "minimal.py")
    assert ("report", "charts") in imports_of(ROOT / "report" / "outputs.py")
