"""The guarantees of docs/distillation.md once more, in a process in which others train too.

The tests are those of the files that state the guarantees; here all of them run inside of `company`.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from company import company
from test_compiled_distiller import (  # noqa: F401
    _fresh_dynamo,
    test_a_compiled_student,
    test_the_trainer_compiles_both_networks_and_leaves_them_as_they_were,
    test_the_whole_distiller_compiles_into_one_graph,
)
from test_mixed_precision import (  # noqa: F401
    test_one_step_in_bf16_is_that_in_fp32,
    test_training_in_bf16_follows_training_in_fp32,
)
from test_processes import (  # noqa: F401
    test_a_loop_of_ones_own_in_two_processes,
    test_two_processes_learn_what_one_learns,
    test_two_processes_resume_exactly,
    two,
)
from test_resume import (  # noqa: F401
    test_a_run_killed_anywhere_and_resumed_is_the_uninterrupted_one,
    test_rows_are_the_same_wherever_the_checkpoint_was,
)
from test_stream import test_workers_do_not_change_what_is_learned  # noqa: F401
from test_trainer import (  # noqa: F401
    test_accumulated_parts_reach_the_kernel_with_a_gradient_of_one,
    test_accumulation_does_not_change_what_is_learned,
    test_channels_last_changes_the_layout_and_not_the_result,
    test_the_seed_decides_everything,
    test_trainers_of_different_precision_in_one_process,
    test_training_does_not_touch_the_random_state,
    test_what_was_frozen_stays_frozen,
)

pytest.importorskip("accelerate")


@pytest.fixture(autouse=True, scope="module")
def _company() -> Iterator[None]:
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    with company():
        yield
    AcceleratorState._reset_state(reset_partial_state=True)
