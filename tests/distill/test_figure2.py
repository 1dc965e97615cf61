"""Figure 2: its numbers against the Gaussian written out, and the experiment from options to files."""

from __future__ import annotations

import csv
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from small_networks import PAIRS, SmallNet
from torch import Tensor

from vidfast.distill import VID, Distiller
from vidfast.distill.data import DATA_SETS, ImageData, Images, Normalisation, load
from vidfast.distill.errors import UserError
from vidfast.distill.experiments import figure2
from vidfast.distill.experiments.base import Options
from vidfast.distill.experiments.heatmaps import fitted, normalised
from vidfast.distill.experiments.likelihood import MarginalMaps, VIDMaps, correlation, magnitude, read
from vidfast.distill.trainer import Trainer


def built(student: SmallNet, teacher: SmallNet) -> tuple[Distiller, VID]:
    vid = VID(PAIRS, regressor="linear", init_var=0.7, eps=1e-3)
    distiller = Distiller(student, teacher, [vid], example=torch.randn(2, 1, 8, 8))
    with torch.no_grad():
        for nll in vid.likelihoods:
            nll.alpha += torch.randn_like(nll.alpha)
    return distiller, vid


def layers(network: SmallNet, images: Tensor) -> list[Tensor]:
    network.eval()
    with torch.no_grad():
        first = network.first(images)
        return [first, network.second(first)]


def gaussian(t: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """sum_c log N(t_chw; mean, variance_c), by torch's own Normal."""
    scale = variance.sqrt()[:, None, None].expand_as(t)
    return torch.distributions.Normal(mean, scale).log_prob(t).sum(1)


def test_readings_are_the_gaussians_over_all_images(student: SmallNet, teacher: SmallNet) -> None:
    """Means over all positions and over dark and bright ones, whatever the batches; maps of the images asked for."""
    distiller, vid = built(student, teacher)
    images = torch.rand(7, 1, 8, 8)
    data = Images(images, torch.zeros(7, dtype=torch.int64))
    # Inputs are pixels: mean 0 and standard deviation 1 leave them as they are.
    pixels = Normalisation(torch.zeros(1), torch.ones(1))
    distiller.train()
    teacher.eval()
    found = read(VIDMaps(distiller, vid), vid.pair_names(), data, [4, 1], bright=pixels, batch_size=3)
    assert distiller.student.training
    for i, reading in enumerate(found):
        s, t = layers(student, images)[i], layers(teacher, images)[i]
        alpha = vid.likelihoods[i].alpha.detach().double()
        variance = torch.log1p(alpha.exp()) + 1e-3
        log_q = gaussian(t.double(), vid.regressors[i](s).detach().double(), variance)
        size = log_q.shape[-1]
        pooled = images[:, 0].unflatten(1, (size, -1)).unflatten(3, (size, -1)).mean((2, 4))
        assert reading.nats == pytest.approx(float(log_q.mean()), rel=1e-5)
        assert reading.background == (
            pytest.approx(float(log_q[pooled <= 0.1].mean()), rel=1e-5) if (pooled <= 0.1).any() else None
        )
        assert reading.foreground == pytest.approx(float(log_q[pooled >= 0.5].mean()), rel=1e-5)
        assert reading.per_element == pytest.approx(reading.nats / t.shape[1])
        torch.testing.assert_close(reading.maps, log_q[[4, 1]].float(), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(reading.magnitudes, t[[4, 1]].abs().mean(1), rtol=1e-5, atol=1e-6)
        expected = [
            torch.corrcoef(torch.stack([log_q[b].flatten(), t[b].abs().mean(0).double().flatten()]))[0, 1]
            for b in range(7)
        ]
        assert reading.magnitude == pytest.approx(float(torch.stack(expected).mean()), abs=1e-4)


def test_q_without_a_student_has_each_channels_moments(student: SmallNet, teacher: SmallNet) -> None:
    distiller, vid = built(student, teacher.eval())
    seen, unseen = torch.randn(9, 1, 8, 8), torch.randn(4, 1, 8, 8)
    marginal = MarginalMaps(
        VIDMaps(distiller, vid), Images(seen, torch.zeros(9, dtype=torch.int64)), floor=1e-6, batch_size=4
    )
    for i, (log_q, _) in enumerate(marginal(unseen)):
        t, new = layers(teacher, seen)[i].double(), layers(teacher, unseen)[i].double()
        mean, variance = t.mean((0, 2, 3)), t.var((0, 2, 3), unbiased=False)
        expected = gaussian(new, mean[:, None, None].expand_as(new), variance)
        torch.testing.assert_close(log_q.double(), expected, rtol=1e-4, atol=1e-3)


def test_correlation_is_per_image_and_nan_where_flat() -> None:
    a = torch.tensor([[[0.0, 1.0], [2.0, 3.0]], [[0.0, 1.0], [2.0, 3.0]], [[1.0, 1.0], [1.0, 1.0]]])
    b = torch.stack([2 * a[0] + 1, -a[1], a[0]])
    found = correlation(a, b)
    assert found[:2].tolist() == pytest.approx([1.0, -1.0])
    assert math.isnan(found[2])
    assert magnitude(torch.tensor([[[[-1.0]], [[3.0]]]])).tolist() == [[[2.0]]]


def test_maps_are_normalised_one_by_one_and_fitted_to_the_image() -> None:
    maps = torch.stack([torch.tensor([[-5.0, -3.0], [-4.0, -1.0]]), torch.full((2, 2), 7.0)])
    found = normalised(maps)
    torch.testing.assert_close(found[0], torch.tensor([[0.0, 0.5], [0.25, 1.0]]))
    assert found[1].tolist() == [[0.0, 0.0], [0.0, 0.0]]
    larger = fitted(found, (8, 6))
    assert larger.shape == (2, 8, 6)
    assert larger[0, -1].tolist() == pytest.approx([0.25, 0.25, 0.5, 0.75, 1.0, 1.0])


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> str:
    """Few digits at their own size, so that a run takes a second."""

    def data(root: Path | None = None) -> ImageData:
        digits = load("digits")
        every_25th = torch.arange(0, len(digits.test), 25)
        return replace(digits, test=digits.test.subset(every_25th))

    monkeypatch.setitem(DATA_SETS._things, "tiny", data)
    return "tiny"


def options(folder: Path, data: str, **more: Any) -> Options:
    given: dict[str, Any] = {"seeds": 1, "samples": (2,), "steps": 8, "teacher_steps": 2, "quiet": True}
    return Options(folder=folder, data=data, device="cpu", cache=folder.parent / "cache", **(given | more))


def test_the_experiment(
    tmp_path: Path, tiny: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files, what they hold, that the frozen student stays as it was, and that nothing is done twice."""
    folder = tmp_path / "run"
    figure2.run(options(folder, tiny, seeds=2))
    out = capsys.readouterr().out
    report = (folder / "report.md").read_text()
    for name in ("figure2.png", "figure2-nats.png", "figure2-log-likelihood.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
        assert f"({name})" in report
        assert str(folder / name) in out

    rows = list(csv.DictReader((folder / "log_likelihood.csv").open()))
    last = {(r["student"], r["seed"], r["pair"]): r for r in rows if r["step"] in ("8", "")}
    pairs = [f"{layer} -> {layer}" for layer in ("stem", "group1", "group2", "group3")]
    assert set(last) == {
        (arm, seed, pair)
        for arm in ("vid", "no transfer", "q without a student")
        for seed in "01"
        for pair in pairs
    }
    assert {r["step"] for r in rows} == {"", "0", "1", "2", "3", "4", "6", "8"}
    for pair in pairs:
        gaps = [
            float(last["vid", seed, pair]["nats_per_position"])
            - float(last["no transfer", seed, pair]["nats_per_position"])
            for seed in "01"
        ]
        assert f"{sum(gaps) / 2:+.1f} ± {abs(gaps[0] - gaps[1]) / math.sqrt(2):.1f}" in report

    # q alone was optimised: the student is the one trained without transfer, BatchNorm's statistics included.
    students = {path.parent.name: path for path in (folder / "runs").glob("*/student.safetensors")}
    frozen = next(path for name, path in students.items() if name.startswith("no-transfer-seed1"))
    trained = [path for name, path in students.items() if not name.startswith(("no-transfer", "vid"))]
    weights = safetensors.torch.load_file(frozen)
    alike = [
        all(torch.equal(value, weights[key]) for key, value in safetensors.torch.load_file(path).items())
        for path in trained
    ]
    assert sorted(alike) == [False, True]
    begun, ended = (
        float(
            next(r for r in rows if r["student"] == "no transfer" and r["step"] == step)["nats_per_position"]
        )
        for step in ("0", "8")
    )
    assert begun != ended

    def refuse(self: Trainer, **_: Any) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(Trainer, "fit", refuse)
    monkeypatch.setattr(figure2, "pictures", lambda *_: [])
    assert " calls on" not in report
    before = (folder / "log_likelihood.csv").read_bytes()
    figure2.run(options(folder, tiny, seeds=2))
    assert (folder / "log_likelihood.csv").read_bytes() == before
    assert " s in 2 calls on" in (folder / "report.md").read_text()


def test_an_interrupted_run_goes_on_to_the_same_numbers(
    tmp_path: Path, tiny: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted in VID training and again while q alone is optimised, each after a checkpoint and a reading."""
    monkeypatch.setattr(figure2, "pictures", lambda *_: [])
    figure2.run(options(tmp_path / "whole", tiny))
    save = figure2._save
    for arm in ("vid", "no-transfer"):

        def interrupted(path: Path, readings: list[Any], arm: str = arm) -> None:
            if path.parent.name.startswith(arm) and path.name == "step-000006.pt":
                raise KeyboardInterrupt
            save(path, readings)

        monkeypatch.setattr(figure2, "_save", interrupted)
        with pytest.raises(KeyboardInterrupt):
            figure2.run(options(tmp_path / "parts", tiny))
        assert list((tmp_path / "parts" / "runs").glob(f"{arm}*/checkpoint.pt"))
    monkeypatch.setattr(figure2, "_save", save)
    figure2.run(options(tmp_path / "parts", tiny))
    found = [(tmp_path / name / "log_likelihood.csv").read_bytes() for name in ("whole", "parts")]
    assert found[0] == found[1]


def test_damaged_files_are_made_again(tmp_path: Path, tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figure2, "pictures", lambda *_: [])
    folder = tmp_path / "run"
    figure2.run(options(folder, tiny))
    before = (folder / "log_likelihood.csv").read_bytes()
    for name in ("vid*/step-000003.pt", "vid*/marginal.pt", "no-transfer*/step-000008.pt"):
        (path,) = (folder / "runs").glob(name)
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        (path.parent / "checkpoint.pt").write_bytes(b"PK nonsense")
    figure2.run(options(folder, tiny))
    assert (folder / "log_likelihood.csv").read_bytes() == before
    assert not list(folder.glob("runs/*/checkpoint.pt"))


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"data": "digit"}, "digits"),
        ({"samples": (2, 5)}, "one number of labelled images"),
        ({"samples": (100_000,)}, "100000 images a class"),
        ({"seeds": 0}, "one seed"),
        ({"arms": ("KD",)}, "no rows"),
        ({"root": Path("somewhere")}, "reads no files"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_wrong_use_fails_before_anything_is_written(tmp_path: Path, more: dict[str, Any], said: str) -> None:
    folder = tmp_path / "run"
    with pytest.raises(UserError, match=said):
        figure2.run(replace(options(folder, "digits"), **more))
    assert not folder.exists()
    assert not (tmp_path / "cache").exists()


def test_plans() -> None:
    """The embedded digits are enlarged; the full budget has the networks of the paper's table 1."""
    quick = figure2.plan(Options(folder=Path("x")))
    full = figure2.plan(Options(folder=Path("x"), data="cifar10", budget="full"))
    assert quick.data.name == "digits32"
    assert quick.stages == (0, 60, 300)
    assert (full.data.name, full.teacher, full.student) == ("cifar10", "wrn-40-2", "wrn-16-1")
    assert full.term.options["regressor"] == "conv3"
