"""Each experiment runs at a small size, and measures what it says."""

import argparse
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
from torch.utils.data import Subset, TensorDataset
from torchvision.io import decode_image

import common
import compare
import cost
import data
import loader
import mixing_ratio
import oracle
import picture
import robustness
import tl_align
import train as script
import transfer
import transmix
import vit

pytestmark = pytest.mark.usefixtures("one_thread")
EXPERIMENTS = Path(common.__file__).parent


# ------------------------------------------------------------------------------------------------
# Each script.


@pytest.mark.parametrize("given", [True, False], ids=["a folder", "its own images"])
def test_loader(here, folder, given):
    words = [folder / "train"] if given else []
    words += ["--images", 8, "--rounds", 1, "--size", 64]
    _, text = here(loader, *words, common_flags=False)
    assert "| decode once, crop three times |" in text


def test_cost(here):
    words = ["--models", "vit_micro", "--img-size", 32, "--rounds", 1]
    words += ["--batch-size", 2, "--device", "cpu"]
    out, text = here(cost, *words, common_flags=False)
    assert text in out
    for form in ("explicit", "fused"):
        for target in cost.TARGETS:
            assert text.count(f"| vit_micro | 32 | {form} | {target} |") == 1


def make_checkpoint(path, folder, model="vit_micro", **options):
    settings = script.parse_args(["--data", str(folder), "--model", model, "--device", "cpu"])
    script.fill_defaults(settings, 40, 24)
    path.parent.mkdir(exist_ok=True)
    state = script.build_model(settings, 2).state_dict()
    torch.save({"model": state, "args": vars(settings)}, path)
    return path


def draw_picture(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["picture.py", *map(str, words), "--device", "cpu"])
    picture.main()


@pytest.mark.parametrize("model", ["vit_micro", "swin_micro"])
def test_picture_of_a_checkpoint(tmp_path, folder, model, monkeypatch, capsys):
    path = make_checkpoint(tmp_path / "run" / "best.pt", folder, model)
    draw_picture(monkeypatch, path)
    drawn = path.with_name("alignment.png")
    assert capsys.readouterr().out.startswith(f"{drawn}: ")
    cell, num_columns = picture.CELL + picture.GAP, 2 + 4  # layers
    height = picture.NUM_ROWS * (cell + picture.CAPTION) + picture.GAP
    image = decode_image(drawn)
    assert image.shape == (3, height, num_columns * cell + picture.GAP)
    assert image.float().std() > 30  # not blank


def test_picture_needs_validation_images_only(tmp_path, folder, monkeypatch):
    path = make_checkpoint(tmp_path / "run" / "best.pt", folder)
    draw_picture(monkeypatch, path)
    shutil.rmtree(folder / "train")
    draw_picture(monkeypatch, path, "--out", tmp_path / "other" / "picture.png")
    expected = path.with_name("alignment.png").read_bytes()
    assert (tmp_path / "other" / "picture.png").read_bytes() == expected


def test_picture_of_others_weights_with_photographs_of_no_class(tmp_path, folder, monkeypatch):
    path = tmp_path / "vit.pth"
    torch.save(vit.vit_micro(img_size=48, patch_size=8, num_classes=7).state_dict(), path)
    photographs = folder / "val" / "dark"
    draw_picture(monkeypatch, path, "--model", "vit_micro", "--data", photographs)
    assert decode_image(tmp_path / "alignment.png").float().std() > 30
    words = ["--eval", path, "--model", "vit_micro", "--data", photographs, "--device", "cpu"]
    settings = script.parse_args([str(word) for word in words])
    model = picture.open_model(settings, path, picture.open_images(settings))
    assert (model.img_size, model.patch_size, len(model.head.weight)) == (48, 8, 7)


def test_compare_covers_every_method_and_goes_on_from_what_is_done(here, tmp_path):
    out, text = here(compare)
    assert "9 of 9 runs to do" in out and text in out
    for model, num_methods in (("vit_micro", 5), ("swin_micro", 4)):  # TransMix is for ViTs
        assert text.count(f"| {model} |") == num_methods
    shutil.rmtree(next(tmp_path.rglob("vit_micro-area-0-*")))  # as if it had been stopped before
    out, again = here(compare)
    assert "1 of 9 runs to do" in out and again == text


def test_a_run_on_other_images_is_not_taken_for_done(here, folder):
    words = ["--data", folder, "--images", 0, "--models", "vit_micro", "--methods", "area"]
    assert "1 of 1 runs to do" in here(compare, *words)[0]
    assert "0 of 1 runs to do" in here(compare, *words)[0]
    shutil.copy(folder / "train" / "dark" / "00.jpg", folder / "train" / "dark" / "more.jpg")
    assert "1 of 1 runs to do" in here(compare, *words)[0]
    assert "1 of 1 runs to do" in here(compare, *words, "--passes", 2)[0]


def test_others_share_the_runs_of_compare(here, tmp_path):
    vit_only = ["--models", "vit_micro"]
    here(compare, *vit_only, "--methods", "TL-Align")
    out, text = here(mixing_ratio)
    assert "2 of 4 runs to do" in out  # of swin_micro
    assert text.count("| TL-Align | TL-Align |") == 2 * 4  # two models of four layers
    assert text.count("| TransMix |") == 2 and "nan" not in text
    charts = len(list(tmp_path.rglob("mixing_ratio-*.png")))
    assert charts == 4 or out.count("matplotlib is not installed") == 4
    out, text = here(robustness, *vit_only, "--eval-images", 20)
    assert "0 of 2 runs to do" in out
    for name in ("clean", "PGD 4/255", "50% blanked", "blur 0.031", "calibration error"):
        assert f"| {name} |" in text


def test_robustness_takes_checkpoints_and_folders_of_some_of_the_classes(here, folder, tmp_path):
    checkpoint = make_checkpoint(tmp_path / "run" / "best.pt", folder)
    others = [tmp_path / "other" / name for name in ("dark", "light")]
    for other in others:
        shutil.copytree(folder / "val" / other.name, other / other.name)
    words = ["--data", folder, "--eval-images", 0, "--checkpoints", checkpoint, "--folders"]
    _, text = here(robustness, *words, *others)
    assert "/dark | 100.00 |" in text and "/light | 100.00 |" in text  # one class: no mistakes
    (tmp_path / "none").mkdir()
    with pytest.raises(data.UserError, match="none has no folder named by a class, such as 'dark'"):
        here(robustness, *words, tmp_path / "none")


def test_transfer_trains_on_half_of_the_classes_and_then_on_the_other_half(here, tmp_path):
    _, text = here(
        transfer, "--models", "vit_micro", "--finetune-images", 20, "--finetune-passes", 1
    )
    assert text.count("| vit_micro |") == 3
    config = next(tmp_path.rglob("second-half-vit_micro-area-0-*/config.json"))
    finetune = json.loads(config.read_text())["finetune"]
    assert "/first-half-vit_micro-area-0-" in finetune and finetune.endswith("/last.pt")
    log = config.with_name("log.txt").read_text()
    assert "has no head for these 5 classes" in log  # the file is loaded


# ------------------------------------------------------------------------------------------------
# Processes.


def start_compare(folder, tmp_path):
    words = ["--data", folder, "--models", "vit_micro", "--methods", "area", "no mixing"]
    words += [*SMALL, "--images", 0, "--seeds", 1, "--jobs", 2, "--passes", 100_000]
    return subprocess.Popen(
        [str(word) for word in [sys.executable, EXPERIMENTS / "compare.py", *words]],
        cwd=tmp_path,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_logs(tmp_path, experiment, text):
    """Until the logs of both runs have such a line."""
    deadline = time.time() + 120
    while sum(text in log.read_text() for log in tmp_path.rglob("log.txt")) < 2:
        assert experiment.poll() is None and time.time() < deadline
        time.sleep(0.1)


def test_stopped_and_killed_runs_leave_no_process_and_continue(folder, tmp_path):
    experiment = start_compare(folder, tmp_path)
    try:
        wait_for_logs(tmp_path, experiment, "  loss ")
        os.killpg(experiment.pid, signal.SIGINT)  # as a terminal does
        # The pipes are closed when no process is left to write to them.
        _, err = experiment.communicate(timeout=30)
    finally:
        experiment.kill()
    assert experiment.returncode == 130
    assert err == "stopped: the same command continues\n"
    experiment = start_compare(folder, tmp_path)
    try:
        wait_for_logs(tmp_path, experiment, "resuming after step")
        experiment.kill()
        experiment.communicate(timeout=30)
    finally:
        experiment.kill()


# ------------------------------------------------------------------------------------------------
# What they measure.


def test_a_half_of_the_classes_counts_from_zero(monkeypatch):
    monkeypatch.setattr(data, "SHAPES_TRAIN", 200)
    half = transfer.half_of.__wrapped__("shapes", is_second=True)
    assert half.classes == data.SHAPES_CLASSES[5:]
    classes = [int(target) for _, target in data.open_datasets("shapes").train]
    assert [target for _, target in half.train] == [c - 5 for c in classes if c >= 5]


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


def test_the_objects_share_is_counted_where_the_mix_shows_them():
    objects, mask = torch.zeros(2, 1, 4, 4), torch.zeros(2, 1, 4, 4)
    objects[0, :, :, :2] = 1  # eight pixels, of which the box hides four
    objects[1] = 1  # everywhere: eight in the box
    mask[:, :, :2] = 1
    expected = torch.tensor([[8 / 12], [4 / 12]])
    torch.testing.assert_close(oracle.object_share(objects, mask), expected)
    assert oracle.object_share(0 * objects, mask).isnan().all()


def test_the_oracle_sees_the_masks_of_the_images(monkeypatch):
    monkeypatch.setattr(data, "SHAPES_TRAIN", 20)
    settings = argparse.Namespace(img_size=32, batch_size=4, aug_repeats=1, seed=3, workers=0)
    settings.device = "cpu"
    _, targets, masks = data.shapes(20, 0)
    images = 255 * masks[:, None].expand(-1, 3, -1, -1).to(torch.uint8)  # white where the object is
    dataset = Subset(TensorDataset(images, targets), torch.randperm(20)[:12].tolist())
    loader = oracle.ObjectLoader(dataset, settings, slice(None))
    plain_loader = data.make_train_loader(dataset, settings, slice(None))
    for epoch, first_step in ((0, 2), (1, 0)):  # from the third step on, over the end of an epoch
        loader.set_epoch(epoch, first_step)
        plain_loader.set_epoch(epoch, first_step)
        batches = list(zip(loader, plain_loader, strict=True))
        assert len(batches) == len(loader) - first_step
        for (images, pairs), (plain_images, plain_targets) in batches:
            classes, masks = map(torch.stack, zip(*pairs, strict=True))
            assert torch.equal(images, plain_images) and torch.equal(classes, plain_targets)
            assert ((masks == 1) == (images > 127)).float().mean() > 0.995  # but for rounding


def test_the_oracles_target_is_the_objects_share_or_the_area_where_none_is_seen():
    settings = argparse.Namespace(smoothing=0.1)
    torch.manual_seed(0)
    model, images = vit.vit_micro(num_classes=10), torch.randn(4, 3, 32, 32)
    targets = torch.tensor([3, 1, 4, 1])
    objects = torch.zeros(4, 1, 32, 32, dtype=torch.uint8)
    objects[0, :, :8] = 1  # 8 x 32 pixels
    objects[1, :, :8, :16] = 1  # 8 x 16; the mixes of the other two show no object
    mask = torch.zeros(4, 1, 32, 32)
    mask[..., :8] = 1
    share = torch.tensor([[8 / (24 + 8)], [8 / (8 + 8)], [1 / 4], [1 / 4]])
    loss = oracle.object_loss(
        model, images, list(zip(targets, objects, strict=True)), mask, None, settings
    )
    logits = model(tl_align.mix(images, mask))
    expected = tl_align.mixed_cross_entropy(logits, targets, share, 0.1)
    torch.testing.assert_close(loss, expected)


class MeanColour(torch.nn.Module):
    """A head on the mean of all pixels: what each contributes is known."""

    def forward(self, images):
        return images.mean((2, 3))


def test_the_influence_of_a_source_on_a_linear_model_is_what_it_adds():
    images = torch.zeros(2, 3, 8, 8)
    images[0], images[1] = 1.0, 3.0
    mask = torch.zeros(2, 1, 8, 8)
    mask[:, :, :, 6:] = 1  # a quarter is the partner's
    mixed = tl_align.mix(images, mask)
    shares = mixing_ratio.influence(MeanColour(), mixed, mask, [torch.zeros(1, 3, 8, 8)])
    torch.testing.assert_close(shares, torch.tensor([3 / (3 + 3), 1 / (1 + 9)]))
    # Half above nothing, on average.
    blanks = [torch.full((1, 3, 8, 8), value) for value in (0.0, 1.0)]
    shares = mixing_ratio.influence(MeanColour(), mixed, mask, blanks)
    torch.testing.assert_close(shares, torch.tensor([2.5 / (2.5 + 1.5), 0.5 / (0.5 + 7.5)]))


def test_the_influence_is_shapleys_value():
    mixed = torch.tensor([2.0, 3.0]).repeat_interleave(2).expand(1, 3, 4, 4)
    mask = torch.tensor([0.0, 1.0]).repeat_interleave(2).expand(1, 1, 4, 4)

    def product(images):  # a game in which both together are worth something more
        own, pasted = images[:, :1, 0, 0], images[:, :1, 0, 3]
        return own * pasted + pasted

    share = mixing_ratio.influence(product, mixed, mask, [torch.zeros(1, 3, 4, 4)])
    torch.testing.assert_close(share, torch.tensor([(3 + 3) / (3 + 3 + 3)]))  # half of 2 * 3, and 3


def test_the_mean_patch_is_the_mean_over_patches():
    images = torch.arange(64.0).view(1, 1, 8, 8).expand(2, 3, -1, -1)
    blank = mixing_ratio.mean_patch(images, 4)
    assert blank.shape == (1, 3, 8, 8)
    assert (
        blank[0, 0, 5, 2]
        == (images[0, 0, 1, 2] + images[0, 0, 1, 6]) / 4
        + (images[0, 0, 5, 2] + images[0, 0, 5, 6]) / 4
    )


def test_errors_leave_out_what_has_no_truth():
    shares, truth = (
        torch.tensor([[0.5, 0.1, 0.2], [0.0, 0.3, 0.4]]),
        torch.tensor([[0.0, 0.2, 0.2]]),
    )
    assert mixing_ratio.errors(shares, truth) == pytest.approx([0.2, 0.1])
    truth[0, 0] = torch.nan  # a mix that shows no object
    assert mixing_ratio.errors(shares, truth) == pytest.approx([0.05, 0.15])


def test_what_goes_twice_as_far_beyond_the_area_is_fitted_by_a_half():
    area, true = torch.rand(2, 3, 40, generator=torch.Generator().manual_seed(0))
    said = area + 2 * (true - area)
    found = {("area", ""): area, ("influence", ""): true, ("TransMix", ""): said}
    assert mixing_ratio.beyond_area(found, ("TransMix", "")) == ["1.00", "0.50"]


def test_a_paired_interval_is_students():
    mean, half = common.interval([1.0, 2.0, 3.0])
    assert mean == 2 and half == pytest.approx(2.4843, abs=1e-3)
    assert common.show([1.0, 2.0, 3.0]) == "2.00 ± 2.48" and common.show([1.5]) == "1.50"
    assert common.show_difference([2.0, 4.0, 6.0], [1.0, 2.0, 3.0]) == "+2.00 ± 2.48"
    values = [float(i) for i in range(100)]
    published = {2: 12.706, 10: 2.262, 24: 2.069, 100: 2.042}  # from 32 on that of 31
    for n, t in published.items():
        mean, half = common.interval(values[:n])
        assert half == pytest.approx(t * statistics.stdev(values[:n]) / n**0.5)


def test_half_of_the_ceilings_gain_is_half_for_every_resample():
    ceiling = [1.0, 2.0, 3.0, 2.0]
    assert compare.part_of([0.5, 1.0, 1.5, 1.0], ceiling) == "50 % (50 to 50)"
    assert compare.part_of(ceiling, [-1.0, 2.0, 1.0, -1.0]) == ""  # no gain that can be told


def test_calibration_error_is_the_gap_between_confidence_and_accuracy():
    logits = torch.tensor([[0.8, 0.2]] * 4).log()
    error = common.calibration_error(logits, torch.tensor([0, 0, 1, 1]))
    assert error == pytest.approx(30)  # sure by 80 %, right in half
    # Half of the images in one bin, half in another: too sure by 30 %, not sure enough by 40 %.
    logits = torch.tensor([[0.8, 0.2]] * 4 + [[0.4, 0.6]] * 4).log()
    error = common.calibration_error(logits, torch.tensor([0, 0, 1, 1, 1, 1, 1, 1]))
    assert error == pytest.approx((30 + 40) / 2)


def test_attacks_stay_within_their_radius_and_raise_the_loss():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 64, 5))
    images, targets = torch.rand(8, 3, 8, 8), torch.randint(5, (8,))

    def loss(images):
        return torch.nn.functional.cross_entropy(robustness.predict_logits(model, images), targets)

    for steps in (1, 10):
        attacked = robustness.attack(model, images, targets, 4, steps)
        assert (attacked - images).abs().max() <= 4 / 255 + 1e-6
        assert 0 <= attacked.min() and attacked.max() <= 1
        assert loss(attacked) > loss(images)


def test_blanking_takes_the_share_of_patches_that_is_named():
    gone = (robustness.blank(torch.ones(2, 3, 32, 32), 0.25, 4) != 1).all(1)
    assert gone.float().mean((1, 2)).tolist() == [0.25, 0.25]


def test_noise_has_its_deviation_and_a_blur_keeps_the_mean():
    images = torch.full((2, 3, 64, 64), 0.5)
    noisy = robustness.add_noise(images, 0.1)
    assert statistics.stdev(noisy.flatten().tolist()) == pytest.approx(0.1, rel=0.05)
    images = torch.rand(2, 3, 64, 64)
    blurred = robustness.blur(images, 1 / 32)
    assert blurred.mean() == pytest.approx(images.mean().item(), abs=0.01)
    assert blurred.std() < images.std() / 2
