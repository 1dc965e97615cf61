"""Table 1: a student with few labelled images, by method (Ahn et al., CVPR 2019, section 3.1).

The teacher has seen all training images; students get M labelled images a class. By default on the
8x8 digits with small networks; `--data cifar10 --root DIR --budget full` has the paper's sizes.
"""

from __future__ import annotations

from . import presets
from .base import Options
from .paper import TABLE1
from .study import Column, Panel, Plan
from .table import run_table

NOTES = """
- The quick budget has small networks, {steps} steps a student, and the few labelled images that make digits hard. The
  paper has CIFAR-10, WRN-40-2 to WRN-16-1 and M from 100 to 5000 (`--budget full`).
- Each row's weight, optimizer and learning rate were searched by the same rule over about as many candidates. The
  paper gives neither its candidates nor its optimizer.
- In the quick budget VID-I's mean function is one 1x1 convolution, found better than the paper's three on digits
  (`vid-search.csv`), and its initial variance 1.
- Combined rows take the terms of their parts as these were found best.
"""


def plan(options: Options) -> Plan:
    quick = options.quick
    training = presets.students(options, 200 if quick else 64_000)
    samples = options.samples or ((2, 5, 10) if quick else (100, 500, 1000, 5000))
    network = "wrn-10-1" if quick else "wrn-16-1"
    columns = tuple(Column(f"M = {m}", network, m) for m in samples)
    return Plan(
        name="table1",
        title=f"Table 1: {network} with few labelled images ({options.data})",
        axis="M, the labelled images a class",
        target=presets.data_spec(options),
        source=presets.data_spec(options),
        teacher="wrn-16-2" if quick else "wrn-40-2",
        panels=(Panel("WRN", columns, columns[min(1, len(columns) - 1)]),),
        arms=presets.distillation_rows(options),
        training=training,
        teacher_training=presets.teachers(options, 300 if quick else 64_000),
        seeds=presets.seeds(options, 3),
        search_seeds=presets.search_seeds(options, quick=2),
        validation_trains=not quick,
        paper=TABLE1,
        notes=NOTES.format(steps=training.steps),
    )


def run(options: Options) -> None:
    """Run the table into options.folder and print it."""
    run_table(plan(options), options)
