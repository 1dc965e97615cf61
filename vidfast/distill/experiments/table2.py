"""Table 2: students of other sizes, by method (Ahn et al., CVPR 2019, section 3.1).

By default on the 8x8 digits, with M labelled images a class for the students, because all of them leave nothing to
gain there; `--data cifar100 --root DIR --budget full` has the paper's networks and the whole training set.
"""

from __future__ import annotations

from . import presets
from .base import Options
from .paper import TABLE2
from .study import Column, Panel, Plan
from .table import run_table

NOTES = """
- The quick budget has small networks, {steps} steps a student, and {samples} labelled images a class. The paper trains
  every student on all of CIFAR-100 (`--budget full`); with all images every student of these reaches about 99 % on
  digits, and no row could be told from another.
- The settings were searched with the smallest student and used for all; the paper does not say whether it searched for
  each. Each row's candidates are those of table 1.
- In the quick budget VID-I's mean function is one 1x1 convolution and its initial variance 1.
"""


def plan(options: Options) -> Plan:
    quick = options.quick
    training = presets.students(options, 200 if quick else 78_000)
    samples = (options.samples or ((10,) if quick else (None,)))[0]
    networks = (
        ("wrn-10-1", "wrn-16-1", "wrn-10-2", "wrn-16-2")
        if quick
        else ("wrn-16-1", "wrn-40-1", "wrn-16-2", "wrn-40-2")
    )
    columns = tuple(Column(network.upper(), network, samples) for network in networks)
    return Plan(
        name="table2",
        title=f"Table 2: students of several sizes ({options.data})",
        axis="the student's size",
        target=presets.data_spec(options),
        source=presets.data_spec(options),
        teacher="wrn-16-2" if quick else "wrn-40-2",
        panels=(Panel("WRN", columns, columns[0]),),
        arms=presets.distillation_rows(options),
        training=training,
        teacher_training=presets.teachers(options, 300 if quick else 78_000),
        seeds=presets.seeds(options, 2 if quick else 3),
        search_seeds=presets.search_seeds(options, quick=1),
        validation_trains=not quick,
        paper=TABLE2,
        notes=NOTES.format(steps=training.steps, samples="all" if samples is None else samples),
    )


def run(options: Options) -> None:
    """Run the table into options.folder and print it."""
    run_table(plan(options), options)
