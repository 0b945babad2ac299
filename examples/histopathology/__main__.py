"""The command line: ``python -m examples.histopathology`` runs the whole example; sub-commands run its parts.

Every option is checked before any work begins. A user's mistake is one line on stderr and exit status 1.
"""

import dataclasses
import functools
import inspect
import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress, TaskID
from rich.table import Table

import convlora

from .data import wholeslide
from .data.dataset import HistoDataset, find_splits, open_splits
from .data.layout import PATCH
from .data.packing import pack
from .data.tiles import find_tiles
from .errors import ExampleError
from .files import write_text
from .making import slides, synthetic
from .methods.ablation import variants
from .methods.catalogue import find_methods, names
from .methods.method import MODIFIERS, Method, modified
from .predicting import exporting, heatmap, slidemap
from .report import exhibits, inspection, outputs, sheet
from .report.costs import Cost
from .report.costs import costs as measure_costs
from .runs import comparison, configuration, content, experiment, leakage, sending
from .runs.rates import parse_rates
from .training import trackers
from .training.backbones import PATHOLOGY, check_backbone, native_size
from .training.processes import PRECISIONS, Job, is_first_process, make_accelerator, several_processes
from .training.recipe import Recipe, accuracy, default_workers, pick_device

SMALL_SIZES = {"train": 960, "val": 320, "test": 320}
FULL_SIZES = {"train": 100_000, "val": 34_904, "test": 85_054}  # the challenge's own
FULL_RECIPE = {"epochs": 50, "image_size": 224, "lr": 1e-4}  # the report's
MANY_SIZE = 64  # pixels, so that dozens of trainings end within the hour
SWEEP, SWEEP_FULL = [3e-4, 1e-3, 3e-3], [1e-4, 3e-4, 1e-3]  # the small run takes under 200 steps
MINIMUMS = {
    "rank": 1,
    "epochs": 1,
    "image_size": 32,
    "batch_size": 1,
    "workers": 0,
    "limit": 1,
    "seed": 0,
    "seeds": 1,
}

# Caveats by the attribute ``source`` of a data file that the example made.
CAVEATS = {
    synthetic.SOURCE: "Synthetic data set, drawn by a program: these figures show that the pipeline works. They are no "
    "evidence about Camelyon17, about tumours, or about which method is better on real tissue.",
    slides.SOURCE: "Patches cut from a few pictures: label 1 means more haematoxylin than the slide's median and "
    "says nothing about tumours. Patches overlap, so the figures are less certain than the number of patches suggests.",
}

console = Console(quiet=not is_first_process())
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)

MethodsOption = Annotated[
    str,
    typer.Option(
        "--methods",
        help=f"Comma-separated methods: {', '.join(names())}, or YAML files. Append +{', +'.join(MODIFIERS)}.",
    ),
]
ConfigOption = Annotated[
    Path | None,
    typer.Option(
        help="YAML file of options, such as a run's run.yaml; the command line overrides it.",
        is_eager=True,
        callback=configuration.take,
    ),
]
LATER = ("ensemble", "balanced", "adabn")
"""Modifiers that change the prediction alone, so a trained adapter can still be predicted by them."""
DEFAULT = "probe,probe-augmented,lora,lora-track"


@dataclass(frozen=True)
class Options:
    """The options that the main job, ``train`` and ``compare`` share; None means the run's default."""

    data: Annotated[
        Path | None,
        typer.Option(help="Folder of the challenge's, WILDS's, PCam's or packed files (default: synthetic data)."),
    ] = None
    slides: Annotated[Path | None, typer.Option(help="Folder of tissue pictures to cut patches from.")] = None
    patch: Annotated[int | None, typer.Option(help="Side of the patches that --slides cuts, in pixels (96).")] = None
    stride: Annotated[int | None, typer.Option(help="Distance between these patches, in pixels (96 or less).")] = None
    magnification: Annotated[
        float | None,
        typer.Option(help="Magnification at which --patch and --stride count: 10 is 1 micron a pixel (the pictures')."),
    ] = None
    mpp: Annotated[
        float | None, typer.Option(help="Microns per pixel of --data's patches, for predicting slides later (0.97).")
    ] = None
    backbone: Annotated[
        str, typer.Option(help=f"lite0 (needs no download), a timm name, hf-hub:OWNER/NAME, {', '.join(PATHOLOGY)}.")
    ] = "lite0"
    weights: Annotated[Path | None, typer.Option(help="File of the backbone's weights: safetensors or state dict.")] = (
        None
    )
    full: Annotated[
        bool, typer.Option("--full", help="The challenge report's sizes: 224 px, all patches, 50 epochs, lr 1e-4.")
    ] = False
    epochs: Annotated[int | None, typer.Option(help="Most epochs of a training (6; 50 with --full).")] = None
    image_size: Annotated[int | None, typer.Option(help="Image side, px (96; compare, ablation 64; --full 224).")] = (
        None
    )
    native_size: Annotated[
        bool, typer.Option("--native-size", help="Use the image side that the backbone was pretrained on.")
    ] = False
    rank: Annotated[int | None, typer.Option(help="Rank of every method's factors (each method's own, 8).")] = None
    lr: Annotated[float | None, typer.Option(help="Learning rate of every method (1e-3; 1e-4 with --full).")] = None
    batch_size: Annotated[int, typer.Option(help="Images in a training step.")] = 32
    fit_memory: Annotated[
        bool, typer.Option("--fit-memory", help="Halve --batch-size until a training step of every method fits.")
    ] = False
    seed: Annotated[int, typer.Option(help="Seed of the head, shuffling, augmentation and synthetic data.")] = 0
    workers: Annotated[int | None, typer.Option(help="Processes that load data (0 on a CPU).")] = None
    limit: Annotated[int | None, typer.Option(help="Most patches to use of each split.")] = None
    precision: Annotated[str, typer.Option(help="Precision of the training steps: fp32 or bf16.")] = "fp32"
    tracker: Annotated[
        str | None, typer.Option(help=f"Also log each training to one of {', '.join(trackers.NAMES)}.")
    ] = None
    resume: Annotated[bool, typer.Option("--resume", help="Continue the interrupted run in --out.")] = False
    out: Annotated[Path, typer.Option(help="Folder for all results.")] = Path("runs/histopathology")

    made_by: str = ""
    """Not an option: all options as a file, see `configuration`."""

    def recipe(self) -> Recipe:
        """The training recipe that these options ask for."""
        shared = {f.name for f in dataclasses.fields(Recipe)} & {f.name for f in dataclasses.fields(self)}
        given = {name: getattr(self, name) for name in shared if getattr(self, name) is not None}
        preset = FULL_RECIPE if self.full else {}
        if self.native_size:
            given["image_size"] = native_size(self.backbone, self.weights)
        if self.slides is not None:
            given["mpp"] = self.microns_per_pixel()
        return Recipe(**{"workers": default_workers(pick_device()), **preset, **given})

    def microns_per_pixel(self) -> float | None:
        """Microns per pixel of patches cut at a magnification; None where --magnification is not given."""
        return None if self.magnification is None else 10 / self.magnification * (self.patch or PATCH) / PATCH

    def cutting(self) -> dict[str, Any]:
        """The options on cutting pictures that were given."""
        asked = {"patch": self.patch, "stride": self.stride, "magnification": self.magnification}
        return {name: value for name, value in asked.items() if value is not None}

    def for_many(self) -> "Options":
        """These options for dozens of trainings: smaller images unless a size was given."""
        if self.full or self.native_size or self.image_size is not None:
            return self
        return dataclasses.replace(self, image_size=MANY_SIZE)

    def sizes(self) -> dict[str, int]:
        """The number of synthetic patches in each split."""
        sizes = FULL_SIZES if self.full else SMALL_SIZES
        return {name: min(size, self.limit or size) for name, size in sizes.items()}


def plain_errors(command: Callable[..., None]) -> Callable[..., None]:
    """Turn an `ExampleError` into one message on stderr and exit status 1."""

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except (ExampleError, convlora.ConvLoraError, OSError) as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(1) from error

    return wrapped


def with_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command every field of `Options` as an option; the command receives them as one object."""
    shared = {name: p for name, p in inspect.signature(Options).parameters.items() if name != "made_by"}
    own = [p for name, p in inspect.signature(command).parameters.items() if name not in ("options", "ctx")]
    takes_context = "ctx" in inspect.signature(command).parameters

    @plain_errors
    def wrapped(ctx: typer.Context, config: Path | None = None, **values: Any) -> None:
        options = Options(**{name: values.pop(name) for name in shared}, made_by=configuration.written(ctx))
        command(options=options, **({"ctx": ctx} if takes_context else {}), **values)

    # typer reads a command's options off its signature and annotations.
    parameters = [p.replace(kind=p.KEYWORD_ONLY) for p in (*own, *shared.values())]
    keyword = inspect.Parameter.KEYWORD_ONLY
    parameters.append(inspect.Parameter("config", keyword, default=None, annotation=ConfigOption))
    parameters.insert(0, inspect.Parameter("ctx", keyword, annotation=typer.Context))
    wrapped.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    wrapped.__annotations__ = {p.name: p.annotation for p in parameters}
    wrapped.__name__, wrapped.__doc__ = command.__name__, command.__doc__
    return wrapped


@app.callback(invoke_without_command=True)
@with_options
def main(ctx: typer.Context, options: Options, methods: MethodsOption = DEFAULT) -> None:
    """LoRA against a linear probe on tumour patches from unseen hospitals.

    Without a sub-command: draw synthetic data if none is given, train each method once, check each saved adapter, and
    write table.md, submission.csv, results.json and report.html.
    """
    if ctx.invoked_subcommand is None:
        run(options, find_methods(methods.split(",")), seeds=1)
        return
    given = [name for name in ctx.params if ctx.get_parameter_source(name).name == "COMMANDLINE"]  # type: ignore[union-attr]
    if given:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise ExampleError(f"put {flags} after `{ctx.invoked_subcommand}`, not before it.")


@app.command()
@with_options
def train(
    options: Options,
    method: Annotated[str, typer.Option(help=f"Method: one of {', '.join(names())}, or a YAML file.")] = "lora",
) -> None:
    """Train one method."""
    run(options, find_methods([method]), seeds=1)


LrsOption = Annotated[
    str | None,
    typer.Option("--lrs", help="Learning rates to sweep (3e-4,1e-3,3e-3; 1e-4,3e-4,1e-3 with --full; or --lr alone)."),
]


JobsOption = Annotated[int, typer.Option("--jobs", help="Trainings to run at once, in processes of this machine.")]
ExecutorOption = Annotated[
    str | None,
    typer.Option("--executor", help="module:callable that returns an executor, such as dask's client.get_executor()."),
]


@app.command()
@with_options
def compare(
    options: Options,
    methods: MethodsOption = comparison.TABLE,
    seeds: Annotated[int, typer.Option(help="Trainings of each method, from --seed up.")] = 3,
    lrs: LrsOption = None,
    jobs: JobsOption = 1,
    executor: ExecutorOption = None,
) -> None:
    """Sweep the same learning rates for every method, train several seeds, report means and paired differences."""
    check_minimums(jobs=jobs)
    sent = functools.partial(sending.find_executor, executor, jobs)
    run(options.for_many(), find_methods(methods.split(",")), seeds, rates(options, lrs), sent)


@app.command()
@with_options
def ablation(
    options: Options,
    seeds: Annotated[int, typer.Option(help="Trainings of each variant, from --seed up.")] = 1,
    lrs: LrsOption = None,
    jobs: JobsOption = 1,
    executor: ExecutorOption = None,
) -> None:
    """Vary LoRA's rank, layers and alpha, and train norms: accuracy against the trainable share."""
    if options.rank is not None:
        raise ExampleError("--rank: the ablation sets the ranks itself; leave it out.")
    check_minimums(jobs=jobs)
    sent = functools.partial(sending.find_executor, executor, jobs)
    run(options.for_many(), variants(), seeds, parse_rates(lrs) if lrs else [options.recipe().lr], sent)


def rates(options: Options, lrs: str | None) -> list[float]:
    """The learning rates to sweep: those of --lrs, --lr alone, or the default ones."""
    if lrs and options.lr is not None:
        raise ExampleError("--lr and --lrs exclude each other; give one.")
    if lrs:
        return parse_rates(lrs)
    return [options.lr] if options.lr is not None else SWEEP_FULL if options.full else SWEEP


@app.command()
@plain_errors
def predict(
    model: Annotated[Path, typer.Argument(help="Adapter folder that a run wrote, or .onnx file that `export` wrote.")],
    data: Annotated[
        Path, typer.Argument(help="HDF5 file, folder with a test split, folder of tiles, or slide (.svs, …).")
    ],
    out: Annotated[
        Path | None,
        typer.Option(help="CSV file to write, with the other files beside it (submission.csv; a slide's own name)."),
    ] = None,
    weights: Annotated[Path | None, typer.Option(help="File of the backbone's weights, if it has moved.")] = None,
    batch_size: Annotated[int, typer.Option(help="Images in a batch.")] = 32,
    how: Annotated[str, typer.Option(help="Change the prediction: comma-separated ensemble, balanced, adabn.")] = "",
    mpp: Annotated[float | None, typer.Option(help="Microns per pixel of the slide (from its metadata).")] = None,
    tile_mpp: Annotated[float | None, typer.Option(help="Microns per pixel of a tile (the training patches').")] = None,
    stride: Annotated[int | None, typer.Option(help="Distance of a slide's tiles, in pixels of a tile (96).")] = None,
    tissue: Annotated[float | None, typer.Option(help="Least share of tissue in a predicted tile (0.25).")] = None,
    threshold: Annotated[float | None, typer.Option(help="Least probability of a tumour region (0.5).")] = None,
    calibrated: Annotated[
        bool,
        typer.Option("--calibrated", help="Use the threshold and the temperature that were chosen on validation."),
    ] = False,
) -> None:
    """Predict with a saved adapter or an exported network: a submission with probabilities, or a slide's heat map."""
    check_minimums(batch_size=batch_size)
    words = [word for word in how.split(",") if word]
    given = {"mpp": mpp, "tile_mpp": tile_mpp, "stride": stride, "tissue": tissue, "threshold": threshold}
    given = {name: value for name, value in given.items() if value is not None}
    if several_processes() and (model.suffix == ".onnx" or wholeslide.is_slide(data)):
        raise ExampleError("several processes can only predict patches with an adapter; run this without torchrun.")
    if wholeslide.is_slide(data):
        point = decided(model, words, calibrated)
        predict_slide(model, data, out or Path(f"{data.stem}.csv"), weights, batch_size, words, given, point)
        return
    if given:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise ExampleError(f"{flags} is for slides, and {data} is not a slide; leave it out.")
    out, point = out or Path("submission.csv"), decided(model, words, calibrated)
    if model.suffix == ".onnx":
        predicts = modified(Method(model.stem, ""), check_how(words)).predict
        split = open_to_predict(data)
        logits = exporting.predict_onnx(model, split, predicts, batch_size)
    else:
        recipe, method = experiment.read_card(model)
        method = modified(method, check_how(words))
        workers = default_workers(pick_device())
        recipe = dataclasses.replace(recipe, weights=weights or recipe.weights, batch_size=batch_size, workers=workers)
        split = open_to_predict(data)
        job, parts = Job(out.parent, console), out.with_name(f"{out.name}.parts")
        logits = experiment.predict_split(model, split, recipe, method, job, parts)
    if not is_first_process():
        return
    beside = out.with_name(f"{out.stem}-probabilities.csv")
    write_text(beside, outputs.probabilities_csv(split, logits, *point))
    logits = logits - point[0]
    write_text(out, outputs.submission_csv(split.ids.tolist(), logits))
    shutil.rmtree(out.with_name(f"{out.name}.parts"), ignore_errors=True)
    for note in split.rows.notes:
        console.print(f"note: {note}", soft_wrap=True, highlight=False)
    if split.labels is not None:
        console.print(f"accuracy {accuracy(logits, split.labels.float()):.4f} on {len(split):,} patches")
    console.print(f"wrote {out} and {beside}", soft_wrap=True)


def decided(model: Path, words: Sequence[str], calibrated: bool) -> tuple[float, float]:
    """The logit above which a patch is called 1, and the temperature: those chosen on validation, or 0 and 1."""
    if not calibrated:
        return 0.0, 1.0
    if words or model.suffix == ".onnx":
        raise ExampleError("--calibrated needs an adapter's folder, without --how; give the folder alone.")
    point = experiment.read_point(model)
    assert point.threshold is not None and point.temperature is not None
    return point.threshold, point.temperature


def predict_slide(
    model: Path,
    slide: Path,
    out: Path,
    weights: Path | None,
    batch_size: int,
    words: Sequence[str],
    given: dict[str, Any],
    point: tuple[float, float],
) -> None:
    """Predict a whole slide and write its table, heat maps, outlines and summary."""
    check_slide_options(given)
    if model.suffix == ".onnx":
        classify, trained = exporting.classifier_onnx(model, modified(Method(model.stem, ""), check_how(words)).predict)
    else:
        recipe, method = experiment.read_card(model)
        recipe = dataclasses.replace(recipe, weights=weights or recipe.weights)
        classify, trained = slidemap.classifier(model, recipe, modified(method, check_how(words))), recipe.mpp
    if trained is None and "tile_mpp" not in given:
        raise ExampleError(f"{model} does not say the microns per pixel of its training patches: give --tile-mpp.")
    threshold, temperature = point
    # a sigmoid that does not overflow
    usual = {
        "tile_mpp": trained,
        "batch_size": batch_size,
        "threshold": (1 + math.tanh(threshold / temperature / 2)) / 2,
    }
    asked = slidemap.Asked(**{**usual, **given})
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("predicting tiles", total=None)
        found = slidemap.predict_slide(
            slide,
            lambda patches: classify(patches) / temperature,
            asked,
            lambda done, all: bar.update(task, completed=done, total=all),
        )
    files = heatmap.write_map(found, out)
    for line in slidemap.lines(slidemap.summary(found)):
        console.print(line, soft_wrap=True, highlight=False)
    console.print("wrote " + ", ".join(str(file) for file in files), soft_wrap=True)


def check_slide_options(given: dict[str, Any]) -> None:
    """Refuse numbers by which no slide can be predicted."""
    for name in ("mpp", "tile_mpp"):
        if not 0 < given.get(name, 1.0) < math.inf:
            raise ExampleError(f"--{name.replace('_', '-')} {given[name]}: must be a number above 0, in microns.")
    if not 1 <= given.get("stride", PATCH) <= PATCH:
        raise ExampleError(f"--stride {given['stride']}: must be from 1 to {PATCH}, the side of a tile.")
    for name in ("tissue", "threshold"):
        if not 0 <= given.get(name, 0.5) <= 1:
            raise ExampleError(f"--{name} {given[name]}: must be a share from 0 to 1.")


@app.command()
@plain_errors
def export(
    adapter: Annotated[Path, typer.Argument(help="Adapter folder that a run wrote.")],
    out: Annotated[Path, typer.Option(help="ONNX file to write.")] = Path("model.onnx"),
    data: Annotated[
        Path | None, typer.Option(help="Patches on which torch and onnxruntime are compared (random ones).")
    ] = None,
    weights: Annotated[Path | None, typer.Option(help="File of the backbone's weights, if it has moved.")] = None,
) -> None:
    """Write the merged network as ONNX, after onnxruntime's logits were compared with torch's."""
    if out.suffix != ".onnx":
        raise ExampleError(f"--out {out}: the name must end in .onnx, by which `predict` recognises the file.")
    recipe, _ = experiment.read_card(adapter)
    recipe = dataclasses.replace(recipe, weights=weights or recipe.weights)
    split = None if data is None else open_to_predict(data)
    done = exporting.export(adapter, out, recipe, split)
    console.print(
        f"wrote {done.path}, {done.size / 1e6:.1f} MB; largest logit difference between onnxruntime and torch on "
        f"{done.images} patches: {done.difference:.1g}",
        soft_wrap=True,
        highlight=False,
    )


@app.command()
@plain_errors
def make_data(
    out: Annotated[Path, typer.Argument(help="Folder for train.h5, val.h5 and test.h5.")],
    train: Annotated[int | None, typer.Option(help="Number of synthetic training patches (960).")] = None,
    val: Annotated[int | None, typer.Option(help="Number of synthetic validation patches (320).")] = None,
    test: Annotated[int | None, typer.Option(help="Number of synthetic test patches (320).")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the synthetic patches (0).")] = None,
    dtype: Annotated[str, typer.Option(help="Stored type: float16, float32, float64 or uint8.")] = "float32",
    slides: Annotated[Path | None, typer.Option(help="Folder of tissue pictures to cut patches from.")] = None,
    patch: Annotated[int | None, typer.Option(help="Side of the patches that --slides cuts, in pixels (96).")] = None,
    stride: Annotated[int | None, typer.Option(help="Distance between these patches, in pixels (96 or less).")] = None,
    magnification: Annotated[
        float | None, typer.Option(help="Magnification at which --patch and --stride count: 10 is 1 micron a pixel.")
    ] = None,
) -> None:
    """Write synthetic patches, or patches cut from your own tissue pictures, in the challenge's layout."""
    asked = {"train": train, "val": val, "test": test, "seed": seed}
    check_minimums(**asked)
    given = {name: value for name, value in asked.items() if value is not None}
    cutting = Options(patch=patch, stride=stride, magnification=magnification).cutting()
    if slides is None and cutting:
        raise ExampleError(f"{', '.join(f'--{name}' for name in cutting)} needs --slides; leave it out.")
    if slides is None:
        seed = given.pop("seed", 0)
        make_synthetic(out, SMALL_SIZES | given, seed, dtype)
    elif given:
        flags = ", ".join(f"--{name}" for name in given)
        raise ExampleError(f"{flags} is for synthetic patches, not for --slides; leave it out.")
    else:
        cut_slides(slides, out, dtype, **cutting)
    console.print(f"wrote {out}", soft_wrap=True)


@app.command("pack")
@plain_errors
def pack_data(
    data: Annotated[Path, typer.Argument(help="Folder of splits (challenge, WILDS or PCam), or one HDF5 file.")],
    out: Annotated[Path, typer.Argument(help="Folder for the packed files, which --data takes.")],
    rounded: Annotated[
        bool, typer.Option("--round", help="Round values between those of 8 bits to the nearest, by 1/510 at most.")
    ] = False,
    limit: Annotated[int | None, typer.Option(help="Pack this many images of each split only.")] = None,
) -> None:
    """Store each split as one array of bytes, which reads several times as fast, bit for bit the same."""
    check_minimums(limit=limit)
    for name, split in inspection.open_all(data, limit).items():
        with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
            task = progress.add_task(f"packing {name}", total=len(split))

            def packed(count: int, task: TaskID = task, progress: Progress = progress) -> None:
                progress.update(task, completed=count)

            done = pack(split, out / f"{name}.h5", rounded, packed)
        moved = f"values rounded by up to {done.largest:.2g}" if done.largest else "bit for bit"
        console.print(f"wrote {done.path}: {done.images:,} images, {done.size / 1e6:,.0f} MB, {moved}", soft_wrap=True)


@app.command("inspect")
@plain_errors
def inspect_data(
    data: Annotated[Path, typer.Argument(help="Folder of splits (challenge, WILDS or PCam), or one HDF5 file.")],
    out: Annotated[Path, typer.Option(help="Folder for the figures and the page.")] = Path("runs/inspect"),
    limit: Annotated[int | None, typer.Option(help="Inspect only this many images of each split.")] = None,
    seed: Annotated[int, typer.Option(help="Seed that chooses the samples shown.")] = 0,
) -> None:
    """Print and draw what a data set holds: layout, counts, labels, centres, colours."""
    check_minimums(limit=limit, seed=seed)
    splits = inspection.open_all(data, limit)
    warnings = leakage.warnings(splits)
    facts = {name: inspection.find_facts(name, split, warnings[name]) for name, split in splits.items()}
    for each in facts.values():
        for line in each.lines():
            console.print(line, soft_wrap=True, highlight=False)
    table = Table("split", "centre", "images", "mean R G B", "std R G B", title="Colours", box=None)
    for row in inspection.colour_rows(facts):
        table.add_row(*row)
    console.print(table)
    for path in inspection.write(out, facts, inspection.draw(splits, facts, seed)):
        console.print(f"{path}", soft_wrap=True)


@app.command("sheet")
@plain_errors
def contact_sheet(
    out: Annotated[Path, typer.Argument(help="PNG file to write.")],
    pictures: Annotated[
        Path | None, typer.Option(help="H&E picture or folder of them (scikit-image's picture, which is IHC).")
    ] = None,
    patch: Annotated[int, typer.Option(help="Side of a patch, in the pictures' pixels.")] = 96,
    columns: Annotated[int, typer.Option(help="Patches in a row.")] = 8,
    seed: Annotated[int, typer.Option(help="Seed of the synthetic patches and of the choice of tissue patches.")] = 0,
    bare: Annotated[bool, typer.Option("--bare", help="Show the synthetic patches alone.")] = False,
    colours: Annotated[int | None, typer.Option(help="Size of the PNG's palette, for a small file.")] = None,
) -> None:
    """Show synthetic patches beside real tissue."""
    check_minimums(patch=patch, columns=columns, seed=seed, colours=colours)
    if colours is not None and colours > 256:
        raise ExampleError(f"--colours {colours}: a palette holds at most 256.")
    sheet.write_sheet(sheet.make_sheet(pictures, columns, patch, seed, bare), out, colours)
    console.print(f"wrote {out}", soft_wrap=True)


def run(
    options: Options,
    methods: Sequence[Method],
    seeds: int,
    sweep: Sequence[float] = (),
    find_executor: Callable[[], Any] = lambda: None,
) -> None:
    """Train every method with every seed, at the best learning rate of the sweep if there is one, and report."""
    recipe = check(options, seeds)
    executor = find_executor()
    if executor is not None and several_processes():
        raise ExampleError("torchrun's processes share each training; leave out torchrun, or --jobs and --executor.")
    experiment.check_backbone_takes(recipe)
    job = Job(options.out, console, make_accelerator(recipe.precision, options.tracker), options.resume)
    if options.fit_memory:
        recipe = dataclasses.replace(recipe, batch_size=job.first_decides(lambda: fitting_batch(methods, recipe, job)))
    folder = job.first_decides(lambda: find_data(options))
    splits = open_splits(folder, options.limit)
    experiment.check_methods(methods, splits, recipe)
    content.look(splits, job)
    warnings = [sentence for own in leakage.warnings(splits).values() for sentence in own]
    for sentence in warnings:
        console.print(f"warning: {sentence}", soft_wrap=True, highlight=False)
    remarks: list[str] = []
    try:
        if sweep:
            trainings = None
            if executor is not None:
                images = {name: content.images_of(split) for name, split in splits.items()}
                trainings = sending.Sent(executor, folder, options.limit, images, job)
            results, sweeps = comparison.compare(methods, splits, recipe, sweep, seeds, job, trainings)
            remarks = [f"Learning rate by validation loss on seed {recipe.seed}, {each}." for each in sweeps]
        else:
            results = [
                experiment.run_method(method, splits, each, job, suffix=f"-seed{each.seed}")
                for each in (dataclasses.replace(recipe, seed=recipe.seed + k) for k in range(seeds))
                for method in methods
            ]
    except KeyboardInterrupt:
        where = options.out / "adapters"
        typer.echo(f"interrupted; the best adapters so far are in {where}; --resume goes on", err=True)
        raise typer.Exit(130) from None
    finally:
        if hasattr(executor, "shutdown"):
            executor.shutdown()
    if job.is_first:
        remarks += comparison.reported([method.name for method in methods], splits)
        finish(options, splits, recipe, results, remarks, warnings)
        outputs.track_results(job.accelerator, arguments(options, recipe, results), results)
    job.wait()


def fitting_batch(methods: Sequence[Method], recipe: Recipe, job: Job) -> int:
    """The batch size at which a step of every method fits in memory; a resumed job keeps the one it began with."""
    kept = job.out / "batch-size.json"
    if job.resume and kept.is_file():
        return int(json.loads(kept.read_text(encoding="utf-8"))["batch_size"])
    found = experiment.largest_common_batch(methods, recipe, job)
    write_text(kept, json.dumps({"asked": recipe.batch_size, "batch_size": found}) + "\n")
    job.console.print(f"batch size {found}: the largest of {recipe.batch_size} and its halves that fits in memory")
    return found


def finish(
    options: Options,
    splits: dict[str, HistoDataset],
    recipe: Recipe,
    results: Sequence[experiment.Result],
    remarks: Sequence[str],
    warnings: Sequence[str],
) -> None:
    """Write the job's outputs and print its tables."""
    facts = [outputs.describe_split(name, split) for name, split in splits.items()]
    test = splits["test"]
    given = arguments(options, recipe, results)
    whole = outputs.Report(results, facts, given, caveat(splits), remarks, outputs.truths(splits))
    whole = with_pictures(dataclasses.replace(whole, warnings=warnings, configuration=options.made_by), splits)
    outputs.write_report(whole, options.out, outputs.submission_csv(test.ids.tolist(), whole.best.test_logits))
    console.print("Validation and test accuracy by method", *outputs.rich_tables(whole), sep="\n")
    if whole.caveat:
        console.print(whole.caveat)
    for note in whole.notes():
        console.print(f"· {note}", highlight=False)
    console.print(
        f"submission.csv is by {whole.best.method}, seed {whole.best.seed}: the lowest validation loss of a row's own "
        "predictions",
        soft_wrap=True,
        highlight=False,
    )
    for name in ("report.html", "table.md", "results.json", configuration.NAME, "submission.csv", "adapters", "logs"):
        console.print(f"{options.out / name}", soft_wrap=True)


def with_pictures(whole: outputs.Report, splits: dict[str, HistoDataset]) -> outputs.Report:
    """The report with patches and costs; an error in either becomes a footnote, so that the results are not lost."""
    console.print("drawing patches and measuring costs", highlight=False)
    remarks = list(whole.remarks)
    shown: exhibits.Exhibits | None = None
    costs: Sequence[Cost] = ()
    try:
        shown = exhibits.exhibits(whole.best, splits)
    except (ExampleError, convlora.ConvLoraError, OSError, RuntimeError) as fault:
        remarks.append(f"No patches are shown: {fault}")
    try:
        costs = measure_costs(whole.by_method())
    except (ExampleError, convlora.ConvLoraError, OSError, RuntimeError) as fault:
        remarks.append(f"No costs are shown: {fault}")
    return dataclasses.replace(whole, exhibits=shown, costs=costs, remarks=remarks)


def arguments(options: Options, recipe: Recipe, results: Sequence[experiment.Result]) -> dict[str, Any]:
    """All options and settings, for the report."""
    seeds = sorted({result.seed for result in results})
    where = options.data or options.slides or "synthetic data set"
    trained = {k: v for k, v in dataclasses.asdict(recipe).items() if k not in ("seed", "lr") and v is not None}
    trained["lr"] = ", ".join(f"{lr:g}" for lr in sorted({result.lr for result in results}))
    return {"data": str(where), "limit": options.limit or "none", **trained, "seeds": ", ".join(map(str, seeds))}


def check(options: Options, seeds: int) -> Recipe:
    """The recipe of these options; raises ExampleError at the first value that cannot work."""
    check_backbone(options.backbone)
    if options.native_size and options.image_size is not None:
        raise ExampleError("--image-size and --native-size exclude each other; give one.")
    recipe = options.recipe()
    values = {name: getattr(options, name) for name in MINIMUMS if name != "seeds"}
    check_minimums(**values, seeds=seeds)
    if not (recipe.lr > 0 and math.isfinite(recipe.lr)):
        raise ExampleError(f"--lr {recipe.lr}: must be a positive number; the default is 1e-3.")
    if options.data is not None and options.slides is not None:
        raise ExampleError("--data and --slides exclude each other; give one.")
    if options.slides is None and options.cutting():
        flags = ", ".join(f"--{name}" for name in options.cutting())
        raise ExampleError(f"{flags} needs --slides; leave it out, or give the folder of pictures.")
    if options.slides is not None and options.mpp is not None:
        raise ExampleError("--mpp is for --data; with --slides give --magnification in its place.")
    if recipe.mpp is not None and not 0 < recipe.mpp < math.inf:
        raise ExampleError(f"--mpp {recipe.mpp}: must be a number above 0, in microns.")
    if options.data is not None:
        find_splits(options.data)
    if options.out.exists() and not options.out.is_dir():
        raise ExampleError(f"--out {options.out} is a file; name a folder.")
    trackers.check_tracker(options.tracker)
    if recipe.precision not in PRECISIONS:
        raise ExampleError(f"--precision {recipe.precision}: give one of {', '.join(PRECISIONS)}.")
    return recipe


def check_minimums(**values: int | None) -> None:
    """Refuse an option below its least value."""
    for name, value in values.items():
        least = MINIMUMS.get(name, 1)
        if value is not None and value < least:
            raise ExampleError(f"--{name.replace('_', '-')} {value}: must be at least {least}.")


def find_data(options: Options) -> Path:
    """The folder to read: the user's, or patches that are cut or drawn now."""
    if options.data is not None:
        return options.data
    if options.slides is not None:
        cut_slides(options.slides, options.out / "slides", **options.cutting())
        return options.out / "slides"
    # The challenge stores floats; at its full size these take 24 GB, and bytes take 6.
    make_synthetic(options.out / "data", options.sizes(), options.seed, "uint8" if options.full else "float32")
    return options.out / "data"


def make_synthetic(folder: Path, sizes: dict[str, int], seed: int, dtype: str) -> None:
    """Draw the synthetic patches, with a progress bar."""
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("drawing synthetic patches", total=sum(sizes.values()))
        synthetic.make_synthetic(
            folder, sizes, seed=seed, dtype=dtype, progress=lambda done: progress.update(task, completed=done)
        )


def cut_slides(folder: Path, out: Path, dtype: str = "float32", **cutting: Any) -> None:
    """Cut pictures into the splits and print how many patches each got."""
    counts = slides.cut_slides(folder, out, dtype=dtype, **cutting)
    console.print("cut " + ", ".join(f"{count} {name}" for name, count in counts.items()) + " patches")


def check_how(words: Sequence[str]) -> Sequence[str]:
    """The words of --how, each checked to be one that needs no other training."""
    for word in words:
        if word not in LATER:
            raise ExampleError(f"--how {word}: give any of {', '.join(LATER)}; other modifiers need another training.")
    return words


def open_to_predict(data: Path) -> HistoDataset:
    """The patches to predict: the file itself, a folder's test split, or a folder of tiles."""
    if data.is_dir():
        splits = find_splits(data)
        if "test" in splits:
            return HistoDataset(splits["test"], require_labels=False, split="test")
        if splits or not find_tiles(data):
            raise ExampleError(
                f"{data}: this folder has no test.h5 and no PNG, JPEG or TIFF; name the HDF5 file or the slide itself."
            )
    return HistoDataset(data, require_labels=False, split="test")


def caveat(splits: dict[str, HistoDataset]) -> str:
    """What the data cannot show, by the attribute ``source`` of its files; empty for the challenge's own files."""
    sources = sorted({split.source for split in splits.values() if split.source})
    return " ".join(CAVEATS.get(source, f"Data made by: {source}.") for source in sources)


if __name__ == "__main__":
    app(prog_name="python -m examples.histopathology")
