"""`vidfast distill`: a student alone and a student with VID-I, compared on few labelled images."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError

if TYPE_CHECKING:
    from ..data import ImageData
    from ..experiments.compare import Config

HELP = "train a teacher, a student alone and a student with VID-I, and compare the students"

CONFIG = "config.json"

NEEDS = {
    "matplotlib": "matplotlib",
    "PIL": "Pillow",
    "safetensors": "safetensors",
    "sklearn": "scikit-learn",
    "tqdm": "tqdm",
}


def require_extras() -> None:
    """Raises UserError where the [train] extra is not installed."""
    missing = [name for module, name in NEEDS.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise UserError(f"this command needs {', '.join(missing)}: pip install 'vidfast[train]'")


def _number(kind: type[int] | type[float], least: float, what: str) -> Callable[[str], Any]:
    def parse(text: str) -> int | float:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"wanted {what}, got {text!r}") from None
        if not least <= value < float("inf"):
            raise argparse.ArgumentTypeError(f"wanted {what}, got {text}")
        return value

    return parse


COUNT = _number(int, 1, "a whole number of 1 or more")
AMOUNT = _number(float, 0.0, "a number of 0 or more")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.ArgumentDefaultsHelpFormatter
    what = parser.add_argument_group("what is compared")
    what.add_argument(
        "--data",
        default="digits",
        metavar="NAME",
        help="data set: digits, digits32, cifar10, cifar100 or folder",
    )
    what.add_argument("--root", type=Path, metavar="DIR", help="where the data set's files are")
    what.add_argument("--teacher", default="wrn-16-2", metavar="NAME", help="teacher network")
    what.add_argument("--student", default="wrn-10-1", metavar="NAME", help="student network")
    what.add_argument(
        "--samples-per-class",
        "-m",
        type=COUNT,
        nargs="+",
        default=[5, 10],
        metavar="M",
        help="labelled images a class",
    )
    what.add_argument("--seeds", type=COUNT, default=3, metavar="N", help="seeds 0 to N-1")

    vid = parser.add_argument_group("VID-I")
    vid.add_argument("--weight", type=AMOUNT, default=30.0, help="lambda, the weight of VID-I")
    vid.add_argument("--regressor", default="linear", metavar="NAME", help="linear, conv2 or conv3")
    vid.add_argument(
        "--init-var", type=AMOUNT, default=1.0, metavar="V", help="initial variance of every channel"
    )
    vid.add_argument(
        "--alpha-lr", type=AMOUNT, default=1.0, metavar="X", help="alpha's learning rate, times --lr"
    )
    vid.add_argument(
        "--reduction",
        default="mean",
        choices=("mean", "batchmean", "sum"),
        help="of the loss over the elements",
    )
    vid.add_argument("--backend", default="auto", help="kernel of the loss, see vidfast info")

    training = parser.add_argument_group("training")
    training.add_argument("--steps", type=COUNT, default=300, help="steps of a student")
    training.add_argument("--teacher-steps", type=COUNT, default=300, help="steps of the teacher")
    training.add_argument(
        "--optimizer",
        choices=("sgd", "adamw"),
        help="of the students; without it, the best found for each arm",
    )
    training.add_argument(
        "--lr", type=AMOUNT, help="learning rate; without it, the best found for each arm and optimizer"
    )
    training.add_argument("--schedule", default="cosine", choices=("cosine", "steps", "constant"))
    training.add_argument("--weight-decay", type=AMOUNT, default=5e-4)
    training.add_argument("--batch-size", type=COUNT, default=64)
    training.add_argument("--accumulation", type=COUNT, default=1, help="parts that a batch is processed in")
    training.add_argument("--mixed-precision", default="no", choices=("no", "bf16", "fp16"))
    training.add_argument(
        "--channels-last",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="layout of images and networks in memory",
    )
    training.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))

    files = parser.add_argument_group("files")
    files.add_argument(
        "--out", type=Path, metavar="DIR", help="run folder; without it, one named after the time"
    )
    files.add_argument("--resume", action="store_true", help="continue the run in --out")
    files.add_argument(
        "--cache", type=Path, metavar="DIR", help="where teachers are kept; else the user's cache"
    )
    files.add_argument("--quiet", "-q", action="store_true", help="print the table alone")


def run(arguments: argparse.Namespace) -> int:
    require_extras()
    from ..processes import one_voice

    with one_voice(arguments.device):
        return _run(arguments)


def _run(arguments: argparse.Namespace) -> int:
    from ..data import DataError, load
    from ..processes import from_main
    from ..registry import UnknownNameError

    config = _config(arguments)
    try:
        data = load(config.data, root=arguments.root)
    except (UnknownNameError, DataError) as error:
        raise UserError(str(error)) from error
    # Two folders are two data sets; the name tells them apart.
    config = replace(config, data=data.name)
    _check(config, data, arguments.device)
    with ExitStack() as stack:
        folder = from_main(lambda: stack.enter_context(_run_folder(arguments, config)))
        try:
            _compare(arguments, config, data, folder)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                f"interrupted; continue with the same options, --out {folder} and --resume"
            ) from None
    return 0


def _compare(arguments: argparse.Namespace, config: Config, data: ImageData, folder: Path) -> None:
    from tqdm.auto import tqdm

    from ..experiments import compare
    from ..experiments.progress import progress_bar
    from ..experiments.teacher import default_cache, trained_teacher
    from ..files import write_text
    from ..plots import accuracy_curves
    from ..processes import is_main
    from ..report import as_text, markdown, table

    started = time.monotonic()

    def say(line: str) -> None:
        if not arguments.quiet:
            tqdm.write(line, file=sys.stderr)

    teacher, metrics, cached = trained_teacher(
        config.teacher,
        data,
        config.teacher_training,
        cache=arguments.cache or default_cache(),
        progress=not arguments.quiet and sys.stderr.isatty(),
        say=say,
    )
    accuracy = metrics["test_accuracy"]
    say(f"teacher {config.teacher}: test accuracy {accuracy:.1f} %{' (cached)' if cached else ''}")
    if is_main():
        compare.save_network(folder / "checkpoints" / "teacher.safetensors", teacher, config.teacher, data)

    labels = {arm.name: arm.label for arm in compare.arms(config)}

    def each(run: compare.Run) -> None:
        reached = run.history[-1]["test_accuracy"]
        say(f"M = {run.samples_per_class:<3} seed {run.seed}  {labels[run.arm]:<16} {reached:5.1f} %")

    count = len(labels) * len(config.seeds) * len(config.samples_per_class)
    with progress_bar(count * arguments.steps, quiet=arguments.quiet or not is_main()) as bar:
        runs = compare.compare(
            config, data, teacher, folder, resume=arguments.resume, progress=bar, each=each
        )

    if not is_main():
        return
    rows = table(compare.summaries(runs), labels, baseline="alone")
    title = f"{config.data}: {config.student} taught by {config.teacher}"
    accuracy_curves(folder / "curves.png", runs, labels, title=title, teacher_accuracy=accuracy)
    seconds = time.monotonic() - started
    report = markdown(config.as_json(), labels, rows, teacher_accuracy=accuracy, seconds=seconds)
    write_text(folder / "report.md", report)
    seeds = f"{len(config.seeds)} seed{'s' if len(config.seeds) != 1 else ''}"
    print(f"Test accuracy (%), mean ± standard deviation over {seeds}; teacher {accuracy:.1f}\n")
    print(as_text(rows))
    print(f"\n{folder / 'report.md'}\n{folder / 'curves.png'}")


def _config(arguments: argparse.Namespace) -> Config:
    from ..experiments.compare import Config, VIDOptions, tuned
    from ..processes import process_count
    from ..trainer import TrainOptions

    if arguments.lr is not None and arguments.optimizer is None:
        raise UserError("--lr needs --optimizer: the two arms' best optimizers differ, and so do their rates")
    if arguments.optimizer == "sgd" and arguments.lr is None:
        raise UserError(
            "--optimizer sgd needs --lr: what suits it depends on --weight (0.1 with 1, not with 30)"
        )
    if arguments.reduction == "sum" and arguments.accumulation > 1:
        raise UserError("--reduction sum does not go with --accumulation: sums of parts are not averaged")
    if arguments.reduction == "sum" and process_count() > 1:
        raise UserError("--reduction sum does not go with several processes: sums of parts are not averaged")
    if arguments.batch_size < process_count():
        raise UserError(
            f"--batch-size {arguments.batch_size} leaves some of {process_count()} processes without images"
        )
    every = max(1, arguments.steps // 15)
    try:
        options = TrainOptions(
            steps=arguments.steps,
            batch_size=arguments.batch_size,
            weight_decay=arguments.weight_decay,
            schedule=arguments.schedule,
            eval_every=every,
            checkpoint_every=3 * every,
            accumulation=arguments.accumulation,
            mixed_precision=arguments.mixed_precision,
            channels_last=arguments.channels_last,
            device=arguments.device,
        )
        training = tuned(options, arguments.optimizer, arguments.lr)
        # The teacher has settings of its own, so that it stays in the cache while the student's are tried.
        teacher = TrainOptions(
            steps=arguments.teacher_steps, channels_last=arguments.channels_last, device=arguments.device
        )
    except ValueError as error:
        raise UserError(str(error)) from None
    return Config(
        data=arguments.data,
        teacher=arguments.teacher,
        student=arguments.student,
        samples_per_class=tuple(dict.fromkeys(arguments.samples_per_class)),
        seeds=tuple(range(arguments.seeds)),
        vid=VIDOptions(
            weight=arguments.weight,
            regressor=arguments.regressor,
            init_var=arguments.init_var,
            alpha_lr=arguments.alpha_lr,
            reduction=arguments.reduction,
            backend=arguments.backend,
        ),
        training=training,
        teacher_training=teacher,
    )


def _check(config: Config, data: ImageData, wanted: str) -> None:
    """Find what cannot work before anything is trained, by doing all of it once on two images."""
    import torch

    from ..data import samples_per_class
    from ..distiller import Distiller
    from ..models import build

    images = data.train.example()
    device = "cpu" if wanted == "cpu" or not torch.cuda.is_available() else "cuda"
    try:
        for samples in config.samples_per_class:
            samples_per_class(data.train, samples, seed=0)
        with torch.random.fork_rng():
            student, teacher = (
                build(
                    name,
                    in_channels=data.in_channels,
                    num_classes=data.num_classes,
                    image_size=data.image_size,
                )
                for name in (config.student, config.teacher)
            )
            distiller = Distiller(student, teacher, config.vid.terms(student, teacher), example=images)
            distiller.to(device)(images.to(device), data.train.labels[:2].to(device))
    except (ValueError, RuntimeError) as error:
        raise UserError(str(error).splitlines()[0]) from error


@contextmanager
def _run_folder(arguments: argparse.Namespace, config: Config) -> Iterator[Path]:
    """The run folder, made and with config.json, or one whose config is this one if the run is resumed.

    For the block no other call may have it.
    """
    from ..experiments.folder import LOCK, held
    from ..files import write_text

    if arguments.resume and arguments.out is None:
        raise UserError("--resume needs --out DIR, the folder of the run to continue")
    folder: Path = arguments.out or Path("runs") / datetime.now().strftime("distill-%Y%m%d-%H%M%S")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: wanted a folder, this is a file")
    if not (folder / LOCK).exists():
        # Before a lock is written to a folder that may be of something else.
        _check_folder(folder, config, arguments.resume)
    with held(folder):
        _check_folder(folder, config, arguments.resume)
        write_text(folder / CONFIG, json.dumps(config.as_json(), indent=2) + "\n")
        (folder / "checkpoints").mkdir(exist_ok=True)
        yield folder


def _check_folder(folder: Path, config: Config, resume: bool) -> None:
    """Raises UserError for a folder with something else in it than the run that is to be resumed."""
    from ..experiments.folder import LOCK

    written = folder / CONFIG
    if resume and written.exists():
        try:
            other = json.loads(written.read_text())
        except ValueError:
            raise UserError(f"{written}: damaged, not JSON") from None
        different = _differences(other, config.as_json())
        if different:
            raise UserError(
                f"{folder}: holds a run with other options ({', '.join(different)}); choose another --out"
            )
    # A process killed while it wrote config.json leaves a part of it under another name.
    elif folder.exists() and any(
        path.name != LOCK and not path.name.startswith(f".{CONFIG}.") for path in folder.iterdir()
    ):
        raise UserError(
            f"{folder}: holds no run to continue (there is no config.json); choose another --out"
            if resume
            else f"{folder}: is not empty; choose another --out, or --resume to continue the run in it"
        )


def _differences(old: Any, new: Any, at: str = "") -> list[str]:
    """Where two JSON values differ, as dotted names; where a run was computed does not count."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [key for key in dict.fromkeys([*old, *new]) if key != "device"]
        return [d for key in keys for d in _differences(old.get(key), new.get(key), f"{at}.{key}".strip("."))]
    return [] if old == new else [at]
