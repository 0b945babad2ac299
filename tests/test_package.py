"""The package as a whole: what it needs to import, which way its imports face, and that README and CI agree."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import EXTRAS

import convlora

ROOT = Path(convlora.__file__).parent
PROJECT = ROOT.parent

# Each storey may use only those above it in this list; inside a folder, each file only files above it.
STOREYS: dict[str, list[str]] = {
    "_version": [],
    "errors": [],
    "_layer": [
        "compiler",
        "functional",
        "lowrank",
        "paths",
        "kept",
        "swap",
        "gate",
        "masked",
        "masters",
        "places",
        "writes",
        "computed",
        "dora",
        "depthwise",
        "convolution",
        "fast",
        "change",
        "mix",
        "routing",
        "routed",
        "adapted",
    ],
    "_methods": ["lora", "dense", "padded", "hira", "hra", "ia3", "loha", "lokr", "oft", "registry"],
    "_plan": [],
    "_model": [
        "targets",
        "options",
        "checks",
        "norms",
        "mixing",
        "state",
        "written",
        "keys",
        "observe",
        "heads",
        "memory",
        "budget",
        "choice",
        "planner",
        "init_data",
        "init",
        "remove",
        "watch",
        "inject",
        "adapters",
        "hotswap",
        "use",
        "integrity",
        "merge",
        "summary",
    ],
    "_checkpoint": [
        "atomic",
        "files",
        "likeness",
        "stored",
        "multiplied",
        "peft_methods",
        "peft_format",
        "manifest",
        "digests",
        "fitting",
        "contents",
        "markdown",
        "card",
        "hub",
        "saving",
        "push",
        "rebuilt",
        "peft_reader",
        "lycoris",
        "diffusers",
        "exporting",
        "foreign",
        "loading",
        "swapping",
    ],
    "_algebra": ["approximation", "shrink", "extract", "methods", "combine"],
    "_peft_layer": [],
    "peft": [],
    "lightning": [],
    "transformers": [],
    "ultralytics": [],
    "_public": [],
    "command": [
        "measuring",
        "answers",
        "options",
        "weights",
        "models",
        "files",
        "planning",
        "inspecting",
        "differing",
        "changing",
        "benching",
        "app",
        "__main__",
    ],
    "__init__": [],
}


def imports_of(path: Path, level: int) -> set[str]:
    """Names of the files and folders that a file imports from: at level 1 beside it, at level 2 one folder up."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level == level:
            found |= {node.module.split(".")[0]} if node.module else {alias.name for alias in node.names}
    return found


def test_imports_face_one_way():
    names = list(STOREYS)
    assert {path.stem for path in ROOT.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()} == set(
        names
    )
    for storey, name in enumerate(names):
        files = sorted((ROOT / name).glob("*.py"))
        found = set().union(*(imports_of(path, 2) for path in files)) if files else imports_of(ROOT / f"{name}.py", 1)
        assert found <= set(names[:storey]), name


@pytest.mark.parametrize("folder", [name for name, files in STOREYS.items() if files])
def test_imports_inside_a_folder_face_one_way(folder):
    files = STOREYS[folder]
    assert {path.stem for path in (ROOT / folder).glob("*.py")} == {*files, "__init__"}
    for storey, name in enumerate(files):
        # main() of the command imports when it is run
        assert imports_of(ROOT / folder / f"{name}.py", 1) <= {*files[:storey], "main"}, name
    assert imports_of(ROOT / folder / "__init__.py", 1) <= {"app"}


def test_core_imports_and_injects_with_torch_and_safetensors_alone():
    """Not even numpy, which safetensors asks for when it writes."""
    script = """
import sys
others = "numpy timm torchvision peft lightning transformers huggingface_hub yaml h5py rich typer matplotlib scipy"
for name in others.split():
    sys.modules[name] = None
import warnings; warnings.simplefilter("ignore")
import torch, convlora
model = convlora.inject(torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3)), 2)
model(torch.randn(1, 3, 5, 5)).sum().backward()
convlora.remove(convlora.merge(model))
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_import_brings_no_compiler():
    """torch._dynamo takes as long as torch itself."""
    script = "import sys, torch; before = 'torch._dynamo' in sys.modules; import convlora, convlora.command; "
    script += "assert before or 'torch._dynamo' not in sys.modules; assert 'typer' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_public_names_are_those_of_the_docs():
    assert sorted(convlora.__all__) == convlora.__all__
    assert all(getattr(convlora, name).__doc__ for name in convlora.__all__)


def test_typed_marker_is_there():
    assert (ROOT / "py.typed").is_file()


def test_ci_runs_exactly_the_test_command_of_the_readme():
    blocks = re.findall(r"```bash\n(.*?)```", (PROJECT / "README.md").read_text(encoding="utf-8"), re.S)
    assert "examples.histopathology" in blocks[0] and "pytest" in blocks[1]
    ci = (PROJECT / ".ci" / "run").read_text(encoding="utf-8")
    assert "README.md" in ci  # it reads the block from there, so that the two cannot disagree
    assert "pytest --run-all --durations=20" in ci


def test_the_extra_that_a_skipped_test_names_is_one_of_the_packages():
    extras = re.search(r"\[project\.optional-dependencies\]\n(.*?)\n\[", (PROJECT / "pyproject.toml").read_text(), re.S)
    names = set(re.findall(r"^([\w-]+) = \[", extras[1], re.M))
    assert {"test", "test-all"} <= names and set(EXTRAS.values()) <= names
