"""Table 4: from a convolutional teacher to multi-layer perceptrons (Ahn et al., CVPR 2019, section 3.3).

VID-I's mean function is a stack of transposed convolutions that begins at the hidden layer as a 1x1 map. By default on
digits at 32x32; `--data cifar10 --root DIR --budget full` has the paper's sizes.
"""

from __future__ import annotations

from . import presets
from .base import Options
from .paper import TABLE4
from .study import Column, Panel, Plan
from .table import run_table

NOTES = """
- {size}
- FitNet's W is the same stack of transposed convolutions as VID-I's mean function, which is linear as FitNet asks; the
  paper does not say what it had.
- Settings were searched with the smallest student and used for all. AT and NST need spatial maps of the student and do
  not apply, as in the paper.
- The paper's rows of other works (Urban et al., 74.32; Lin et al., 78.62) are not repeated here.
"""


def plan(options: Options) -> Plan:
    quick = options.quick
    training = presets.students(options, 150 if quick else 64_000)
    samples = (options.samples or ((10,) if quick else (None,)))[0]
    widths = (256, 512, 1024) if quick else (1024, 2048, 4096)
    columns = tuple(Column(f"MLP-{h}", f"mlp-{h}", samples) for h in widths)
    # Transposed convolutions of 4x4 and stride 2 make 4, 8, 16, 32: the 8x8 digits' groups do not fit.
    data = presets.data_spec(options, "digits32" if options.data == "digits" else options.data)
    transposed = presets.regressor(options, "transposed", "transposed")
    return Plan(
        name="table4",
        title=f"Table 4: multi-layer perceptrons taught by a convolutional network ({data.name})",
        axis="h, the hidden units of a layer",
        target=data,
        source=data,
        teacher="wrn-16-1" if quick else "wrn-40-2",
        panels=(Panel("MLP", columns, columns[0]),),
        arms=presets.rows(
            options,
            presets.student(options),
            presets.kd(options),
            presets.fitnet(options, "transposed"),
            presets.vid_i(options, transposed),
        ),
        training=training,
        teacher_training=presets.teachers(options, 200 if quick else 64_000),
        seeds=presets.seeds(options, 2 if quick else 3),
        search_seeds=presets.search_seeds(options, quick=1),
        validation_trains=not quick,
        paper=TABLE4,
        notes=NOTES.format(
            size=f"The quick budget has WRN-16-1 as the teacher, {training.steps} steps a student and "
            f"{samples} labelled images a class; the paper has WRN-40-2 and all of CIFAR-10 (`--budget full`)."
            if quick
            else "The networks are the paper's."
        ),
    )


def run(options: Options) -> None:
    """Run the table into options.folder and print it."""
    run_table(plan(options), options)
