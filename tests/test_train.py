"""Promises of the training script: recipes and settings, mixing, checkpoints, and errors in one
line."""

import argparse
import json
import pickle
import re
import shutil
import signal
import sys
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import (
    TINY,
    assert_one_line,
    assert_same_weights,
    make_args,
    read_metrics,
    read_weights,
)

import data
import tl_align
import train as script
import vit

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
    assert set(files) == {"last.pt", "best.pt", "metrics.jsonl", "config.json", "lock"}
    assert done.out.splitlines()[-1].endswith("python experiments/picture.py run/best.pt")
    lines = [json.loads(line) for line in files["metrics.jsonl"].splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2] and lines[-1]["step"] == 6
    names = {"train_loss", "val_top1", "val_top5", "lr", "images_per_s", "data_wait"}
    assert names | {"epoch", "step"} == lines[0].keys()
    assert json.loads(files["config.json"])["batch_size"] == 8
    again = train(*args)
    best = max(line["val_top1"] for line in lines)
    assert again.status == 0 and f"best {best:.2f} %" in again.out
    assert read_files(run) == files
    evaluated = train("--eval", run / "last.pt", "--workers", 0)  # with its own data and model
    assert f"top-1 {lines[-1]['val_top1']:.2f} %" in evaluated.out, evaluated.err


def test_other_settings_are_refused_and_overwrite_nothing(train, folder, tmp_path):
    args = ("--data", folder, *TINY, "--out", "run")
    assert train(*args).status == 0
    files = read_files(tmp_path / "run")
    other = train(*args, "--lr", 0.1, "--mix", "mixup", "--workers", 1)
    words = ["--lr 0.003 (now 0.1)", "--mix cutmix (now mixup)", "--resume", "--no-resume"]
    assert_one_line(other, "run holds ", *words)
    assert "workers" not in other.err  # which may change
    foreign = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    del foreign["format"]
    (tmp_path / "foreign").mkdir()
    torch.save(foreign, tmp_path / "foreign" / "last.pt")
    refused = train(*args, "--out", "foreign")
    assert_one_line(refused, "foreign/last.pt ", "this version of train.py", "--out")
    assert read_files(tmp_path / "run") == files
    assert read_files(tmp_path / "foreign").keys() == {"last.pt", "lock"}


def test_explicit_resume_continues_with_other_settings(train, folder, tmp_path):
    args = ("--data", folder, *TINY, "--out", "run")
    assert train(*args, "--weight-decay", 0.05).status == 0
    longer = (*args, "--epochs", 4, "--lr", 1e-9, "--weight-decay", 0, "--ema-decay", 0.9)
    before = read_weights(tmp_path / "run")
    done = train(*longer, "--resume")
    assert done.status == 0, done.err
    assert "run is continued with other settings: --epochs 2 (now 4), --lr 0.003 (now" in done.out
    assert "--weight-decay 0.05 (now 0.0), --ema-decay 0.0 (now 0.9)" in done.out
    assert "resuming after step 6" in done.out and "epoch 4/4" in done.out
    checkpoint = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    assert [group["weight_decay"] for group in checkpoint["optimizer"]["param_groups"]] == [0, 0]
    for name, tensor in before.items():  # with such a rate nothing changes
        torch.testing.assert_close(checkpoint["model"][name], tensor, atol=1e-6, rtol=0)
        torch.testing.assert_close(checkpoint["ema"][name], tensor, atol=1e-6, rtol=0)
    again = train(*longer)  # these are its settings now
    assert again.status == 0 and "run is finished" in again.out
    shorter = train(*longer, "--epochs", 3, "--resume")
    assert shorter.status == 0 and "run is finished" in shorter.out
    refused = train(*longer, "--patch-size", 8, "--resume")
    assert_one_line(refused, "--patch-size 4 (now 8)", "--no-resume")
    new = train(*args, "--out", "new", "--resume")
    assert new.status == 0 and "new has no last.pt to resume from: this is a new run" in new.out


def test_run_that_continues_with_another_batch_size_starts_its_epoch_again(
    train, folder, tmp_path, monkeypatch
):
    args = ("--data", folder, *TINY, "--out", "run", "--log-interval", 1)
    train_step = script.Trainer.train_step
    steps = []

    def interrupt(trainer, images, targets, step, lr):
        steps.append((step, len(images)))
        if len(steps) == 6:
            signal.raise_signal(signal.SIGTERM)
        return train_step(trainer, images, targets, step, lr)

    monkeypatch.setattr(script.Trainer, "train_step", interrupt)
    assert train(*args, "--epochs", 3).status == 128 + signal.SIGTERM
    assert steps == [(step, 8) for step in range(6)]  # the second epoch is not validated yet
    done = train(*args, "--epochs", 3, "--batch-size", 4, "--resume")
    assert done.status == 0 and "--batch-size 8 (now 4)" in done.out
    assert steps[6:] == [(step, 4) for step in range(6, 18)]  # epochs of six steps


def test_signal_during_a_validation_ends_the_run_after_it(train, folder, tmp_path, monkeypatch):
    args = ("--data", folder, *TINY, "--out", "run")
    evaluate = script.evaluate

    def interrupt(*args, **kwargs):
        signal.raise_signal(signal.SIGTERM)
        return evaluate(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(script, "evaluate", interrupt)
        for epoch in (1, 2):
            stopped = train(*args)
            assert stopped.status == 128 + signal.SIGTERM
            assert f"stopped after step {3 * epoch}" in stopped.out
            assert len(read_metrics(tmp_path / "run")) == epoch
    assert "run is finished" in train(*args).out


def test_run_is_resumed_on_the_same_images_only(train, folder, tmp_path):
    args = ("--data", folder, *TINY, "--out", "run")
    assert train(*args).status == 0
    files = read_files(tmp_path / "run")
    path = folder / "train" / "dark" / "03.jpg"
    content = path.read_bytes()
    path.write_bytes(content + b"more")
    for flags in ((), ("--resume",)):
        assert_one_line(train(*args, *flags), "run holds another run: other images")
    path.write_bytes(content)
    path.rename(path.with_name("12.jpg"))
    assert_one_line(train(*args), "other images")
    path.with_name("12.jpg").rename(path)
    assert read_files(tmp_path / "run") == files and "is finished" in train(*args).out


def test_two_runs_do_not_train_in_one_folder(train, start, folder, tmp_path):
    args = ("--data", folder, *TINY, "--out", "run", "--workers", 1)
    first = start(1, *args, "--epochs", 1000)
    for _ in range(600):
        if (tmp_path / "run" / "last.pt").exists():
            break
        time.sleep(0.1)
    assert (tmp_path / "run" / "last.pt").exists(), first.log.read_text()
    for flags in (("--no-resume",), ("--resume",)):
        assert_one_line(train(*args, *flags), "another run is using --out run")
    first.kill()  # its worker may live a little longer
    first.wait()
    done = train(*args, "--no-resume")
    assert done.status == 0, done.err


def test_a_dataset_is_recognized_by_its_classes_and_not_by_its_path(train, folder, tmp_path):
    args = (*TINY, "--out", "run")
    assert train("--data", folder, *args).status == 0
    files = read_files(tmp_path / "run")
    moved = folder.rename(tmp_path / "moved")
    again = train("--data", moved, *args)
    assert again.status == 0 and "is finished" in again.out, again.err
    more = moved / "train" / "dark" / "more.jpg"
    more.hardlink_to(moved / "train" / "dark" / "00.jpg")
    assert_one_line(train("--data", moved, *args), "other images", "--no-resume")
    more.unlink()
    for part in ("train", "val"):  # the same two folders of images, in another order
        (moved / part / "dark").rename(moved / part / "zark")
    assert_one_line(train("--data", moved, *args), "other classes", "--no-resume")
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
    assert set(files) == {"config.json", "lock"} and json.loads(files["config.json"])["seed"] == 1
    done = train(*args, "--seed", 1)
    assert done.status == 0 and "epoch 1/2" in done.out


def test_infinite_loss_ends_the_run_at_its_step(train, folder, tmp_path):
    args = ("--data", folder, *TINY, "--out", "run", "--warmup-epochs", 1, "--lr", 1e12)
    done = train(*args, "--log-interval", 1)
    assert_one_line(done, "the loss is", "at step", "--resume with a lower --lr")
    step = int(re.search(r"at step (\d)", done.err)[1])
    assert f"step {step}/6" in done.out and f"step {step + 1}/6" not in done.out
    assert set(read_files(tmp_path / "run")) == {"config.json", "lock"}
    again = train(*args[:-4], "--resume")
    assert again.status == 0, again.err


def test_weights_that_are_not_finite_are_not_saved(train, folder, tmp_path, monkeypatch):
    args = ("--data", folder, *TINY, "--out", "run")
    assert train(*args, "--epochs", 1).status == 0
    files = read_files(tmp_path / "run")
    train_step = script.Trainer.train_step

    def overflow(trainer, *args):
        loss = train_step(trainer, *args)
        trainer.raw_model.head.bias.data.fill_(torch.inf)  # as the last step of an epoch may
        return loss

    monkeypatch.setattr(script.Trainer, "train_step", overflow)
    monkeypatch.setattr(script, "check_losses", lambda losses, step: None)
    done = train(*args, "--resume")
    assert_one_line(done, "the weights are not finite after step 6", "--resume with a lower --lr")
    for name in ("last.pt", "best.pt", "metrics.jsonl"):
        assert read_files(tmp_path / "run")[name] == files[name]


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
    monkeypatch.setattr(script, "evaluate", lambda *_, **__: {"val_top1": top1.pop(0)})
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
    assert_one_line(evaluated, "head.bias is missing", "here it is (2,)")


@pytest.mark.parametrize(
    "container, extra",
    [
        ({}, ["decoder_blocks.0.mlp.fc1.weight", "decoder_embed.bias", "mask_token"]),  # MAE
        ({"epoch": 1}, ["head.mlp.0.weight", "head.last_layer.weight_g"]),  # DINO
    ],
    ids=["MAE", "DINO"],
)
def test_finetuning_ignores_what_the_model_lacks_and_says_so(
    train, folder, tmp_path, container, extra
):
    state = vit.vit_micro(num_classes=2).state_dict()
    encoder = {name: state[name] for name in state if not name.startswith("head")}
    more = {name: torch.zeros(2) for name in extra}
    key = "teacher" if container else "model"
    torch.save({**container, key: {**encoder, **more}}, tmp_path / "whole.pth")
    args = ("--data", folder, *TINY, "--lr", 1e-9)
    done = train(*args, "--out", "run", "--finetune", "whole.pth")
    assert done.status == 0, done.err
    assert "whole.pth has no head for these 2 classes: a new one is trained" in done.out
    ignored = "ignored, as the model has no such layers: decoder_blocks, decoder_embed, mask_token"
    assert (ignored in done.out) == ("mask_token" in extra)
    weights = read_weights(tmp_path / "run")
    torch.testing.assert_close(weights["norm.weight"], encoder["norm.weight"])
    assert_one_line(train(*args, "--eval", "whole.pth"), "whole.pth is of another model")


@pytest.mark.parametrize("name", ["blocks.0.ls1.gamma", "blocks.4.norm1.weight"])
def test_finetuning_refuses_a_model_with_more_in_its_layers(train, folder, tmp_path, name):
    state = vit.vit_micro(num_classes=2).state_dict()
    torch.save({**state, name: torch.ones(64)}, tmp_path / "other.pth")
    done = train("--data", folder, *TINY, "--out", "run", "--finetune", "other.pth")
    assert_one_line(done, f"other.pth is of another model: {name} is (64,), here it is missing")


def test_numpy_numbers_in_a_checkpoint_are_read(tmp_path):
    state = vit.vit_micro(num_classes=2).state_dict()
    numbers = [np.float64(0.5), np.float32(0.5), np.int64(3), np.bool_(True)]
    torch.save({"model": state, "log": numbers}, tmp_path / "new.pth")
    assert script.load_checkpoint(tmp_path / "new.pth")["log"] == numbers
    # As numpy 1 wrote it: another name for the same function.
    with (
        zipfile.ZipFile(tmp_path / "new.pth") as new,
        zipfile.ZipFile(tmp_path / "old.pth", "w") as old,
    ):
        for name in new.namelist():
            content = new.read(name)
            old.writestr(name, content.replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    assert script.load_checkpoint(tmp_path / "old.pth")["log"] == numbers


def test_safetensors_are_loaded_where_the_package_is_installed(tmp_path, monkeypatch):
    state = vit.vit_micro(num_classes=2).state_dict()
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)  # as if it were not
    with pytest.raises(data.UserError, match="model.safetensors needs .*pip install safetensors"):
        script.load_checkpoint(tmp_path / "model.safetensors")
    monkeypatch.undo()
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file(state, tmp_path / "model.safetensors")
    loaded = script.load_checkpoint(tmp_path / "model.safetensors")["model"]
    assert_same_weights(loaded, state)


def test_refused_checkpoint_ends_with_the_whole_advice_of_torch(train, tmp_path):
    torch.save({"model": {}, "path": Path("x")}, tmp_path / "path.pth")
    with pytest.raises(pickle.UnpicklingError) as error:
        torch.load(tmp_path / "path.pth", weights_only=True)
    advice = " ".join(str(error.value).split("functions:")[-1].split())
    refused = train("--eval", "path.pth")
    assert_one_line(refused, "path.pth was refused by torch.load(weights_only=True)", advice)


def test_damaged_checkpoint_ends_in_a_line_that_says_how_to_go_on(train, folder, tmp_path):
    args = ("--data", folder, *TINY, "--out", "run")
    assert train(*args).status == 0
    (tmp_path / "run" / "last.pt").write_bytes(b"")
    damaged = train(*args)
    assert_one_line(damaged, "run/last.pt cannot be loaded", "copy run/best.pt", "--no-resume")
    shutil.copy(tmp_path / "run" / "best.pt", tmp_path / "run" / "last.pt")
    assert train(*args).status == 0


def test_validation_images_are_enough_to_evaluate(train, folder, tmp_path):
    args = (*TINY, "--out", "run")
    assert train("--data", folder, *args).status == 0
    with_all = train("--eval", "run/best.pt", "--workers", 0).out
    shutil.rmtree(folder / "train")
    done = train("--eval", "run/best.pt", "--workers", 0)
    assert done.status == 0 and done.out == with_all
    assert_one_line(train("--data", folder, *args, "--out", "new"), "has no train/")
    assert not (tmp_path / "new").exists()


def test_checkpoints_that_do_not_fit_are_refused(train, folder, tmp_path):
    assert train("--data", folder, *TINY, "--out", "run").status == 0
    best = tmp_path / "run" / "best.pt"
    assert_one_line(train("--eval", best, "--model", "swin_micro"), "best.pt is of another model")
    tuned = train("--data", folder, "--finetune", best, "--model", "deit_tiny", "--out", "new")
    assert_one_line(tuned, "best.pt is of another model")
    assert_one_line(train("--finetune", "nowhere.pt"), "nowhere.pt", "No such file")
    checkpoint = torch.load(best, weights_only=True)
    checkpoint["args"]["removed"] = 1  # a setting of an older version
    torch.save(checkpoint, tmp_path / "older.pt")
    assert train("--eval", "older.pt", "--workers", 0).status == 0
    (tmp_path / "cut.pt").write_bytes(best.read_bytes()[:5000])
    assert_one_line(train("--eval", "cut.pt"), "cut.pt cannot be loaded")
    (tmp_path / "text.pt").write_text("not a checkpoint")
    assert_one_line(train("--eval", "text.pt"), "text.pt was refused by torch.load")
    torch.save([1, 2], tmp_path / "list.pt")
    assert_one_line(train("--eval", "list.pt"), "list.pt is no checkpoint", "list")
    torch.save({"model": {"cls_token": 3}}, tmp_path / "odd.pt")
    assert_one_line(train("--eval", "odd.pt"), "odd.pt holds no model")
    torch.save({"model": {}, "args": {"model": "resnet50"}}, tmp_path / "odd.pt")
    assert_one_line(train("--eval", "odd.pt"), "odd.pt", "'resnet50'")
    assert read_files(tmp_path / "new") == {"lock": b""}


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
    assert log.splitlines()[-1].startswith(f"error: cannot decode {path}: ")
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
        assert_one_line(done, f"error: cannot decode {path}: cannot identify image file")


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


def test_large_images_are_trained_on_in_micro_batches(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **options: True)
    assert make_args("--device", "cuda", image_size=100).micro_batch == 256
    assert make_args("--device", "cpu", image_size=100).micro_batch == 32
    for device in ("cpu", "cuda"):
        assert make_args("--device", device, image_size=64).micro_batch == 0


@pytest.mark.parametrize("micro_batch, sizes", [(0, [24]), (10, [8, 8, 8]), (14, [12, 12])])
def test_micro_batches_are_of_equal_size(micro_batch, sizes):
    args = make_args("--micro-batch", micro_batch, "--batch-size", 24, "--device", "cpu")
    seen = []

    def loss(model, images, *more):
        seen.append(len(images))
        return script.mixed_loss(model, images, *more)

    trainer = script.Trainer(args, script.build_model(args, 10), loss)
    images = torch.zeros(24, 3, 32, 32, dtype=torch.uint8)
    trainer.train_step(images, torch.zeros(24, dtype=torch.long), 0, 1e-3)
    assert seen == sizes


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
