"""Promises of the training script: recipes and settings, mixing, checkpoints, and errors in one
line."""

import argparse
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import TINY, assert_one_line, assert_same_weights, make_args, read_weights

import data
import tl_align
import train as script
import vit

README = (Path(__file__).parent.parent / "README.md").read_text()
IMAGENET = {"image_size": 375, "num_images": 1_281_167}


def read_files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# --- Runs.


@pytest.mark.parametrize(
    "flags",
    [
        (),
        ("--targets", "area", "--mix", "switch"),
        ("--mix", "none"),
        ("--mix", "mixup"),
        ("--model", "swin_micro"),
        ("--drop-path", 0.2, "--clip-grad", 1, "--augment", "full", "--ema-decay", 0.9),
        ("--bf16", "--aug-repeats", 3),
    ],
    ids=str,
)
def test_run_writes_checkpoints_metrics_and_settings(train, folder, tmp_path, flags):
    args = ("--data", folder, *TINY, "--out", "run", *flags)
    done = train(*args)
    assert done.status == 0, done.err
    run = tmp_path / "run"
    files = read_files(run)
    assert set(files) == {"last.pt", "best.pt", "metrics.jsonl", "config.json"}
    assert done.out.splitlines()[-1].endswith("python experiments/picture.py run/best.pt")
    lines = [json.loads(line) for line in files["metrics.jsonl"].splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2] and lines[-1]["step"] == 6
    names = {"train_loss", "val_top1", "val_top5", "lr", "images_per_s", "data_wait"}
    assert names | {"epoch", "step"} == lines[0].keys()
    assert json.loads(files["config.json"])["batch_size"] == 8
    again = train(*args)
    best = max(line["val_top1"] for line in lines)
    assert again.status == 0 and f"run is finished: best top-1 {best:.2f} %" in again.out
    assert read_files(run) == files
    evaluated = train("--eval", run / "last.pt", "--workers", 0)  # with its own data and model
    assert f"top-1 {lines[-1]['val_top1']:.2f} %" in evaluated.out, evaluated.err


def test_other_settings_are_refused_and_overwrite_nothing(train, folder, tmp_path):
    args = ("--data", folder, *TINY, "--out", "run")
    assert train(*args).status == 0
    files = read_files(tmp_path / "run")
    other = train(*args, "--lr", 0.1, "--mix", "mixup", "--workers", 1)
    words = ["--lr 0.003 (now 0.1)", "--mix cutmix (now mixup)", "--no-resume"]
    assert_one_line(other, "run holds ", *words)
    assert "workers" not in other.err  # which may change
    foreign = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    del foreign["format"]
    (tmp_path / "foreign").mkdir()
    torch.save(foreign, tmp_path / "foreign" / "last.pt")
    refused = train(*args, "--out", "foreign")
    assert_one_line(refused, "foreign/last.pt ", "this version of train.py", "--out")
    assert read_files(tmp_path / "run") == files and len(read_files(tmp_path / "foreign")) == 1


def test_a_dataset_is_recognized_by_its_classes_and_not_by_its_path(train, folder, tmp_path):
    args = (*TINY, "--out", "run")
    assert train("--data", folder, *args).status == 0
    files = read_files(tmp_path / "run")
    moved = folder.rename(tmp_path / "moved")
    again = train("--data", moved, *args)
    assert again.status == 0 and "is finished" in again.out, again.err
    more = moved / "train" / "dark" / "more.jpg"
    more.hardlink_to(moved / "train" / "dark" / "00.jpg")
    assert_one_line(train("--data", moved, *args), "num_images", "--no-resume")
    more.unlink()
    for part in ("train", "val"):  # the same two folders of images, in another order
        (moved / part / "dark").rename(moved / part / "zark")
    assert_one_line(train("--data", moved, *args), "classes", "--no-resume")
    assert read_files(tmp_path / "run") == files
    evaluated = train("--data", moved, "--eval", "run/last.pt", "--workers", 0)
    assert_one_line(evaluated, "run/last.pt was trained on other classes", "order")
    tuned = train("--data", moved, *TINY, "--out", "new", "--finetune", "run/last.pt")
    assert tuned.status == 0 and "no head for these 2 classes: a new one" in tuned.out


def test_no_resume_leaves_nothing_of_the_run_before(train, folder, tmp_path, monkeypatch):
    args = ("--data", folder, *TINY, "--out", "run")
    assert train(*args).status == 0

    def stop(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(script.Trainer, "train_step", stop)
        with pytest.raises(KeyboardInterrupt):
            train(*args, "--seed", 1, "--no-resume")
    files = read_files(tmp_path / "run")
    assert set(files) == {"config.json"} and json.loads(files["config.json"])["seed"] == 1
    done = train(*args, "--seed", 1)
    assert done.status == 0 and "epoch 1/2" in done.out


def test_infinite_loss_ends_the_run_at_its_step(train, folder, tmp_path):
    args = ("--data", folder, *TINY, "--out", "run", "--warmup-epochs", 1, "--lr", 1e12)
    done = train(*args, "--log-interval", 1)
    assert_one_line(done, "the loss is", "at step", "--lr")
    step = int(re.search(r"at step (\d)", done.err)[1])
    assert f"step {step}/6" in done.out and f"step {step + 1}/6" not in done.out
    assert set(read_files(tmp_path / "run")) == {"config.json"}


@pytest.fixture
def clock(monkeypatch):
    """A clock of the script that a test sets: clock.now, in seconds."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(script.time, "perf_counter", lambda: clock.now)
    return clock


def test_log_shows_the_speed_and_the_share_of_time_that_waits_for_data(
    train, folder, tmp_path, monkeypatch, clock
):
    read_batches = data.InMemoryLoader.__iter__
    train_step = script.Trainer.train_step

    def read_slowly(loader):
        for batch in read_batches(loader):
            clock.now += 3
            yield batch

    def train_for_a_second(*args):
        clock.now += 1
        return train_step(*args)

    monkeypatch.setattr(data.InMemoryLoader, "__iter__", read_slowly)
    monkeypatch.setattr(script.Trainer, "train_step", train_for_a_second)
    done = train("--data", folder, *TINY, "--out", "run", "--log-interval", 2)
    assert "epoch 1/2  step 2/6  loss " in done.out
    assert "  2 images/s  data 75%  left 0:00:16\n" in done.out
    for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines():
        assert json.loads(line)["images_per_s"] == 2 and json.loads(line)["data_wait"] == 0.75


def test_last_checkpoint_is_written_every_save_minutes(train, folder, monkeypatch, clock):
    train_step = script.Trainer.train_step
    saved = []

    def train_for_a_minute(*args):
        clock.now += 60
        return train_step(*args)

    def record(trainer, path, progress, identity):
        saved.append((path.name, progress.step))

    monkeypatch.setattr(script.Trainer, "train_step", train_for_a_minute)
    monkeypatch.setattr(script.Trainer, "save", record)
    args = ("--data", folder, *TINY, "--batch-size", 2, "--epochs", 1, "--out", "run")
    assert train(*args, "--log-interval", 1, "--save-minutes", 4).status == 0
    assert [step for name, step in saved if name == "last.pt"] == [5, 10, 12, 12]


def test_best_checkpoint_is_of_the_best_epoch(train, folder, tmp_path, monkeypatch):
    top1 = [50.0, 75.0, 62.5]
    monkeypatch.setattr(script, "evaluate", lambda *args: (top1.pop(0), 100.0))
    done = train("--data", folder, *TINY, "--epochs", 3, "--out", "run")
    assert "finished: top-1 62.50 %, best 75.00 %" in done.out
    history = torch.load(tmp_path / "run" / "best.pt", weights_only=True)["progress"]["history"]
    assert [entry["val_top1"] for entry in history] == [50.0, 75.0]


# --- Checkpoints.


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.module.", "module.backbone."])
@pytest.mark.parametrize("key", ["model", "state_dict", "model_ema", "teacher", None])
def test_checkpoints_are_read_whatever_their_prefix_and_container(tmp_path, prefix, key):
    state = vit.vit_micro(num_classes=2).state_dict()
    prefixed = {prefix + name: tensor for name, tensor in state.items()}
    args = argparse.Namespace(lr=5e-4, model="deit_small_patch16_224")  # as in DeiT's
    torch.save({key: prefixed, "args": args} if key else prefixed, tmp_path / "file.pth")
    assert_same_weights(script.load_checkpoint(tmp_path / "file.pth")["model"], state)


def test_finetuning_takes_another_size_and_another_number_of_classes(train, folder, tmp_path):
    torch.manual_seed(0)
    model = vit.vit_micro(img_size=48, num_classes=1000)
    torch.save({"model": model.state_dict()}, tmp_path / "pretrained.pth")
    args = ("--data", folder, *TINY, "--out", "run", "--finetune", "pretrained.pth", "--lr", 1e-9)
    done = train(*args)
    assert done.status == 0 and "no head for these 2 classes: a new one is trained" in done.out
    (tmp_path / "pretrained.pth").unlink()  # a run that has begun no longer needs it
    again = train(*args)
    assert again.status == 0 and "is finished" in again.out, again.err
    weights = read_weights(tmp_path / "run")
    expected = model.state_dict()["blocks.0.attn.qkv.weight"]
    torch.testing.assert_close(weights["blocks.0.attn.qkv.weight"], expected)
    assert len(weights["head.weight"]) == 2 and weights["pos_embed"].shape == (1, 65, 64)


def test_finetuning_on_the_same_classes_keeps_the_averaged_weights_and_the_head(
    train, folder, tmp_path
):
    args = ("--data", folder, *TINY)
    assert train(*args, "--ema-decay", 0.9, "--out", "first").status == 0
    tuned = train(*args, "--finetune", "first/best.pt", "--lr", 1e-9, "--out", "tuned")
    assert tuned.status == 0 and "new one is trained" not in tuned.out
    averaged = read_weights(tmp_path / "first", "best.pt", "ema")
    for name, tensor in read_weights(tmp_path / "tuned").items():
        torch.testing.assert_close(tensor, averaged[name])
    raw = read_weights(tmp_path / "first", "best.pt")
    assert not torch.equal(raw["head.weight"], averaged["head.weight"])


def test_encoder_without_a_head_is_finetuned_but_not_evaluated(train, folder, tmp_path):
    state = vit.vit_micro(num_classes=2).state_dict()
    encoder = {name: state[name] for name in state if not name.startswith("head")}
    torch.save(encoder, tmp_path / "encoder.pth")
    done = train("--data", folder, *TINY, "--out", "run", "--finetune", "encoder.pth")
    assert done.status == 0 and "encoder.pth has no head for these 2 classes" in done.out
    evaluated = train("--data", folder, *TINY, "--eval", "encoder.pth")
    assert_one_line(evaluated, "head.bias is missing", "expected (2,)")


def test_checkpoints_that_do_not_fit_are_refused(train, folder, tmp_path):
    assert train("--data", folder, *TINY, "--out", "run").status == 0
    best = tmp_path / "run" / "best.pt"
    assert_one_line(train("--eval", best, "--model", "swin_micro"), "best.pt is of another model")
    tuned = train("--data", folder, "--finetune", best, "--model", "deit_tiny", "--out", "new")
    assert_one_line(tuned, "best.pt is of another model")
    checkpoint = torch.load(best, weights_only=True)
    checkpoint["args"]["removed"] = 1  # a setting of an older version
    torch.save(checkpoint, tmp_path / "older.pt")
    assert train("--eval", "older.pt", "--workers", 0).status == 0
    (tmp_path / "cut.pt").write_bytes(best.read_bytes()[:5000])
    assert_one_line(train("--eval", "cut.pt"), "cut.pt cannot be loaded")
    (tmp_path / "text.pt").write_text("not a checkpoint")
    assert_one_line(train("--eval", "text.pt"), "text.pt cannot be loaded")
    torch.save([1, 2], tmp_path / "list.pt")
    assert_one_line(train("--eval", "list.pt"), "list.pt is no checkpoint", "list")
    torch.save({"model": {"cls_token": 3}}, tmp_path / "odd.pt")
    assert_one_line(train("--eval", "odd.pt"), "odd.pt holds no model")
    torch.save({"model": {}, "args": {"model": "resnet50"}}, tmp_path / "odd.pt")
    assert_one_line(train("--eval", "odd.pt"), "odd.pt", "'resnet50'")
    assert not (tmp_path / "new").exists()


# --- Errors in one line.

BAD_INPUT = {
    "model": (["--model", "deit_smal"], ["'deit_smal'", "deit_small", "--help"]),
    "dataset": (["--data", "cifar11"], ["cifar11", "cifar10"]),
    "dataset in capitals": (["--data", "CIFAR10"], ["CIFAR10", "cifar10"]),
    "targets": (["--targets", "tlalign"], ["'tlalign'", "tl_align", "area"]),
    "flag": (["--epoch", "3"], ["--epoch 3"]),
    "old flag": (["--repeats", "3"], ["--repeats 3"]),
    "word for a number": (["--epochs", "three"], ["--epochs", "'three'", "int"]),
    "lr nan": (["--lr", "nan"], ["--lr", "nan"]),
    "lr inf": (["--lr", "inf"], ["--lr", "inf"]),
    "negative": (["--workers", "-1"], ["--workers", "-1"]),
    "mix-prob": (["--mix-prob", "1.5"], ["--mix-prob", "1.5"]),
    "drop path": (["--drop-path", "1"], ["--drop-path", "less than 1"]),
    "odd batch": (["--batch-size", "9"], ["--batch-size", "even", "9"]),
    "odd micro-batch": (["--micro-batch", "9"], ["--micro-batch", "even", "9"]),
    "large batch": (["--batch-size", "20000"], ["--batch-size", "20000", "100"]),
    "image size": (["--img-size", "30"], ["patches of 4 px", "30"]),
    "no cuda": (["--device", "cuda"], ["--device cuda", "cpu"]),
    "no such device": (["--device", "meta"], ["--device", "'meta'", "cpu", "cuda"]),
    "large seed": (["--seed", str(2**64)], ["--seed"]),
    "missing folder": (["--data", "nowhere/set"], ["nowhere/set"]),
    "missing checkpoint": (["--eval", "nowhere.pt"], ["nowhere.pt", "No such file"]),
    "missing weights": (["--finetune", "nowhere.pt"], ["nowhere.pt", "No such file"]),
}


@pytest.mark.parametrize("args, words", BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_input_ends_in_one_line(train, tmp_path, monkeypatch, args, words):
    monkeypatch.setattr(data, "SHAPES_TRAIN", 100)
    monkeypatch.setattr(data, "SHAPES_VAL", 10)
    assert_one_line(train(*args), *words)
    assert not list(tmp_path.iterdir())  # nothing was written


def test_script_exits_with_status_2_without_a_traceback(folder, tmp_path, start):
    path = folder / "train" / "light" / "01.jpg"
    path.write_text("text")  # found by a worker, which must not delay the end
    run = start(1, "--data", folder, *TINY, "--img-size", 96, "--workers", 1)
    assert run.wait(timeout=60) == 2
    log = run.log.read_text()
    assert log.splitlines()[-1].startswith(f"error: {path} cannot be decoded: ")
    assert "Traceback" not in log and "Exception" not in log


BROKEN = """
import data
import train


def center_crop(image, size):
    return image.imagez


data.center_crop = center_crop
train.main()
"""


def test_bug_in_a_transform_keeps_its_traceback(folder, tmp_path, start):
    (tmp_path / "broken.py").write_text(BROKEN)
    args = ("--data", folder, *TINY, "--workers", 1)
    run = start(1, *args, script=tmp_path / "broken.py")
    assert run.wait(timeout=60) == 1
    log = run.log.read_text()
    assert f'File "{tmp_path}/broken.py", line 7, in center_crop' in log
    assert log.strip().endswith("AttributeError: 'Tensor' object has no attribute 'imagez'")


def test_folder_that_cannot_be_written_ends_in_one_line(train, folder, tmp_path):
    (tmp_path / "file").write_text("")
    done = train("--data", folder, *TINY, "--out", "file/run")
    assert_one_line(done, "--out file/run cannot be written", "Not a directory")


@pytest.mark.parametrize("part", ["train", "val"])
@pytest.mark.parametrize("workers", [0, 2])
def test_file_that_is_no_image_ends_in_one_line(train, folder, part, workers):
    path = folder / part / "dark" / "01.jpg"
    path.write_text("text")
    for img_size in (32, 96):
        args = ("--data", folder, *TINY, "--img-size", img_size, "--workers", workers)
        done = train(*args, "--epochs", 1, "--out", f"run{img_size}")
        assert_one_line(done, f"error: {path} cannot be decoded: cannot identify image file")


# --- Recipes and settings.


@pytest.mark.parametrize("model", ["deit_small", "swin_base"])
def test_recipe_for_imagenet_is_the_papers(model):
    args = make_args("--data", "/imagenet", "--model", model, **IMAGENET)
    assert (args.epochs, args.batch_size, args.lr) == (300, 1024, 1e-3)
    assert (args.weight_decay, args.smoothing, args.augment) == (0.05, 0.1, "full")
    assert (args.mix, args.mix_prob, args.targets) == ("cutmix", 1.0, "tl_align")
    assert (args.img_size, args.hflip, args.ema_decay) == (224, True, 0.0)
    if model == "deit_small":
        assert (args.patch_size, args.warmup_epochs, args.drop_path) == (16, 5, 0.1)
        assert (args.clip_grad, args.aug_repeats) == (0, 3)
    else:
        assert (args.patch_size, args.warmup_epochs, args.drop_path) == (4, 20, 0.5)
        assert (args.clip_grad, args.aug_repeats) == (5, 1)
    half = make_args("--data", "/imagenet", "--model", model, "--batch-size", 512, **IMAGENET)
    assert half.lr == 5e-4


def test_recipes_for_finetuning():
    tune = ("--data", "/imagenet", "--model", "swin_tiny", "--finetune", "file.pt")
    args = make_args(*tune, "--img-size", 384, **IMAGENET)
    assert (args.epochs, args.weight_decay) == (30, 1e-8)
    assert args.lr == pytest.approx(5e-6 * 1024 / 512)
    assert script.build_model(args, 10).layers[0].blocks[0].window_size == 12
    args = make_args(*tune, image_size=375, num_images=10_000)
    assert (args.epochs, args.weight_decay, args.batch_size) == (30, 1e-8, 128)
    assert (args.lr, args.mix_prob, args.img_size) == (1e-4, 0.5, 224)
    assert make_args("--data", "set", "--finetune", "file.pt").lr == 3e-3  # of the micro models


def test_recipes_for_small_datasets(monkeypatch):
    args = make_args("--data", "set", "--model", "deit_tiny", image_size=100, num_images=1653)
    assert (args.img_size, args.patch_size, args.batch_size, args.epochs) == (96, 8, 82, 100)
    assert (args.mix_prob, args.augment, args.aug_repeats) == (0.5, "light", 1)
    assert (args.lr, args.warmup_epochs, args.weight_decay) == (1e-3, 5, 0.05)
    large_batch = make_args("--data", "set", "--model", "deit_tiny", "--batch-size", 512)
    assert large_batch.lr == 1e-3
    small_images = make_args("--data", "set", "--model", "deit_tiny", num_images=1_281_167)
    assert (small_images.epochs, small_images.batch_size) == (100, 128)
    assert make_args("--data", "set").lr == 3e-3  # of the micro models
    shapes = make_args()
    assert (shapes.epochs, shapes.batch_size, shapes.mix_prob) == (2, 64, 1.0)
    assert make_args("--data", "set", num_images=24).batch_size == 2
    with monkeypatch.context() as patch:  # a pair for each process
        patch.setattr(script, "get_world_size", lambda: 8)
        assert make_args("--data", "set", num_images=24).batch_size == 16
    short = make_args("--data", "set", "--epochs", 10)
    assert short.warmup_epochs == 1


SIZES = {  # of images: size, patch size of a ViT and of a Swin, all in pixels
    16: (16, 4, 2),
    28: (28, 4, 2),
    32: (32, 4, 2),
    50: (32, 4, 2),
    64: (64, 8, 4),
    100: (96, 8, 4),
    128: (128, 16, 4),
    224: (224, 16, 4),
    500: (224, 16, 4),
}


@pytest.mark.parametrize("image_size", SIZES)
def test_default_sizes_follow_the_images(image_size):
    vit_args = make_args("--data", "set", image_size=image_size)
    swin_args = make_args("--data", "set", "--model", "swin_micro", image_size=image_size)
    sizes = (vit_args.img_size, vit_args.patch_size, swin_args.patch_size)
    assert sizes == SIZES[image_size] and swin_args.img_size == vit_args.img_size
    for args in (vit_args, swin_args):
        model = script.build_model(args, 3)
        assert model(torch.zeros(1, 3, args.img_size, args.img_size)).shape == (1, 3)


def test_bf16_and_compile_are_defaults_on_gpus_that_gain_by_them(monkeypatch):
    emulated = False

    def is_bf16_supported(including_emulation=True):
        return including_emulation or not emulated

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_bf16_supported)
    large = make_args("--device", "cuda", "--data", "set", image_size=100)
    assert large.bf16 and large.compile
    small = make_args("--device", "cuda", "--data", "set", image_size=64)
    assert small.bf16 and not small.compile
    cpu = make_args("--device", "cpu", "--data", "set", image_size=100)
    assert not cpu.bf16 and not cpu.compile
    emulated = True
    assert not make_args("--device", "cuda", image_size=100).bf16
    assert make_args("--device", "cuda", "--bf16").bf16
    assert not make_args("--device", "cuda", "--no-compile", image_size=100).compile


def test_hflip_follows_the_dataset_and_reaches_the_augmentation(train, folder, monkeypatch):
    augment = data.augment
    calls = []

    def record(images, rand, hflip, full):
        calls.append((hflip, full))
        return augment(images, rand, hflip, full)

    monkeypatch.setattr(data, "augment", record)
    monkeypatch.setattr(data, "SHAPES_TRAIN", 40)
    monkeypatch.setattr(data, "SHAPES_VAL", 10)
    args = ("--workers", 0, "--epochs", 1, "--img-size", 32, "--no-resume", "--out", "run")
    cases = [
        (["--data", folder], True, False),
        (["--data", folder, "--no-hflip", "--augment", "full"], False, True),
        (["--data", "shapes"], False, False),
        (["--data", "shapes", "--hflip"], True, False),
    ]
    for flags, hflip, full in cases:
        calls.clear()
        assert train(*flags, *args).status == 0
        assert set(calls) == {(hflip, full)}


def test_learning_rate_rises_in_a_line_and_falls_in_half_a_cosine():
    args = make_args("--epochs", 10, "--warmup-epochs", 2, "--lr", 1e-3)
    rates = [script.lr_at(step, args, 100) for step in range(1001)]
    assert rates[0] == 1e-6 and rates[200] == max(rates) == 1e-3
    assert rates[100] == pytest.approx((1e-6 + 1e-3) / 2)
    assert rates[600] == pytest.approx((1e-3 + 1e-5) / 2)
    assert rates[1000] == pytest.approx(1e-5)
    without_warmup = make_args("--warmup-epochs", 0, "--lr", 1e-3)
    assert script.lr_at(0, without_warmup, 100) == 1e-3


@pytest.mark.parametrize("model_name", ["vit_micro", "swin_micro"])
def test_only_matrices_decay(model_name):
    args = make_args("--model", model_name)
    model = script.build_model(args, 10)
    groups = script.make_optimizer(model, args).param_groups
    names = {parameter: name for name, parameter in model.named_parameters()}
    decay = {names[parameter] for parameter in groups[0]["params"]}
    no_decay = {names[parameter] for parameter in groups[1]["params"]}
    assert groups[0]["weight_decay"] == 0.05 and groups[1]["weight_decay"] == 0
    assert decay | no_decay == set(names.values()) and not decay & no_decay
    assert all(name.endswith(".weight") and "norm" not in name for name in decay)
    others = ("bias", "_token", "pos_embed", "bias_table")
    assert all(name.endswith(others) or "norm" in name for name in no_decay)


def test_help_names_every_setting(train):
    text = train("--help").out
    for name in vars(make_args()):
        assert "--" + name.replace("_", "-") in text


# --- Mixing.


def draw(*flags, n=20_000):
    """The mixing of a batch of n images: lambda, row, column, and whether by Mixup, (n,) each."""
    args = make_args("--batch-size", n, *flags)
    rand, is_mixup = script.draw_mixing(args, data.uniform((n, 3), "test"), 7, slice(0, n))
    return (*rand.unbind(1), is_mixup)


def test_switch_mixes_half_of_the_images_by_mixup_and_half_by_cutmix():
    lam, _, _, is_mixup = draw("--mix", "switch")
    assert is_mixup.float().mean() == pytest.approx(0.5, abs=0.02)
    beta = torch.distributions.Beta(torch.tensor(0.8), torch.tensor(0.8))
    expected = {True: beta, False: torch.distributions.Uniform(0, 1)}
    for choice, distribution in expected.items():
        chosen = lam[is_mixup == choice]
        assert chosen.mean() == pytest.approx(0.5, abs=0.02)
        assert chosen.std() == pytest.approx(distribution.stddev.item(), abs=0.005)
    assert draw("--mix", "mixup")[3].all() and not draw("--mix", "cutmix")[3].any()
    assert torch.equal(draw("--mix", "mixup")[0][is_mixup], lam[is_mixup])


def test_mix_prob_is_the_share_of_mixed_images_and_leaves_the_boxes_as_they_are():
    for mix in ("cutmix", "mixup", "switch"):
        always = draw("--mix", mix, "--mix-prob", 1)
        sometimes = draw("--mix", mix, "--mix-prob", 0.25)
        is_mixed = sometimes[0] < 1
        assert always[0].max() < 1 and is_mixed.float().mean() == pytest.approx(0.25, abs=0.02)
        for a, b in zip(always, sometimes, strict=True):
            assert torch.equal(a[is_mixed], b[is_mixed])
        assert draw("--mix", mix, "--mix-prob", 0)[0].eq(1).all()


def test_mask_is_mixups_or_cutmixs_and_empty_for_lambda_1():
    rand = torch.tensor([[0.3, 0.5, 0.5], [0.25, 0.5, 0.5], [1, 0, 0], [1, 0, 0]])
    is_mixup = torch.tensor([True, False, True, False])
    masks = script.make_mask(rand, is_mixup, (32, 32), 4)
    assert masks.shape == (4, 1, 32, 32)
    torch.testing.assert_close(masks[0], torch.full((1, 32, 32), 0.7))
    assert torch.equal(masks[1:2], tl_align.cutmix_mask(rand[1:2], (32, 32), 4))
    assert 0 < masks[1].mean() < 1
    assert masks[2:].eq(0).all()


def test_best_checkpoint_of_another_run_is_not_overwritten(train, folder, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "best.pt").write_text("precious")
    assert_one_line(train("--data", folder, *TINY, "--out", "run"), "best.pt but no last.pt")
    assert (tmp_path / "run" / "best.pt").read_text() == "precious"


def test_foreign_checkpoint_with_an_ema_decay_is_loaded(tmp_path):
    model = vit.vit_micro(num_classes=2)
    torch.save({"model": model.state_dict(), "ema": 0.999}, tmp_path / "foreign.pt")
    script.load_weights(model, tmp_path / "foreign.pt", ["a", "b"])


# --- The README.


def run_readme_snippet(words, namespace):
    """Run the Python snippet of the README that contains the words."""
    snippets = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    (snippet,) = [snippet for snippet in snippets if words in snippet]
    exec(compile(snippet, "README.md", "exec"), namespace)
    return namespace


def test_readme_snippet_for_vit_runs():
    namespace = run_readme_snippet("from vit import", {})
    assert namespace["loss"].isfinite() and namespace["share"].shape == (4, 1)


def test_readme_snippet_for_timm_gives_the_labels_of_our_vit():
    pytest.importorskip("timm")
    names = run_readme_snippet("import timm", {})
    ours = vit.deit_tiny()
    ours.load_state_dict(names["model"].state_dict())
    labels = tl_align.token_labels(names["mask"], 16)
    _, share = ours(tl_align.mix(names["images"], names["mask"]), labels)
    torch.testing.assert_close(names["share"], share)


def test_readme_snippet_for_hugging_face_gives_a_share():
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(num_hidden_layers=2, attn_implementation="eager")
    mask = tl_align.cutmix_mask(torch.rand(2, 3), (224, 224), 16)
    names = {**vars(tl_align), "images": torch.randn(2, 3, 224, 224), "mask": mask}
    names["model"] = transformers.ViTForImageClassification(config).eval()
    share = run_readme_snippet("output_attentions", names)["share"]
    assert share.shape == (2, 1) and not torch.allclose(share, mask.mean((2, 3)), atol=1e-4)


def test_lines_of_the_readme_are_in_the_code():
    (excerpt,) = re.findall(r"```py\n(.*?)```", README, re.DOTALL)
    code = {line.split("#")[0].strip() for line in Path(vit.__file__).read_text().splitlines()}
    assert all(line.split("#")[0].strip() in code for line in excerpt.splitlines())


def test_readme_has_the_lengths_of_the_files():
    lengths = re.findall(r"\[`(\w+\.py)`\]\(\w+\.py\) \| (\d+) \|", README)
    assert len(lengths) == 6
    for name, length in lengths:
        lines = (Path(script.__file__).parent / name).read_text().splitlines()
        assert int(length) == pytest.approx(len(lines), rel=0.05), name
