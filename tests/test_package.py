"""The package as a whole: what it needs to import, which way its rooms face, and that README and CI agree."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import convlora

ROOT = Path(convlora.__file__).parent
PROJECT = ROOT.parent

# Each room may use only rooms above it in this list.
FLOORS = [
    "_version",
    "errors",
    "_files",
    "_compiler",
    "_functional",
    "_lowrank",
    "_swap",
    "_computed",
    "_dora",
    "_depthwise",
    "_convolution",
    "_paths",
    "_fast",
    "_places",
    "_routing",
    "_routed",
    "_kept",
    "_layer",
    "_plan",
    "_norms",
    "_state",
    "_targets",
    "_checks",
    "_observe",
    "_budget",
    "_planner",
    "_init",
    "_inject",
    "_adapters",
    "_use",
    "_merge",
    "_peft_format",
    "_manifest",
    "_card",
    "_hub",
    "_algebra",
    "_combine",
    "_rebuilt",
    "_peft_reader",
    "_locon",
    "_foreign",
    "_checkpoint",
    "_push",
    "_peft_layer",
    "peft",
    "lightning",
    "transformers",
    "command",
    "__init__",
]
# The same inside convlora/command, a room of rooms that sees all of the library.
COMMAND_FLOORS = [
    "__init__",
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
]


def imports_of(path: Path, level: int = 1) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level == level:
            found |= {node.module} if node.module else {alias.name for alias in node.names}
    return found


def test_imports_face_one_way():
    assert {path.stem for path in ROOT.glob("*.py")} == set(FLOORS) - {"command"}
    for floor, name in enumerate(FLOORS):
        inner = sorted((ROOT / name).glob("*.py"))
        found = (
            set().union(*(imports_of(path, level=2) for path in inner)) if inner else imports_of(ROOT / f"{name}.py")
        )
        assert found <= set(FLOORS[:floor]), name


def test_imports_inside_the_command_face_one_way():
    command = ROOT / "command"
    assert {path.stem for path in command.glob("*.py")} == set(COMMAND_FLOORS)
    for floor, name in enumerate(COMMAND_FLOORS):
        inner = imports_of(command / f"{name}.py")
        allowed = {"app"} if name == "__init__" else {*COMMAND_FLOORS[:floor], "main"}  # main() imports when it is run
        assert inner <= allowed, name


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
