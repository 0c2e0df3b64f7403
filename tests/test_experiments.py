"""Each experiment runs from its command, at its smallest size, and writes what it says."""

import argparse
import contextlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import SMALL
from torchvision.io import decode_image

import compare
import cost
import data
import loader
import mixing_ratio
import picture
import robustness
import rules
import runs
import swin
import tl_align
import train as script
import transfer
import transmix
import vit
import weighing

pytestmark = pytest.mark.usefixtures("one_thread")
EXPERIMENTS = Path(runs.__file__).parent


def command(tmp_path, name, *args):
    line = [sys.executable, EXPERIMENTS / name, *map(str, args)]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("given", [True, False], ids=["a folder", "its own images"])
def test_loader(tmp_path, folder, given, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    args = [folder / "train"] if given else []
    args += ["--images", 8, "--rounds", 1, "--size", 64]
    monkeypatch.setattr(sys, "argv", ["loader.py", *map(str, args)])
    loader.main()
    assert "| decode once, crop three times |" in capsys.readouterr().out
    assert (tmp_path / "runs" / "loader" / "augmented.png").stat().st_size > 10_000


def test_cost(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    args = [
        "--models",
        "vit_micro",
        "--sizes",
        32,
        "--forms",
        "explicit",
        "channels",
        "--rounds",
        1,
    ]
    args += ["--batch-size", 2]
    monkeypatch.setattr(sys, "argv", ["cost.py", *map(str, args), "--device", "cpu"])
    cost.main()
    table = (tmp_path / "runs" / "cost" / "cost.md").read_text()
    assert table.strip() in capsys.readouterr().out and len(table.splitlines()) == 4
    assert table.count("%) | ") == 2 and "failed" not in table


@pytest.mark.parametrize("model", ["vit_micro", "swin_micro"])
def test_picture_of_a_checkpoint(tmp_path, folder, model, monkeypatch, capsys):
    s = script.parse_args(["--data", str(folder), "--model", model, "--device", "cpu"])
    script.fill_defaults(s, 40, 24)
    path = tmp_path / "run" / "best.pt"
    path.parent.mkdir()
    torch.save({"model": script.build_model(s, 2).state_dict(), "args": vars(s)}, path)
    monkeypatch.setattr(sys, "argv", ["picture.py", str(path), "--device", "cpu"])
    picture.main()
    drawn = path.with_name("alignment.png")
    assert capsys.readouterr().out.startswith(f"{drawn}: ")
    cell, columns = picture.CELL + picture.GAP, 2 + 4  # layers
    height = picture.ROWS * (cell + picture.CAPTION) + picture.GAP
    image = decode_image(drawn)
    assert image.shape == (3, height, columns * cell + picture.GAP)
    assert image.float().std() > 30  # not blank
    monkeypatch.setattr(
        sys, "argv", ["picture.py", str(path), "--out", str(tmp_path / "other" / "it.png")]
    )
    picture.main()
    assert (tmp_path / "other" / "it.png").read_bytes() == drawn.read_bytes()
    torch.save(torch.load(path) | {"args": vars(s) | {"residual": "parts"}}, path)  # of compare.py
    picture.main()
    assert (tmp_path / "other" / "it.png").read_bytes() != drawn.read_bytes()


def test_compare_trains_in_processes_and_goes_on_from_what_is_done(here, tmp_path, folder):
    args = ["--data", folder, "--models", "vit_micro", "--methods", "TL-Align", "--seeds", 1]
    out = command(tmp_path, "compare.py", *args, *SMALL, "--jobs", 2)
    assert "train: 2 to do of 2" in out and "| vit_micro | TL-Align |" in out
    shutil.rmtree(next((tmp_path / "runs").rglob("*area-0")))  # as if it had been stopped before
    out, _ = here(compare, *args)
    assert "train: 1 to do of 2" in out


def test_processes_end_with_the_experiment_that_was_killed(tmp_path, folder):
    args = [
        "--data",
        folder,
        "--models",
        "vit_micro",
        "--methods",
        "area",
        "--seeds",
        2,
        "--jobs",
        2,
    ]
    line = [sys.executable, EXPERIMENTS / "compare.py", *args, *SMALL, "--epochs", 100_000]
    group = {"start_new_session": True, "stdout": subprocess.PIPE}
    experiment = subprocess.Popen([*map(str, line)], cwd=tmp_path, **group)
    try:
        until = time.monotonic() + 120
        while len([*tmp_path.rglob("metrics.jsonl")]) < 2:  # both have trained an epoch
            assert experiment.poll() is None and time.monotonic() < until
            time.sleep(0.1)
        experiment.kill()
        experiment.communicate(timeout=30)  # their output ends when none is left to write it
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(experiment.pid, signal.SIGKILL)


def test_compare_covers_every_method(here):
    out, text = here(compare)
    assert text.strip() in out
    assert sum(line.startswith("| vit_micro") for line in text.splitlines()) == len(runs.METHODS)
    assert (
        sum(line.startswith("| swin_micro") for line in text.splitlines()) == len(runs.METHODS) - 1
    )


def test_what_looks_at_models_shares_the_runs_of_area_and_tl_align(here):
    out, text = here(mixing_ratio)
    assert "train: 8 to do of 8" in out
    first, layers = text.split("After each layer")
    assert first.count("| vit_micro |") == 8
    assert all(first.count(f"| {name}_micro |") == 6 for name in ("swin", "mixer", "convnext"))
    assert layers.count("| TL-Align, norm |") == 4 * 8  # eight models of four layers
    out, text = here(rules, "--mixes", 20)
    assert "train: 0 to do of 4" in out and "20 mixes" in text
    assert (
        text.count("| parts less the mean patch |") == 4 and text.count("| truth: objects |") == 4
    )
    assert "nan" not in text
    out, text = here(robustness, "--models", "vit_micro")
    assert "train: 0 to do of 2" in out and "measure: 2 to do of 2" in out
    assert all(f"| {name} |" in text for name in ["clean", "PGD 4/255", *robustness.CORRUPTIONS])
    out, again = here(robustness, "--models", "vit_micro")
    assert "measure: 0 to do of 2" in out and again == text


def test_robustness_takes_checkpoints_and_folders_of_some_of_the_classes(here, folder, tmp_path):
    args = ["--data", folder, "--models", "vit_micro"]
    here(compare, *args, "--methods", "TL-Align")
    checkpoints = sorted((tmp_path / "runs").rglob("best.pt"))
    for severity in "12":
        shutil.copytree(folder / "val" / "dark", tmp_path / "other" / "fog" / severity / "dark")
    _, text = here(
        robustness, *args, "--checkpoints", *checkpoints, "--folders", tmp_path / "other"
    )
    assert "| other | 100.00 | 100.00 | +0.00 |" in text  # one class alone can't be mistaken
    (tmp_path / "none").mkdir()
    with pytest.raises(
        data.UserError, match="none has no folders named by the classes, such as 'dark'"
    ):
        here(robustness, *args, "--checkpoints", *checkpoints, "--folders", tmp_path / "none")


def test_transfer_trains_on_one_half_of_the_classes_and_then_on_the_other(here, tmp_path):
    _, text = here(transfer, "--models", "vit_micro", "--few", 20, "--tune-passes", 1)
    assert "| vit_micro | from scratch |" in text and "of classes checks to rings" in text
    config = json.loads(next(tmp_path.rglob("shapes-second-half-area*/*/config.json")).read_text())
    assert "shapes-first-half" in config["finetune"] and "-area-0/last.pt" in config["finetune"]


def test_a_part_of_the_classes_counts_from_zero(monkeypatch):
    monkeypatch.setattr(data, "SHAPES_TRAIN", 200)
    args = argparse.Namespace(passes=1, data="shapes", root="data", images=30, val_images=0)
    sets = runs.open_part(args, range(5, 10))
    assert sets.classes == data.SHAPES_CLASSES[5:] and len(sets.train) == 30
    assert {sets.train[i][1] for i in range(30)} <= set(range(5))


# --------------------------------------------------------------------------------------------------
# What they measure.


def small_vit():
    """A ViT whose weights are so large that attention is far from uniform."""
    torch.manual_seed(1)
    model = vit.ViT(24, 4, num_classes=7, embed_dim=32, depth=3, num_heads=4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) / parameter.shape[-1] ** 0.5)
    return model


def test_transmix_is_the_last_attention_over_the_mask_averaged_with_the_area():
    torch.manual_seed(0)
    images, labels, model = torch.randn(2, 3, 24, 24), torch.rand(2, 36, 1), small_vit()
    inputs = []

    def keep(block, args):
        inputs.append(args[0])

    hook = model.blocks[-1].register_forward_pre_hook(keep)
    with transmix.record_class_attention(model) as attention:
        logits = model(images)
    hook.remove()
    share = transmix.transmix(labels, attention[0])
    assert torch.equal(logits, model(images)) and not share.requires_grad
    assert len(attention) == 1  # the hook is gone
    block = model.blocks[-1]
    for image in range(2):
        q, k, _ = block.attn.qkv(block.norm1(inputs[0][image])).chunk(3, dim=-1)
        q, k = (t.reshape(37, 4, 8).transpose(0, 1) for t in (q, k))  # (heads, N, head_dim)
        weights = (q[:, 0, None] * k / 8**0.5).sum(-1).softmax(-1).mean(0)[1:]
        seen = (weights * labels[image, :, 0]).sum() / weights.sum()
        torch.testing.assert_close(share[image, 0], (seen + labels[image].mean()) / 2)


@pytest.mark.parametrize("fused", [False, True])
def test_the_loss_of_transmix_is_that_of_its_share_and_no_gradient_goes_through_it(fused):
    torch.manual_seed(0)
    args = argparse.Namespace(patch_size=4, smoothing=0.1)
    images, targets, model = torch.randn(2, 3, 24, 24), torch.tensor([1, 2]), small_vit()
    for block in model.blocks:
        block.attn.fused = fused
    mask = tl_align.cutmix_mask(torch.tensor([[0.5, 0.5, 0.5], [0.3, 0.2, 0.9]]), (24, 24), 4)
    mixed = tl_align.mix(images, mask)
    with transmix.record_class_attention(model) as attention:
        logits = model(mixed)
    share = transmix.transmix(tl_align.token_labels(mask, 4), attention[0])
    expected = tl_align.mixed_cross_entropy(logits, targets, share, 0.1)
    loss = transmix.transmix_loss(model, images, targets, mask, None, args)
    torch.testing.assert_close(loss, expected)
    parameters = [*model.parameters()]
    gradients = torch.autograd.grad(loss, parameters), torch.autograd.grad(expected, parameters)
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(
        transmix.transmix_loss(model, images, targets, None, None, args),
        torch.nn.functional.cross_entropy(model(images), targets, label_smoothing=0.1),
    )


class Linear(torch.nn.Module):
    """A head on the mean of all pixels: what each contributes is known."""

    def forward(self, images):
        return images.mean((2, 3))


def test_the_influence_of_a_source_on_a_linear_model_is_what_it_adds():
    images = torch.zeros(2, 3, 8, 8)
    images[0], images[1] = 1.0, 3.0
    mask = torch.zeros(2, 1, 8, 8)
    mask[:, :, :, 6:] = 1  # a quarter is the partner's
    owners, mixed = torch.stack([1 - mask, mask], dim=1), tl_align.mix(images, mask)
    shares = mixing_ratio.influence(Linear(), mixed, owners, [torch.zeros(1, 3, 8, 8)])
    torch.testing.assert_close(shares[:, 1], torch.tensor([3 / (3 + 3), 1 / (1 + 9)]))
    instead = [
        torch.full((1, 3, 8, 8), value) for value in (0.0, 1.0)
    ]  # half above nothing, on average
    shares = mixing_ratio.influence(Linear(), mixed, owners, instead)
    torch.testing.assert_close(shares[:, 1], torch.tensor([2.5 / (2.5 + 1.5), 0.5 / (0.5 + 7.5)]))


def test_the_influence_is_shapleys_value_for_three_sources():
    owners = torch.zeros(1, 3, 1, 6, 6)
    for k in range(3):
        owners[:, k, :, :, 2 * k : 2 * k + 2] = 1
    levels = (owners * torch.tensor([1.0, 2.0, 3.0]).view(1, 3, 1, 1, 1)).sum(1)

    def product(images):  # a game in which all three together are worth something more
        a, b, c = (
            images[:, :1, :, i].mean((2, 3)) * 3 for i in (slice(0, 2), slice(2, 4), slice(4, 6))
        )
        return a * b * c + c

    shares = mixing_ratio.influence(
        product, levels.expand(-1, 3, -1, -1), owners, [torch.zeros(1, 3, 6, 6)]
    )
    a, b, c = 3.0, 6.0, 9.0
    third = a * b * c / 3
    torch.testing.assert_close(shares, torch.tensor([[third, third, third + c]]) / (3 * third + c))


def test_visible_objects_are_counted_where_the_mix_shows_them():
    masks, mask = torch.zeros(2, 1, 4, 4), torch.zeros(2, 1, 4, 4)
    masks[0, :, :, :2] = 1  # eight pixels, of which the box hides four
    masks[1] = 1  # everywhere: eight in the box
    mask[:, :, :2] = 1
    owners = torch.stack([1 - mask, mask], dim=1)
    torch.testing.assert_close(mixing_ratio.objects(masks, owners), torch.tensor([8 / 12, 4 / 12]))
    assert mixing_ratio.objects(0 * masks, owners).isnan().all()


@torch.no_grad()
@pytest.mark.parametrize("make", [vit.vit_micro, swin.swin_micro])
def test_a_measured_residual_weighs_what_attention_adds_beside_the_token(make):
    torch.manual_seed(0)
    model, images, given = make().double().eval(), torch.randn(2, 3, 32, 32).double(), []
    labels, block = (
        torch.rand(2, (32 // model.patch_size) ** 2, 1).double(),
        next(b for b in model.modules() if isinstance(b, (vit.Block, swin.Block))),
    )
    hooks = [block.register_forward_pre_hook(lambda _, args: given.append(args[0]))]
    hooks.append(block.norm2.register_forward_pre_hook(lambda _, args: given.append(args[0])))
    before, half = (y for y, _ in model.intermediate_labels(images, labels)[:2])
    for hook in hooks:
        hook.remove()
    with weighing.by(model, "norm"):
        logits, aligned = model(images, labels)
        norm = model.intermediate_labels(images, labels)[1][0]
    x, after = given
    added, kept = ((after - x).norm(dim=-1, keepdim=True), x.norm(dim=-1, keepdim=True))
    w = added / (added + kept)
    w = w[:, 1:].reshape(*half.shape) if make is vit.vit_micro else w  # without the class token
    torch.testing.assert_close(norm, (1 - w) * before + w * (2 * half - before))
    assert torch.equal(logits, model(images)) and not torch.equal(aligned, model(images, labels)[1])
    assert torch.equal(model.intermediate_labels(images, labels)[1][0], half)  # as before


def test_scores_are_the_error_and_spearmans_correlation():
    true = torch.rand(1, 40, generator=torch.Generator().manual_seed(0))
    (error, low, high), (rank, *_) = mixing_ratio.scores(true**3 + 0, true)
    assert rank == pytest.approx(1) and error == pytest.approx(
        (true - true**3).mean().item(), rel=1e-5
    )
    assert low < error < high
    assert [*mixing_ratio.scores(1 - true, true)][1][0] == pytest.approx(-1)
    assert mixing_ratio.ranks(torch.tensor([3.0, 1.0, 3.0])).tolist() == [2.0, 0.5, 2.0]


def test_what_goes_twice_as_far_beyond_the_area_is_fitted_by_a_half():
    area, true = torch.rand(2, 3, 40, generator=torch.Generator().manual_seed(0))
    assert mixing_ratio.beyond(area + 2 * (true - area), true, area) == pytest.approx((1, 0.5))


def test_an_interval_is_students():
    mean, half = runs.interval([1.0, 2.0, 3.0])
    assert mean == 2 and half == pytest.approx(2.4843, abs=1e-3)
    assert runs.signed([1.5]) == "+1.50" and runs.signed([1.0, 2.0, 3.0]) == "+2.00 ± 2.48"
    published = {1: 12.706, 9: 2.262, 10: 2.228, 23: 2.069, 60: 2.0}
    assert all(runs.student(n) == pytest.approx(t, abs=3e-3) for n, t in published.items())
    n = runs.needed(values := [0.3, -0.9, 1.4, 0.2], 0.5)

    def width(n):
        return runs.student(n - 1) * statistics.stdev(values) / n**0.5

    assert width(n) <= 0.5 < width(n - 1)


def test_attacks_stay_within_their_radius_and_raise_the_loss():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 64, 5)).requires_grad_(
        False
    )
    images, targets = torch.rand(8, 3, 8, 8), torch.randint(5, (8,))
    loss = torch.nn.functional.cross_entropy(robustness.answer(model, images), targets)
    for steps in (1, robustness.STEPS):
        at = robustness.attack(model, images, targets, 4, steps)
        assert (at - images).abs().max() <= 4 / 255 + 1e-6 and 0 <= at.min() and at.max() <= 1
        assert torch.nn.functional.cross_entropy(robustness.answer(model, at), targets) > loss


def test_corruptions_keep_the_shape_and_grow_with_severity():
    images = data.shapes(4, 0)[0].float() / 255
    for name, corrupt in robustness.CORRUPTIONS.items():
        out = [corrupt(images, t, data.generator(name)).clamp(0, 1) for t in (0.2, 1.0)]
        change = [(x - images).abs().mean().item() for x in out]
        assert out[0].shape == images.shape and 0 < change[0] < change[1], name


def test_calibration_error_is_the_gap_between_confidence_and_accuracy():
    logits = torch.tensor([[0.8, 0.2], [0.8, 0.2], [0.8, 0.2], [0.8, 0.2]]).log()
    error = robustness.calibration_error(logits, torch.tensor([0, 0, 1, 1]))
    assert error == pytest.approx(30)  # sure by 80 %, right in half


def test_blanking_takes_the_share_of_patches_that_is_named():
    gone = (robustness.blank(torch.ones(2, 3, 32, 32), 0.25, 4) != 1).all(1)
    assert gone.float().mean((1, 2)).tolist() == [0.25, 0.25]
