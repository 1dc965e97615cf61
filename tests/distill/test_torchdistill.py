"""VID in torchdistill's YAML files: the same numbers as torchdistill's own, in one process and in two."""

from __future__ import annotations

import copy
import importlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from declared_operators import declare_torchvision
from plain_network import PlainNet, plain_data
from run_example import run_example
from torch import Tensor, nn
from torch.utils.data import SequentialSampler

pytest.importorskip("torchdistill")
declare_torchvision()
distillation = importlib.import_module("torchdistill.core.distillation")
yaml_files = importlib.import_module("torchdistill.common.yaml_util")
integration = importlib.import_module("vidfast.integrations.torchdistill")

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "torchdistill"
THEIRS = ("VariationalDistributor4VID", "VIDLoss")
OURS = ("VidfastDistributor", "VidfastVIDLoss")
# Width of the student's and of the teacher's layers of PlainNet.
LAYERS = {"first": (4, 6), "second": (8, 12)}
WEIGHTS = {"first": 0.5, "second": 2.0}


def configured(keys: tuple[str, str], **wrapper: Any) -> dict[str, Any]:
    """The part of a YAML file that says how to train; `keys` are those of the wrapper and of the loss."""
    regressors, pairs = {}, {}
    for layer, (width, target) in LAYERS.items():
        sizes = {"in_channels": width, "middle_channels": 10, "out_channels": target}
        path = f"student_model.{layer}"
        regressors[layer] = {
            "io": "output",
            "path": path,
            "kwargs": {**sizes, "eps": 1e-5, "init_pred_var": 5.0},
        }
        pairs[layer] = {
            "teacher": {"io": "output", "path": layer},
            "student": {"io": "output", "path": f"regressor_dict.{layer}"},
            "weight": WEIGHTS[layer],
        }
    label = {
        "criterion": {"key": "CrossEntropyLoss", "kwargs": {}},
        "criterion_wrapper": {
            "key": "SimpleLossWrapper",
            "kwargs": {
                "input": {"is_from_teacher": False, "module_path": ".", "io": "output"},
                "target": {"uses_label": True},
            },
        },
        "weight": 1.0,
    }
    vid = {"criterion": {"key": keys[1], "kwargs": {"feature_pairs": pairs, "margin": 1.0}}, "weight": 0.7}
    outputs = [f"{where}.{layer}" for where in ("student_model", "regressor_dict") for layer in LAYERS]
    return {
        "num_epochs": 2,
        "train_data_loader": {
            "dataset_id": "train",
            "sampler": {"class_or_func": SequentialSampler},
            "kwargs": {"batch_size": 12},
        },
        "teacher": {
            "forward_proc": "forward_batch_only",
            "forward_hook": {"output": [*LAYERS]},
            "requires_grad": False,
        },
        "student": {
            "forward_proc": "forward_batch_only",
            "forward_hook": {"output": outputs},
            "auxiliary_model_wrapper": {"key": keys[0], "kwargs": {"regressors": regressors, **wrapper}},
        },
        "optimizer": {"key": "SGD", "kwargs": {"lr": 0.1}},
        "criterion": {"key": "WeightedSumLoss", "kwargs": {"sub_terms": {"ce": label, "vid": vid}}},
    }


def boxed(config: dict[str, Any], distributed: bool = False) -> Any:
    """torchdistill's box for it; the weights are always the same."""
    torch.manual_seed(0)
    student, teacher = PlainNet(4), PlainNet(6)
    return distillation.get_distillation_box(
        teacher, student, {"train": plain_data()}, config, torch.device("cpu"), None, distributed, 1
    )


def batch() -> tuple[Tensor, Tensor]:
    images, labels = zip(*(plain_data()[i] for i in range(12)), strict=True)
    return torch.stack(images), torch.stack(labels)


def gradients(box: Any) -> tuple[Tensor, dict[str, Tensor]]:
    loss = box.forward_process(*batch(), {})
    loss.backward()
    named = box.student_model.named_parameters()
    return loss.detach(), {name.replace("soft_plus_param", "log_scale"): p.grad for name, p in named}


def test_loss_and_gradients_are_those_of_torchdistill() -> None:
    theirs, ours = boxed(configured(THEIRS)), boxed(configured(OURS))
    for name, p in theirs.student_model.named_parameters():
        if name.endswith("soft_plus_param"):
            nn.init.normal_(p)
    ours.student_model.load_state_dict(theirs.student_model.state_dict())  # a checkpoint, strict
    (loss, expected), (ours_loss, ours_gradients) = gradients(theirs), gradients(ours)
    torch.testing.assert_close(ours_loss, loss, rtol=1e-5, atol=0)
    assert ours_gradients.keys() == expected.keys()
    assert any(name.endswith("log_scale") for name in expected)
    for name, gradient in expected.items():
        assert (ours_gradients[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


def test_a_step_computes_something_else_with_other_variances() -> None:
    """The counterpart: what is compared above can differ."""
    theirs, ours = boxed(configured(THEIRS)), boxed(configured(OURS))
    ours.student_model.load_state_dict(theirs.student_model.state_dict())
    nn.init.normal_(ours.student_model.regressor_dict["first"].log_scale)
    assert not torch.allclose(gradients(theirs)[0], gradients(ours)[0], rtol=1e-3)


def trained(box: Any, share: slice = slice(None)) -> dict[str, Tensor]:
    """The weights after two epochs of two steps."""
    images, labels = (x[share] for x in batch())
    for epoch in range(2):
        box.pre_epoch_process(epoch=epoch)
        for _ in range(2):
            box.post_forward_process(box.forward_process(images, labels, {}))
        box.post_epoch_process()
    return {name.replace("module.", ""): x.detach() for name, x in box.student_model.state_dict().items()}


def one_of_two(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    share = slice(6 * rank, 6 * rank + 6)
    for unused in (None, True):
        box = boxed(configured(OURS, find_unused_parameters=unused), distributed=True)
        losses = box.student_model.regressor_dict.values()
        assert all(isinstance(loss, nn.parallel.DistributedDataParallel) for loss in losses)
        torch.save(trained(box, share), f"{folder}/{unused}-{rank}.pt")
    torch.distributed.barrier()
    os._exit(0)  # gloo's threads do not always outlive the interpreter's end


def test_two_processes_learn_what_one_learns(tmp_path: Path) -> None:
    alone = trained(boxed(configured(OURS)))
    before = boxed(configured(OURS)).student_model.state_dict()
    torch.multiprocessing.start_processes(one_of_two, (str(tmp_path),), nprocs=2, start_method="fork")
    for unused in (None, True):
        for rank in range(2):
            together = torch.load(tmp_path / f"{unused}-{rank}.pt")
            assert together.keys() == alone.keys()
            for name, expected in alone.items():
                assert not torch.equal(expected, before[name]), name
                torch.testing.assert_close(together[name], expected, rtol=1e-5, atol=1e-6)


def test_features_of_other_sizes_and_options_of_the_loss() -> None:
    config = configured(OURS)
    kwargs = config["student"]["auxiliary_model_wrapper"]["kwargs"]["regressors"]["first"]
    kwargs["path"], kwargs["kwargs"]["in_channels"] = "student_model.second", 8  # a smaller map
    kwargs["kwargs"] |= {"reduction": "batchmean", "backend": "reference"}
    box = boxed(config)
    loss = box.student_model.regressor_dict["first"]
    assert (loss.reduction, loss.backend) == ("batchmean", "reference")
    assert all(torch.isfinite(gradient).all() for gradient in gradients(box)[1].values())


def test_the_losses_options_are_checked() -> None:
    config = configured(OURS)
    regressors = config["student"]["auxiliary_model_wrapper"]["kwargs"]["regressors"]
    unknown = copy.deepcopy(config)
    regressors["first"]["kwargs"]["eps_"] = 1e-5
    with pytest.raises(TypeError, match=r"must be in_channels.*got eps_"):
        boxed(config)
    del unknown["student"]["auxiliary_model_wrapper"]["kwargs"]["regressors"]["second"]["path"]
    with pytest.raises(
        ValueError, match=r"`regressors\['second'\]` must have `path`, .*got \['io', 'kwargs'\]"
    ):
        boxed(unknown)
    with pytest.raises(ValueError, match="one pair or more, got none"):
        integration.VidfastVIDLoss({})


def test_torchdistills_own_wrapper_is_refused() -> None:
    box = boxed(configured((THEIRS[0], OURS[1])))
    with pytest.raises(
        TypeError, match=r"must be those of a loss.*where tuple was found.*VidfastDistributor"
    ):
        box.forward_process(*batch(), {})


def test_a_student_whose_second_part_is_not_run_is_refused() -> None:
    """As torchdistill does where a `wrapper` is around it."""
    box = boxed(configured(OURS))
    box.student_model = nn.ModuleList([box.student_model])
    box.student_forward_proc = lambda model, images, *_, **__: model[0](images)
    with pytest.raises(TypeError, match=r"where NoneType was found.*without a `wrapper`"):
        box.forward_process(*batch(), {})


@pytest.mark.parametrize(("model", "layer"), [("teacher", "second"), ("student", "student_model.second")])
def test_a_feature_that_is_not_recorded_is_named(model: str, layer: str) -> None:
    config = configured(OURS)
    config[model]["forward_hook"]["output"].remove(layer)
    with pytest.raises(KeyError, match=f"{model}'s `forward_hook` must list '{layer}' under `output`, got"):
        boxed(config).forward_process(*batch(), {})


def test_the_examples_file_trains_student_regressors_and_variances() -> None:
    pytest.importorskip("sklearn")
    config = yaml_files.load_yaml_file(EXAMPLE / "vid.yaml")
    models = config["models"]
    box = distillation.get_distillation_box(
        models["teacher_model"],
        models["student_model"],
        config["datasets"],
        config["train_student"],
        torch.device("cpu"),
        None,
        False,
        1,
    )
    before = copy.deepcopy(box.student_model.state_dict())
    box.pre_epoch_process(epoch=0)
    box.post_forward_process(box.forward_process(*next(iter(box.train_data_loader))))
    moved = {name for name, p in box.student_model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name, _ in box.student_model.named_parameters()}
    assert {"regressor_dict.regressor1.log_scale", "regressor_dict.regressor3.regressor.4.weight"} <= moved


def run(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )


def test_the_example_runs() -> None:
    pytest.importorskip("sklearn")
    pytest.importorskip("tqdm")
    lines = run_example("torchdistill/train.py", "--epochs", "2", "--steps", "2")
    assert [line.split(":")[0] for line in lines] == [
        f"{name}, epoch {epoch}" for name in ("teacher", "student") for epoch in (1, 2)
    ]


def test_without_torchdistill_the_error_says_what_to_install() -> None:
    result = run(
        "import sys; sys.modules['torchdistill'] = None; import vidfast\n"
        "assert not [name for name in sys.modules if name.startswith('vidfast.integrations')]\n"
        "import vidfast.integrations.torchdistill"
    )
    assert "ImportError: vidfast.integrations.torchdistill needs torchdistill: pip install" in result.stderr
