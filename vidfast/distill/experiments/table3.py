"""Table 3: transfer to a student on other data than the teacher's (Ahn et al., CVPR 2019, section 3.2).

A ResNet-34 teaches ResNet-18 and VGG-9 on a new task with M labelled images a class. The teacher knows a source task:
another data set (`--source-data`, `--source-root`), or by default the first half of the data's classes, while students
learn the other half.
"""

from __future__ import annotations

from ..errors import UserError
from . import presets
from .arms import alone, combination
from .base import Options
from .paper import TABLE3
from .runs import DataSpec
from .study import Column, Panel, Plan
from .table import run_table

NOTES = """
- The paper's teacher is trained on ImageNet, and its students on MIT-67 and CUB-200-2011 (`--source-data folder
  --source-root IMAGENET --data folder --root DIR --budget full`). Here {source}; students learn {target}.
- {networks}
- ResNets have the ImageNet stem, so that groups 3 and 4 have the sizes of VGG-9's pools 4 and 5{small}
- Fine-tuning starts from a student trained on the source like the teacher; as in the paper it is a reference and no
  method of transfer between networks.
- Settings were searched for each student by the same rule for all rows. LwF is the VID paper's form, a linear layer on
  the penultimate features towards the teacher's logits.
"""


def plan(options: Options) -> Plan:
    quick = options.quick
    width = "-w16" if quick else ""
    training = presets.students(options, 120 if quick else 20_000)
    samples = options.samples or ((2, 5) if quick else (10, 25, 50, None))
    source, target = _tasks(options)
    vid = {
        "ResNet-18": presets.regressor(options, "linear", "conv2"),
        "VGG-9": presets.regressor(options, "linear", "linear"),
    }
    panels = []
    for title, student in (("ResNet-18", f"resnet-18-imagenet{width}"), ("VGG-9", f"vgg-9{width}")):
        columns = tuple(Column("all" if m is None else f"M = {m}", student, m) for m in samples)
        panels.append(Panel(title, columns, columns[0 if quick else min(1, len(columns) - 1)]))
    rates = presets.all_rates(options)
    # Two rates for the methods: in a first run SGD at 0.1 was the best of none of them for ResNet-18.
    fewer = [rate for rate in rates if rate != ("sgd", 0.1)] if quick else rates
    # Attention and selectivity are patterns over positions; at 32x32 the second pair of layers has only one.
    maps = (0,) if min(target.load().image_size) < 64 else None
    source_name, target_name = source.load().name, target.load().name
    return Plan(
        name="table3",
        title=f"Table 3: transfer to another task ({target_name})",
        axis="M, the labelled images a class",
        target=target,
        source=source,
        teacher=f"resnet-34-imagenet{width}",
        panels=tuple(panels),
        arms=presets.rows(
            options,
            presets.student(options),
            alone("fine-tuning", rates, pretrained=True),
            presets.lwf(options, rates=fewer),
            presets.fitnet(options, rates=fewer),
            presets.at(options, maps, rates=fewer),
            presets.nst(options, maps, rates=fewer),
            presets.vid_lp(options, rates=fewer),
            presets.vid_i(options, vid["ResNet-18"], rates=fewer),
            combination("LwF", "FitNet"),
            combination("VID-LP", "VID-I"),
        ),
        training=training,
        teacher_training=presets.teachers(options, 300 if quick else 20_000),
        seeds=presets.seeds(options, 2 if quick else 3),
        search_seeds=presets.search_seeds(options, quick=1),
        validation_trains=not quick,
        paper=TABLE3,
        notes=NOTES.format(
            source=f"the source is {source_name}",
            target=target_name,
            networks="The quick budget has networks of a quarter of the width (16 channels at the first layer instead "
            f"of 64) and {training.steps} steps a student; VID-I's mean function is one 1x1 convolution for both."
            if quick
            else "VID-I's mean function is two 1x1 convolutions for both students; the paper has one for VGG-9.",
            small="; at 32x32 these are 2x2 and 1x1. A pattern over a single position is constant, so AT and NST have "
            "group 3 alone to work with: the size of these images is unkind to them."
            if maps
            else ".",
        ),
    )


def _tasks(options: Options) -> tuple[DataSpec, DataSpec]:
    """The teacher's data and the student's."""
    # VGG-9 halves its input five times.
    name = "digits32" if options.data == "digits" else options.data
    if options.source_root is not None and options.source_data is None:
        raise UserError("--source-root needs --source-data, the name of the teacher's data set")
    if options.source_data is not None:
        root = None if options.source_root is None else str(options.source_root)
        source, target = DataSpec(options.source_data, root), presets.data_spec(options, name)
        for what, ours, theirs in (
            ("images of one size", target.load().image_size, source.load().image_size),
            ("as many channels", target.load().in_channels, source.load().in_channels),
        ):
            if ours != theirs:
                raise UserError(f"wanted {what} in source and target data, got {theirs} and {ours}")
        return source, target
    whole = presets.data_spec(options, name)
    classes = whole.load().num_classes
    if classes < 4:
        raise UserError(
            f"{name} has {classes} classes, too few for a source and a target half; give --source-data"
        )
    half = classes // 2
    return (
        presets.data_spec(options, name, range(half)),
        presets.data_spec(options, name, range(half, classes)),
    )


def run(options: Options) -> None:
    """Run the table into options.folder and print it."""
    run_table(plan(options), options)
