"""What hostile adapters cost: bytes sent, memory at its peak, time, and the answer.

    python -m tests.attacks

Each file is loaded once in a process of its own onto a network of 200 small convolutions, and the table is printed.
``tests/test_attacks.py`` holds the answers.
"""

from __future__ import annotations

import copy
import json
import os
import resource
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

import convlora
from convlora._checkpoint.files import DIGEST, LIMIT, VALUES, header_digest

TENSORS, CONFIG, PREFIX = "adapter_model.safetensors", "adapter_config.json", "base_model.model."
EMPTY = '{"dtype":"I8","shape":[0],"data_offsets":[0,0]}'
Attack = Callable[[Path], Path]
"""Writes its files into a folder, in which there is an adapter already, and says what to load."""


def make_net(layers: int = 200) -> nn.Module:
    """Convolutions, and a wide linear layer that nobody adapts unasked."""
    torch.manual_seed(0)
    return nn.Sequential(*[nn.Conv2d(4, 4, 3, padding=1) for _ in range(layers)], nn.Linear(2048, 2048)).eval()


def adapter(net: nn.Module, folder: Path) -> None:
    """A saved adapter of random numbers."""
    model = convlora.inject(copy.deepcopy(net), 1, modules_to_save=None)
    with torch.no_grad():
        for parameter in convlora.adapter_parameters(model):
            parameter.normal_()
    convlora.save_adapter(model, folder)


def raw(file: Path, header: str | dict[str, Any], size: int = 0) -> Path:
    """A safetensors file by hand, with so many zeros behind its header, which take no disk."""
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(file, file.stat().st_size + size)
    return file


def as_peft(folder: Path, **config: Any) -> Path:
    """The adapter as peft's, with such a configuration."""
    save_file(load_file(folder / TENSORS), folder / TENSORS)
    fields = json.loads((folder / CONFIG).read_text()) | {"peft_type": "CONVLORA"} | config
    (folder / CONFIG).write_text(json.dumps(fields))
    return folder


def changed(folder: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """The adapter with another manifest, and digests that are right."""
    data = (folder / TENSORS).read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    manifest = json.loads(header["__metadata__"]["convlora"])
    change(manifest)
    header["__metadata__"] |= {"convlora": json.dumps(manifest), DIGEST: "0" * 16}
    text = json.dumps(header, separators=(",", ":")).encode()
    name = f'"{DIGEST}":"'.encode()
    text = text.replace(name + b"0" * 16, name + header_digest(text, "0" * 16).encode(), 1)
    (folder / TENSORS).write_bytes(len(text).to_bytes(8, "little") + text + data[start:])
    return folder


def flipped(folder: Path) -> Path:
    """One bit of one alpha in the manifest."""
    data = bytearray((folder / TENSORS).read_bytes())
    data[data.index(b"alpha") + 10] ^= 4
    (folder / TENSORS).write_bytes(data)
    return folder


def many_layers(manifest: dict[str, Any]) -> None:
    """As many as a header may hold."""
    layer = manifest["plan"]["layers"][0]
    manifest["plan"]["layers"] = [layer | {"name": f"x{index}"} for index in range(8000)]


def rank_of_ten_million(folder: Path) -> Path:
    """In a file that is as large, on a file system that keeps no zeros."""
    sizes = {f"{PREFIX}0.lora_A.weight": (10**7, 4, 3, 3), f"{PREFIX}0.lora_B.weight": (4, 10**7, 1, 1)}
    header: dict[str, Any] = {}
    end = 0
    for key, shape in sizes.items():
        size = 4 * torch.Size(shape).numel()
        header[key] = {"dtype": "F32", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    as_peft(folder)
    raw(folder / TENSORS, header, end)
    return folder


def tucker(folder: Path) -> Path:
    """4 MB that multiply to 4 TB."""
    shapes = {"down": (1, 10**6, 1, 1), "mid": (10**6, 1, 1, 1), "up": (4, 1, 1, 1)}
    save_file({f"lycoris_0.lora_{k}.weight": torch.zeros(v) for k, v in shapes.items()}, folder / "x.safetensors")
    return folder / "x.safetensors"


def pickled(folder: Path) -> Path:
    """Alone in its folder."""
    (folder / "other").mkdir()
    torch.save({}, folder / "other" / "adapter_model.bin")
    return folder / "other"


def alphas(count: int) -> dict[str, int]:
    """Names that no layer has."""
    return {f"block{index % 97}.{index:06d}": 1 for index in range(count)}


def with_header(header: str) -> Attack:
    """Such a header in place of the adapter's."""
    return lambda folder: raw(folder / TENSORS, header).parent


ATTACKS: dict[str, tuple[Attack, str]] = {
    "header that claims 2⁶² bytes": (lambda f: _claims(f), "refused"),
    "header of 31 MiB, all `{},`": (with_header("[" + "{}," * (31 * 2**20 // 3) + "0]"), "refused"),
    "header of 8 MiB, all `{},`": (with_header("[" + "{}," * (LIMIT // 3 - 9) + "0]"), "refused"),
    "header of as many `{}` as are parsed": (with_header("[" + "{}," * (VALUES // 2 - 9) + "0]"), "refused"),
    "header of as many empty tensors as are parsed": (
        with_header("{" + ",".join(f'"{index}":{EMPTY}' for index in range(VALUES // 7 - 9)) + "}"),
        "refused",
    ),
    "header, 100,000 lists deep": (with_header("[" * 100_000), "refused"),
    "a tensor's name of a million dots": (with_header(f'{{"{"a." * 10**6}":{EMPTY}}}'), "refused"),
    "rank of ten million in a (sparse) file of its size": (rank_of_ten_million, "refused"),
    "manifest of 8,000 layers that are not there": (lambda f: changed(f, many_layers), "refused"),
    "manifest with an alpha of 1e308": (lambda f: changed(f, lambda m: m["plan"].update(alpha=1e308)), "refused"),
    "one flipped bit": (flipped, "refused"),
    "peft: an alpha for each of 80,000 names": (lambda f: as_peft(f, alpha_pattern=alphas(80_000)), "read"),
    "peft: as many alphas as are parsed": (lambda f: as_peft(f, alpha_pattern=alphas(VALUES - 1000)), "read"),
    "peft: `([a-z0-9.]+)+!` as a name": (lambda f: as_peft(f, alpha_pattern={"([a-z0-9.]+)+!": 1}), "refused"),
    "LyCORIS: a Tucker core of 4 MB that multiplies to 4 TB": (tucker, "refused"),
    "a pickle": (pickled, "refused"),
    "an honest adapter of 200 layers": (lambda f: f, "read"),
    "an honest adapter of 16 MiB": (lambda f: _wide(f), "read"),
    "the same as peft's, in half precision": (lambda f: as_peft(_wide(f, half=True)), "read"),
}
"""What is tried, and the answer that it has to get."""


def _claims(folder: Path) -> Path:
    (folder / TENSORS).write_bytes((2**62).to_bytes(8, "little") + b"{}")
    return folder


def _wide(folder: Path, half: bool = False) -> Path:
    model = convlora.inject(make_net(), 1024, target_modules=nn.Linear, modules_to_save=None)
    with torch.no_grad():
        for parameter in convlora.adapter_parameters(model):
            parameter.normal_()
    convlora.save_adapter(model, folder)
    if half:
        save_file({key: tensor.half() for key, tensor in load_file(folder / TENSORS).items()}, folder / TENSORS)
    return folder


def answer(net: nn.Module, path: Path) -> tuple[str, str]:
    """ "read" or "refused", and the error's words."""
    try:
        convlora.load_adapter(net, path)
    except convlora.CheckpointError as error:
        return "refused", str(error)
    return "read", ""


def prepared(attack: Attack, folder: Path) -> tuple[nn.Module, Path]:
    """A base, and what to load onto it."""
    net = make_net()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapter(net, folder)
        convlora.load_adapter(make_net(), folder)  # what the first load alone imports and keeps is not the attack's
        return net, attack(folder)


def measured(name: str) -> str:
    """A line of the table."""
    with tempfile.TemporaryDirectory() as scratch:
        net, path = prepared(ATTACKS[name][0], Path(scratch))
        folder = path if path.is_dir() else path.parent
        sent = sum(file.stat().st_size for file in folder.iterdir() if file.is_file() and file.name != "README.md")
        found, ours = os.pipe()
        if not os.fork():  # its peak of memory is its own
            before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
            outcome, words = answer(net, path)
            taken = time.process_time() - start
            peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
            shown = words.replace(f"{path}/", "").replace(f"{TENSORS} ", "").replace("\n", " ")
            shown = shown if len(shown) < 110 else shown[:50] + " … " + shown[-50:]
            line = f"| {name} | {sent:,} | {peak:,.0f} | {1e3 * taken:,.0f} | {outcome} | {shown} |"
            os.write(ours, line.encode())
            os._exit(0)
        os.close(ours)
        with os.fdopen(found, "rb") as stream:
            text = stream.read().decode()
        os.wait()
        return text or f"| {name} | {sent:,} | died | | | |"


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)  # a process with threads must not fork
    print("| attack | bytes | peak, MiB more | ms of one processor | answer | its words |\n|---|--:|--:|--:|---|---|")
    for name in ATTACKS:
        print(measured(name), flush=True)


if __name__ == "__main__":
    main()
