"""A coverage-guided fuzzer for everything that reads a stranger's file: adapters of three kinds, data sets of three.

    pip install atheris
    python -m tests.fuzz --minutes 30 --work fuzzing

An input is refused with one of the readers' own errors, or read; anything else is a finding: another exception, a
model that is not as it was, a crash, more than 20 seconds, more than 3 GiB. libFuzzer mutates bytes; beside it JSON
inside the files is mutated as JSON, so that what lies behind the first check is reached. At the end the corpus is run
once more without instrumentation, and the lines of the readers that it reaches are counted. ``--replay FOLDER`` does
that alone, and ``--choose FOLDER`` copies a small part of the corpus that reaches the same lines.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib
import io
import json
import random
import re
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from types import CodeType, FrameType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import load, load_file, save
from torch import Tensor, nn

if TYPE_CHECKING:
    import h5py

ROOT = Path(__file__).resolve().parents[1]
OWN, PEFT, LOCON, CHALLENGE, PCAM, WILDS = range(6)
READERS = [
    *(f"convlora._checkpoint.{name}" for name in ("files", "manifest", "digests", "fitting")),
    "convlora._model.keys",
    *(f"convlora._checkpoint.{name}" for name in ("foreign", "peft_methods", "peft_reader", "lycoris", "rebuilt")),
    *(f"examples.histopathology.data.{name}" for name in ("stored", "layout", "challenge", "pcam", "wilds", "rows")),
]
TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
Json = Any


class Net(nn.Module):
    """What adapters are loaded into: a stem, a grouped layer, a norm, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.bn = nn.BatchNorm2d(4)
        self.mid = nn.Conv2d(4, 4, 3, padding=1, groups=2)
        self.fc = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(N, 2)``."""
        y: Tensor = self.fc(self.mid(self.bn(self.stem(x)).relu()).mean((2, 3)))
        return y


def make_net() -> Net:
    """The same one in every process."""
    torch.manual_seed(0)
    return Net().eval()


def state(model: nn.Module) -> str:
    """All that a load must not change, as one digest."""
    parts = [
        f"{name} {type(module)} {module.training} {sorted(vars(module))}" for name, module in model.named_modules()
    ]
    parts += [f"{key} {tensor.dtype} {tensor.tolist()}" for key, tensor in model.state_dict().items()]
    parts += [f"{name} {parameter.requires_grad}" for name, parameter in model.named_parameters()]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


class ModelChanged(Exception):
    """A refused or removed adapter has left something behind."""


class Target:
    """Gives one input to the reader that its first byte names, in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        from PIL import Image

        self.folder = folder
        self.model = make_net()
        self.before = state(self.model)
        patient = folder / "patches" / "patient_004_node_4"
        patient.mkdir(parents=True, exist_ok=True)
        for y in (2, 3):
            Image.new("RGB", (96, 96)).save(patient / f"patch_patient_004_node_4_x_1_y_{y}.png")

    def __call__(self, data: bytes) -> str:
        """ "read" or "refused"; raises whatever is a finding."""
        kind, payload = (data[0] if data else 0) % 6, data[1:]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return self._adapter(kind, payload) if kind <= LOCON else self._data(kind, payload)

    def _adapter(self, kind: int, payload: bytes) -> str:
        import convlora

        directory = self.folder / str(kind)
        directory.mkdir(exist_ok=True)
        if kind == PEFT:
            length = int.from_bytes(payload[:4], "little")
            (directory / CONFIG).write_bytes(payload[4 : 4 + length])
            payload = payload[4 + length :]
        file = directory / ("x.safetensors" if kind == LOCON else TENSORS)
        file.write_bytes(payload)
        outcome = "refused"
        try:
            convlora.load_adapter(self.model, directory if kind != LOCON else file)
            outcome = "read"
            with torch.no_grad():
                self.model(torch.ones(1, 3, 5, 5))
            str(convlora.summary(self.model))
            convlora.remove(self.model)
        except convlora.ConvLoraError:
            pass
        except Exception:
            self.model = make_net()
            raise
        if state(self.model) != self.before:
            self.model = make_net()
            raise ModelChanged(outcome)
        return outcome

    def _data(self, kind: int, payload: bytes) -> str:
        from examples.histopathology.data import challenge, pcam, wilds
        from examples.histopathology.errors import ExampleError

        file = self.folder / ("metadata.csv" if kind == WILDS else f"{kind}.h5")
        file.write_bytes(payload)
        try:
            rows: Any = None
            if kind == WILDS:
                for split in wilds.find(self.folder):
                    rows = wilds.WildsRows(file, split, 8)
            else:
                pcam.is_pcam(file)
                rows = challenge.ChallengeRows(file, 8) if kind == CHALLENGE else pcam.PcamRows(file, 8)
            if rows is None:
                return "refused"
            out = np.empty((3, 96, 96), np.float32)
            for index in range(min(len(rows.ids), 4)):
                rows.name(index)
                rows.read(index, out)
            if kind != WILDS:
                rows._handle._file.close()
        except ExampleError:
            return "refused"
        return "read"


# -- seeds -----------------------------------------------------------------------------------------------------


def seeds() -> list[bytes]:
    """A small whole file of each kind."""
    import convlora
    from convlora._checkpoint.peft_methods import type_of
    from convlora._methods.registry import METHODS

    found = []
    options: Json
    usual: list[Json] = [{"norm": "track"}, {"init": "pissa"}, {"use_dora": True}, {"use_rslora": True}]
    methods = [{"method": name, "method_pattern": {"*": name}} for name in METHODS if name not in ("lora", "anchored")]
    for options in [*usual, *methods]:
        model = convlora.inject(make_net(), 2 if "method" in options else 1, **options)
        with torch.no_grad():
            for parameter in convlora.trainable_parameters(model):
                parameter.add_(0.01)
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            convlora.save_adapter(model, folder)
            found.append(bytes([OWN]) + Path(folder, TENSORS).read_bytes())
            config = json.loads(Path(folder, CONFIG).read_text())
            tensors = load_file(Path(folder, TENSORS))
            kind = type_of(convlora.summary(model))
        is_lora = kind == "LORA"
        if not kind:
            continue  # a method that peft has not
        if is_lora:
            config |= {"peft_type": "CONVLORA", "alpha_pattern": {"mid": 3}}
            text = json.dumps(config).encode()
            found.append(bytes([PEFT]) + len(text).to_bytes(4, "little") + text + save(tensors))
        config |= {"peft_type": kind, "modules_to_save": ["fc"]}
        config |= {"bias": "all"} if is_lora else {}
        stock = {key: tensor for key, tensor in tensors.items() if ".mid." not in key and ".bn." not in key}
        text = json.dumps(config).encode()
        found.append(bytes([PEFT]) + len(text).to_bytes(4, "little") + text + save(stock))
    one = torch.ones(1)
    plain = {
        "lora_unet_stem.lora_down.weight": torch.ones(2, 3, 3, 3),
        "lora_unet_stem.lora_up.weight": torch.ones(4, 2, 1, 1),
    }
    tucker = {
        "lycoris_stem.lora_down.weight": torch.ones(2, 3, 1, 1),
        "lycoris_stem.lora_mid.weight": torch.ones(2, 2, 3, 3),
        "lycoris_stem.lora_up.weight": torch.ones(4, 2, 1, 1),
        "lycoris_stem.alpha": one,
    }
    mixed = {
        **{f"lycoris_stem.hada_w{i}_a": torch.ones(4, 2) for i in (1, 2)},
        **{f"lycoris_stem.hada_w{i}_b": torch.ones(2, 27) for i in (1, 2)},
        **{"lycoris_mid.diff": torch.ones(4, 2, 3, 3), "lycoris_mid.diff_b": torch.ones(4)},
        **{"lycoris_fc.lokr_w1": torch.ones(1, 2), "lycoris_fc.lokr_w2_a": torch.ones(2, 1)},
        **{"lycoris_fc.lokr_w2_b": torch.ones(1, 2), "lycoris_fc.dora_scale": torch.ones(2, 1)},
    }
    found += [bytes([LOCON]) + save(tensors) for tensors in (plain, tucker, mixed)]
    found += [bytes([CHALLENGE]) + hdf5(_challenge), bytes([PCAM]) + hdf5(_pcam)]
    found.append(
        bytes([WILDS])
        + b",patient,node,x_coord,y_coord,tumor,slide,center,split\n0,004,4,1,2,1,0,0,0\n1,004,4,1,3,0,0,1,0\n"
    )
    return found


def hdf5(fill: Callable[[h5py.File], None]) -> bytes:
    import h5py

    """The bytes of an HDF5 file."""
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        fill(file)
    return buffer.getvalue()


def _challenge(file: h5py.File) -> None:
    for key, dtype in (("0", "uint8"), ("1", "float16")):
        group = file.create_group(key)
        group.create_dataset("img", data=np.zeros((3, 96, 96), dtype), compression="gzip")
        group["label"] = 1
        group["metadata"] = [2.0, 0.0]


def _pcam(file: h5py.File) -> None:
    file.create_dataset("x", data=np.zeros((2, 96, 96, 3), np.uint8), compression="gzip")
    file["y"] = np.array([0, 1]).reshape(2, 1, 1, 1)


# -- mutations of what is inside -------------------------------------------------------------------------------

HOSTILE: list[Json] = [
    *(None, True, False, 0, -1, 1, 2, 2**31, 2**63, 2**64, 10**40, 1e308, 0.5, -0.0, [], {}, [[]], {"a": 1}, [1, 2, 3]),
    *("", "x", "stem", "stem ", "ѕtem", "mid", "bn", "fc", "fc.weight", "../../etc", "\x00", "\ud800", "a" * 5000),
    *("F32", "F16", "BF16", "F64", "F8_E4M3", "BOOL", "I64", "C64", "U16", "F99"),
    *("LORA", "CONVLORA", "CONVLORA_ALONE", "all", "lora_only", "pissa", "freeze", "track", "(a+)+$", "(", "(?i)x"),
]


def mutate_json(value: Json, choose: random.Random) -> Json:
    """The same with one place changed: replaced, deleted, copied from elsewhere, renamed."""
    places: list[tuple[Any, Any]] = []

    def walk(node: Json) -> None:
        items: Iterable[tuple[Any, Json]] = ()
        if isinstance(node, dict):
            items = node.items()
        elif isinstance(node, list):
            items = enumerate(node)
        for key, child in items:
            places.append((node, key))
            walk(child)

    walk(value)
    if not places:
        return choose.choice(HOSTILE)
    node, key = choose.choice(places)
    other, at = choose.choice(places)
    action = choose.randrange(6)
    if action == 0:
        del node[key]
    elif action == 1:
        node[key] = json.loads(json.dumps(other[at]))
    elif action == 2 and isinstance(node, dict):
        names = [place for holder, place in places if isinstance(holder, dict)]
        node[choose.choice([*names, *(h for h in HOSTILE if isinstance(h, str))])] = node[key]
    elif action == 3 and isinstance(node, list):
        node.append(json.loads(json.dumps(other[at])))
    elif action == 4 and isinstance(node[key], (int, float)) and not isinstance(node[key], bool):
        node[key] += choose.choice([-1, 1, 0.5])
    else:
        node[key] = choose.choice(HOSTILE)
    return value


def mutate_tensors(data: bytes, choose: random.Random) -> bytes:
    """A safetensors file with its header, its manifest or its numbers changed, and a length that fits."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    body = bytearray(data[8 + length :])
    meta = header.get("__metadata__")
    action = choose.randrange(10)
    if action < 5 and isinstance(meta, dict) and isinstance(meta.get("convlora"), str):
        meta["convlora"] = json.dumps(mutate_json(json.loads(meta["convlora"]), choose))
    elif action < 8:
        header = mutate_json(header, choose)
    elif body:
        at = choose.randrange(len(body))
        body[at : at + 4] = choose.choice([b"\x00\x00\xc0\x7f", b"\x00\x00\x80\x7f", choose.randbytes(4), b""])
    text = json.dumps(header).encode()
    return reseal(len(text).to_bytes(8, "little") + text + bytes(body))


def reseal(data: bytes) -> bytes:
    """With the digests of the numbers and of the header that are there: a hostile file has them right."""
    from convlora._checkpoint.digests import digest
    from convlora._checkpoint.files import DIGEST, header_digest

    with contextlib.suppress(Exception):
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        manifest = json.loads(header["__metadata__"]["convlora"])
        manifest["adapter"] = {key.removeprefix("base_model.model."): digest(t) for key, t in load(data).items()}
        header["__metadata__"] |= {"convlora": json.dumps(manifest), DIGEST: "0" * 16}
        text = json.dumps(header, separators=(",", ":")).encode()
        name = f'"{DIGEST}":"'.encode()
        text = text.replace(name + b"0" * 16, name + header_digest(text, "0" * 16).encode(), 1)
        return len(text).to_bytes(8, "little") + text + data[8 + length :]
    return data


def mutated(data: bytes, choose: random.Random) -> bytes:
    """An input with what is inside changed; raises anything where there is nothing inside."""
    kind, payload = data[0] % 6, data[1:]
    if kind == PEFT:
        length = int.from_bytes(payload[:4], "little")
        config, payload = payload[4 : 4 + length], payload[4 + length :]
        if choose.random() < 0.6:
            config = json.dumps(mutate_json(json.loads(config), choose)).encode()
        else:
            payload = mutate_tensors(payload, choose)
        return data[:1] + len(config).to_bytes(4, "little") + config + payload
    if kind in (OWN, LOCON):
        return data[:1] + mutate_tensors(payload, choose)
    if kind == WILDS:
        lines = [line.split(b",") for line in payload.split(b"\n")]
        cells = choose.choice(lines)
        cells[choose.randrange(len(cells))] = choose.choice(
            [b"", b"-1", b"1e999", b"1e300", b"nan", b"../..", b'"', b"2"]
        )
        return data[:1] + b"\n".join(b",".join(cells) for cells in lines)
    at = choose.randrange(len(payload))  # HDF5: whole words of addresses and sizes
    word = choose.choice(
        [b"\xff" * 8, b"\x00" * 8, (2**40).to_bytes(8, "little"), choose.randbytes(8), b"\x01", b"\xff"]
    )
    return data[:1] + payload[:at] + word + payload[at + len(word) :]


# -- the worker, under libFuzzer -------------------------------------------------------------------------------


def work(folder: Path, seconds: int, seed: int) -> None:
    """Fuzz until the time is up or the process dies; exceptions that are findings are written down, and it goes on."""
    atheris = importlib.import_module("atheris")
    with atheris.instrument_imports(include=["convlora", "examples.histopathology"]):
        for name in READERS:
            importlib.import_module(name)
    torch.set_num_threads(1)
    scratch = tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None)
    target, findings = Target(Path(scratch.name)), folder / "findings"

    def one(data: bytes) -> None:
        try:
            target(data)
        except Exception as error:
            note(findings, data, error)

    def mutate(data: bytes, size: int, seed: int) -> bytes:
        choose = random.Random(seed)
        if choose.random() < 0.6:
            with contextlib.suppress(Exception):
                changed = mutated(data, choose)
                if len(changed) <= size:
                    return changed
        changed = bytes(atheris.Mutate(data, size))
        return data[:1] + changed[1:] if choose.random() < 0.9 else changed  # most mutants keep their reader

    options = [f"-max_total_time={seconds}", "-max_len=60000", "-timeout=20", "-rss_limit_mb=3072", f"-seed={seed}"]
    options += ["-print_final_stats=1", f"-artifact_prefix={folder}/findings/", str(folder / "corpus")]
    atheris.Setup([sys.argv[0], *options], one, custom_mutator=mutate)
    atheris.Fuzz()


def note(findings: Path, data: bytes, error: BaseException) -> None:
    """Keep the first input of each kind of exception, with its traceback; a kind is a type and a line."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if "convlora" in f.filename or "histopathology" in f.filename]
    last = (ours or frames)[-1]
    name = f"{type(error).__name__}-{Path(last.filename).stem}-{last.lineno}"
    if not (findings / f"{name}.txt").exists():
        (findings / f"{name}.bin").write_bytes(data)
        (findings / f"{name}.txt").write_text("".join(traceback.format_exception(error)))


# -- lines reached ---------------------------------------------------------------------------------------------


def lines_of(code: CodeType) -> set[int]:
    """The lines that the functions inside hold, without those that an import runs."""
    found: set[int] = set()
    for inner in (each for each in code.co_consts if isinstance(each, CodeType)):
        if inner.co_name != "<module>" and "__qualname__" not in inner.co_names[:4]:  # a class's body runs at import
            found |= {line for _, _, line in inner.co_lines() if line and line != inner.co_firstlineno}
        found |= lines_of(inner)
    return found


def reached(files: Iterable[Path]) -> dict[Path, set[tuple[str, int]]]:
    """The readers' lines that each input reaches, as (module, line)."""
    paths = {str(importlib.import_module(name).__file__): name for name in READERS}
    found: dict[Path, set[tuple[str, int]]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        target = Target(Path(scratch))
        for file in files:
            hit: set[tuple[str, int]] = set()

            def line(frame: FrameType, event: str, _: Any, hit: set[tuple[str, int]] = hit) -> Any:
                hit.add((paths[frame.f_code.co_filename], frame.f_lineno))
                return line

            sys.settrace(lambda frame, event, _: line if frame.f_code.co_filename in paths else None)
            try:
                target(file.read_bytes())
            except Exception as error:
                print(f"{file}: {error!r}")
            finally:
                sys.settrace(None)
            found[file] = hit
    return found


def report(found: dict[Path, set[tuple[str, int]]]) -> None:
    """Print the share of each reader's lines that any input reaches."""
    hit = set().union(*found.values())
    total = count = 0
    for name in READERS:
        source = Path(str(importlib.import_module(name).__file__))
        lines = lines_of(compile(source.read_text(encoding="utf-8"), str(source), "exec"))
        seen = {line for module, line in hit if module == name} & lines
        total, count = total + len(lines), count + len(seen)
        missed = ", ".join(map(str, sorted(lines - seen)[:12]))
        print(f"{name:34s}{len(seen):5d} of {len(lines):4d} lines{'   not: ' + missed if missed else ''}")
    print(f"{'all readers':34s}{count:5d} of {total:4d} lines ({count / total:.1%}); {len(found):,} inputs")


def choose_few(found: dict[Path, set[tuple[str, int]]], folder: Path) -> None:
    """Copy a small part of the inputs that reaches every line that any does, the smallest files first."""
    folder.mkdir(parents=True, exist_ok=True)
    left = set().union(*found.values())
    files = sorted(found, key=lambda file: file.stat().st_size)
    while left:
        best = max(files, key=lambda file: len(found[file] & left))
        if not found[best] & left:
            break
        left -= found[best]
        (folder / hashlib.sha256(best.read_bytes()).hexdigest()[:12]).write_bytes(best.read_bytes())


# -- the whole run ---------------------------------------------------------------------------------------------


def run(folder: Path, minutes: float, seed: int) -> None:
    """Start workers until the time is up, and print what they did."""
    import time

    for name in ("corpus", "findings"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for data in seeds():
        (folder / "corpus" / hashlib.sha256(data).hexdigest()[:16]).write_bytes(data)
    end, executions, deaths = time.monotonic() + 60 * minutes, 0, 0
    while (left := int(end - time.monotonic())) > 5:
        command = [sys.executable, "-m", "tests.fuzz", "--worker", str(left), "--work", str(folder)]
        with (folder / "log.txt").open("w+", errors="replace") as log:
            code = subprocess.run([*command, "--seed", str(seed)], cwd=ROOT, stdout=log, stderr=log).returncode
            log.seek(0)
            text = log.read()
        counts = re.findall(r"number_of_executed_units: (\d+)", text) or re.findall(r"^#(\d+)\s", text, re.MULTILINE)
        executions += int(counts[-1]) if counts else 0
        features = re.findall(r"cov: (\d+) ft: (\d+) corp: (\d+)", text)
        print(f"{executions:,} executions; libFuzzer's cov, ft, corp: {features[-1] if features else '?'}", flush=True)
        if code:
            deaths, seed = deaths + 1, seed + 1
            print(f"a worker ended with {code}: {text[-600:]}", flush=True)
            if not counts:
                break
    kinds = sorted(path.name for path in (folder / "findings").iterdir() if path.suffix != ".bin")
    print(f"{executions:,} executions, {deaths} crashes, {len(kinds)} findings: {', '.join(kinds) or 'none'}")
    report(reached(sorted((folder / "corpus").iterdir())))


def main() -> None:
    """Read the options; fuzz, or replay."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--work", type=Path, default=Path("fuzzing"), help="where corpus and findings are kept")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--replay", type=Path, metavar="FOLDER", help="only count the lines that a corpus reaches")
    parser.add_argument(
        "--choose", type=Path, metavar="FOLDER", help="copy a small part of the work folder's corpus there"
    )
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options.work.resolve(), options.worker, options.seed)
    elif options.replay:
        report(reached(sorted(options.replay.iterdir())))
    elif options.choose:
        choose_few(reached(sorted((options.work / "corpus").iterdir())), options.choose)
    else:
        run(options.work.resolve(), options.minutes, options.seed)


if __name__ == "__main__":
    main()
