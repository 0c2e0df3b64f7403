"""Promises of the training script: it learns, continues, repeats, and says in one line what is wrong."""

import argparse
import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import tl_align
import train as script
import vit

README = (Path(__file__).parent.parent / "README.md").read_text()
TINY = ("--epochs", 2, "--img-size", 32, "--workers", 0, "--batch-size", 8)


def weights(run):
    return torch.load(run / "last.pt", weights_only=True)["model"]


def settings(*args):
    """Of a command line, with a recipe that can be filled in for CUDA, which is not there."""
    return script.parse([str(word) for word in args])


def assert_equal(a, b):
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize(
    "flags",
    [
        (),
        ("--targets", "area"),
        ("--targets", "transmix"),
        ("--mix", "none"),
        ("--mix", "mixup"),
        ("--model", "swin_micro"),
        ("--drop-path", 0.2, "--clip", 1, "--augment", "full"),
        ("--bf16",),
    ],
    ids=str,
)
def test_a_run_leaves_weights_metrics_and_settings(train, folder, tmp_path, flags):
    done = train("--data", folder, *TINY, "--out", "run", *flags)
    assert done.status == 0, done.err
    run = tmp_path / "run"
    assert {p.name for p in run.iterdir()} == {"last.pt", "best.pt", "metrics.jsonl", "config.json"}
    assert done.out.splitlines()[-1].endswith("python experiments/picture.py run/best.pt")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2] and lines[-1]["step"] == 6
    assert {"train_loss", "val_top1", "val_top5", "lr", "images_per_s", "data_wait"} <= lines[0].keys()
    assert json.loads((run / "config.json").read_text())["batch_size"] == 8
    again = train("--data", folder, *TINY, "--out", "run", *flags)
    assert again.status == 0 and "is finished" in again.out
    assert f"top-1 {lines[-1]['val_top1']:.2f} %" in again.out
    measured = train("--eval", run / "last.pt", "--workers", 0)
    assert f"top-1 {lines[-1]['val_top1']:.2f} %" in measured.out, measured.err


def test_another_run_in_the_same_folder_is_refused_and_nothing_written_over(train, folder, tmp_path):
    assert train("--data", folder, *TINY, "--out", "run").status == 0
    before = {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()}
    other = train("--data", folder, *TINY, "--out", "run", "--lr", 0.1)
    assert other.status == 2 and "--no-resume" in other.err
    assert before == {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()}
    over = train("--data", folder, *TINY, "--out", "run", "--seed", 1, "--no-resume")
    assert over.status == 0 and "epoch 1/2" in over.out


def test_a_set_is_known_by_what_it_holds_and_not_by_its_path(train, folder, tmp_path):
    assert train("--data", folder, *TINY, "--out", "run").status == 0
    before = (tmp_path / "run" / "last.pt").read_bytes()
    moved = folder.rename(tmp_path / "moved")
    again = train("--data", f"{moved}/../moved/", *TINY, "--out", "run")
    assert again.status == 0 and "is finished" in again.out, again.err
    more = moved / "train" / "dark" / "more.jpg"
    more.hardlink_to(moved / "train" / "dark" / "00.jpg")
    one_line(train("--data", moved, *TINY, "--out", "run"), "[24, 24]", "[25, 24]", "--no-resume")
    more.unlink()
    for part in ("train", "val"):
        (moved / part / "dark").rename(moved / part / "zark")
    one_line(train("--data", moved, *TINY, "--out", "run"), "class 0 is dark there, light here")
    one_line(train("--data", moved, "--eval", "run/last.pt", "--workers", 0), "dark", "other classes")
    assert before == (tmp_path / "run" / "last.pt").read_bytes()
    done = train("--data", moved, *TINY, "--out", "new", "--init", "run/last.pt")
    assert done.status == 0 and "has no head for these 2 classes" in done.out


def test_a_head_takes_on_the_order_of_the_sets_classes():
    model = vit.vit_micro(num_classes=3).eval()
    saved = {"model": model.state_dict(), "classes": ["a", "b", "c"], "sums": []}
    images, other = torch.randn(2, 3, 32, 32), vit.vit_micro(num_classes=3).eval()
    script.load_weights(other, saved, "file.pt", ["c", "a", "b"])
    torch.testing.assert_close(other(images), model(images)[:, [2, 0, 1]])


def test_init_takes_a_checkpoint_of_another_size_and_another_number_of_classes(train, folder, tmp_path):
    torch.manual_seed(0)
    model = vit.vit_micro(img_size=48, num_classes=1000)
    torch.save({"model": model.state_dict()}, tmp_path / "pretrained.pth")
    done = train("--data", folder, *TINY, "--out", "run", "--init", "pretrained.pth", "--lr", 1e-9)
    assert done.status == 0, done.err
    assert "a new one is trained" in done.out
    (tmp_path / "pretrained.pth").unlink()  # a run that has begun does not need it any more
    again = train("--data", folder, *TINY, "--out", "run", "--init", "pretrained.pth", "--lr", 1e-9)
    assert again.status == 0 and "is finished" in again.out, again.err
    after = weights(tmp_path / "run")
    torch.testing.assert_close(after["blocks.0.attn.qkv.weight"], model.blocks[0].attn.qkv.weight.detach())
    assert len(after["head.weight"]) == 2 and after["pos_embed"].shape == (1, 65, 64)


@pytest.mark.parametrize("kind", ["module.", "_orig_mod.", "_orig_mod.module.", "module.backbone."])
@pytest.mark.parametrize("key", ["model", "state_dict", "model_ema", "teacher", None])
def test_checkpoints_are_read_however_they_call_the_weights(tmp_path, kind, key):
    state = vit.vit_micro(num_classes=2).state_dict()
    named = {kind + name: tensor for name, tensor in state.items()}
    more = {"epoch": 299, "args": argparse.Namespace(lr=5e-4, model="deit_small_patch16_224")}  # as DeiT's
    torch.save({key: named, **more} if key else named, tmp_path / "file.pth")
    assert_equal(script.read_checkpoint(tmp_path / "file.pth")["model"], state)


def test_an_encoder_without_a_head_is_fine_tuned_with_a_new_one_and_not_evaluated(train, folder, tmp_path):
    state = vit.vit_micro(num_classes=2).state_dict()
    torch.save({k: v for k, v in state.items() if not k.startswith("head")}, tmp_path / "encoder.pth")
    done = train("--data", folder, *TINY, "--out", "run", "--init", "encoder.pth")
    assert (
        done.status == 0 and "encoder.pth has no head for these 2 classes, a new one is trained" in done.out
    )
    one_line(train("--data", folder, *TINY, "--eval", "encoder.pth"), "head.weight is missing there")


def one_line(done, *words):
    """Exit status 2 and one line on stderr that holds the words."""
    assert done.status == 2, done.out + done.err
    assert len(done.err.strip().splitlines()) == 1 and done.err.startswith("error: ")
    assert all(word in done.err for word in words), done.err


BAD_INPUT = {
    "model": (["--model", "deit_smal"], ["'deit_smal'", "deit_small", "--help"]),
    "set": (["--data", "cifar11"], ["cifar11", "cifar10", "train/CLASS/"]),
    "set in capitals": (["--data", "CIFAR10"], ["CIFAR10", "cifar10"]),
    "targets": (["--targets", "tlalign"], ["'tlalign'", "tl_align", "area", "transmix"]),
    "flag": (["--epoch", "3"], ["--epoch 3"]),
    "word for a number": (["--epochs", "three"], ["--epochs", "'three'", "int"]),
    "lr nan": (["--lr", "nan"], ["--lr", "nan"]),
    "lr inf": (["--lr", "inf"], ["--lr", "inf"]),
    "drop path": (["--drop-path", "1"], ["--drop-path", "below 1"]),
    "batch of one": (["--batch-size", "1"], ["--batch-size", "even", "1"]),
    "batch too large": (["--batch-size", "20000"], ["20000", "8000 training images"]),
    "image size": (["--img-size", "30"], ["patches of 4 px", "30"]),
    "transmix with swin": (["--targets", "transmix", "--model", "swin_micro"], ["class token", "vit_micro"]),
    "no cuda": (["--device", "cuda"], ["--device cuda", "cpu"]),
    "no such device": (["--device", "meta"], ["--device", "'meta'", "cpu", "cuda"]),
    "seed too large": (["--seed", str(2**64)], ["--seed", "below"]),
    "empty": (["--init", ""], ["empty"]),
    "missing folder": (["--data", "nowhere/set"], ["nowhere/set"]),
    "missing checkpoint": (["--eval", "nowhere.pt"], ["nowhere.pt", "No such file"]),
}


@pytest.mark.parametrize("args, words", BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_input_ends_in_one_line(train, tmp_path, args, words):
    one_line(train(*args), *words)
    assert not list(tmp_path.iterdir())  # nothing was written


def test_the_script_itself_ends_with_status_2_and_without_a_traceback(tmp_path):
    command = [sys.executable, Path(script.__file__).resolve(), "--lr", "nan"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    one_line(SimpleNamespace(status=done.returncode, out=done.stdout, err=done.stderr), "--lr")


def test_a_folder_that_is_no_set_is_told_from_one_that_is(train, folder, tmp_path):
    (tmp_path / "empty").mkdir()
    one_line(train("--data", "empty"), "No such file or directory: 'empty/train'", "train/CLASS/")
    (tmp_path / "empty" / "train").mkdir()
    one_line(train("--data", "empty"), "find any class folder in empty/train")
    (folder / "val" / "grey").mkdir()
    one_line(train("--data", folder), "grey", "no valid file")
    (folder / "val" / "dark" / "00.jpg").rename(folder / "val" / "grey" / "00.jpg")
    one_line(train("--data", folder), "'grey' is in only one of", "train and val/")
    shutil.rmtree(folder / "val")
    one_line(train("--data", folder), "No such file or directory", "set/val'")


def test_files_that_do_not_decode_are_named_and_replaced_and_many_end_the_run(train, folder, tmp_path):
    for i in range(300):  # so that two bad files are less than one in a hundred
        (folder / "train" / "dark" / f"more{i}.jpg").hardlink_to(folder / "train" / "dark" / "00.jpg")
    truncated, text = (folder / "train" / "light" / f"{name}.jpg" for name in ("truncated", "text"))
    truncated.write_bytes((folder / "train" / "light" / "00.jpg").read_bytes()[:500])
    text.write_text("not an image")
    done = train("--data", folder, *TINY, "--out", "run")
    assert done.status == 0, done.err
    for path in (truncated, text):
        assert done.out.count(f"cannot decode {path}") == 1
    assert json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])["undecodable"] == 2
    for i in range(12):
        (folder / "train" / "light" / f"{i:02}.jpg").write_text("not an image")
    one_line(train("--data", folder, *TINY, "--out", "other"), "cannot be decoded", "one in a hundred")


def test_checkpoints_that_do_not_fit_are_refused(train, folder, tmp_path):
    assert train("--data", folder, *TINY, "--out", "run").status == 0
    best = tmp_path / "run" / "best.pt"
    one_line(train("--eval", best, "--model", "swin_micro"), "another model")
    one_line(train("--init", best, "--model", "deit_tiny", "--out", "new"), "another model")
    saved = torch.load(best, weights_only=True)
    torch.save({**saved, "settings": {**saved["settings"], "gone": 1}}, tmp_path / "older.pt")
    assert train("--eval", "older.pt", "--workers", 0).status == 0  # a setting that there is no more
    (tmp_path / "cut.pt").write_bytes(best.read_bytes()[:5000])
    one_line(train("--eval", "cut.pt"), "cut.pt", "damaged")
    torch.save({"model": {"cls_token": 3}}, tmp_path / "odd.pt")
    one_line(train("--eval", "odd.pt"), "odd.pt", "holds no model")
    torch.save({"model": {}, "settings": {"model": "elsewhere"}}, "odd.pt")
    one_line(train("--eval", "odd.pt"), "odd.pt is of a model 'elsewhere'", "vit_micro")
    (tmp_path / "text.pt").write_text("not a checkpoint")
    one_line(train("--eval", "text.pt"), "text.pt")
    (tmp_path / "file").write_text("")
    one_line(
        train("--data", folder, *TINY, "--out", "file/run"),
        "file/run/config.json can't be written: Not a directory",
    )


def test_a_loss_that_is_not_finite_ends_the_run_at_its_step(train, folder, tmp_path):
    done = train("--data", folder, *TINY, "--out", "run", "--lr", 1e30, "--warmup", 1)
    assert done.status == 1 and re.search(r"the loss is (nan|inf) at step \d", done.err)
    assert not (tmp_path / "run" / "last.pt").exists()


def test_the_log_tells_the_share_of_time_that_waits_for_data(train, folder, tmp_path, monkeypatch):
    epoch = script.data.Memory.epoch

    def slow(*args):
        for batch in epoch(*args):
            time.sleep(0.2)
            yield batch

    shares = {}
    for name, batches in (("slow", slow), ("fast", epoch)):
        monkeypatch.setattr(script.data.Memory, "epoch", batches)
        done = train("--data", folder, *TINY, "--out", name)
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        shares[name] = json.loads(lines[-1])["data_wait"]  # of the second epoch: the first one decodes
        assert f"data {shares[name]:.0%}" in done.out
    assert shares["slow"] > 0.5 > shares["fast"]


def test_the_learning_rate_rises_in_a_line_and_falls_in_half_a_cosine():
    s = settings("--epochs", 10, "--warmup", 2, "--lr", 1e-3)
    rates = [script.lr_at(step, s, 100) for step in range(1001)]
    assert rates[0] == 1e-6 and rates[200] == max(rates) == 1e-3 and rates[1000] == pytest.approx(1e-5)
    assert rates[100] == pytest.approx((1e-6 + 1e-3) / 2) and rates[600] == pytest.approx((1e-3 + 1e-5) / 2)


def test_only_matrices_decay():
    for model in ("vit_micro", "swin_micro"):
        s = script.recipe(settings("--model", model, "--device", "cpu"), side=32, images=8000)
        net = script.build(s, 10)
        groups = script.optimizer(net, s).param_groups
        names = {p: name for name, p in net.named_parameters()}
        decay, rest = ({names[p] for p in group["params"]} for group in groups)
        assert groups[0]["weight_decay"] == 0.05 and groups[1]["weight_decay"] == 0
        assert decay | rest == set(names.values())
        assert not any(
            n.endswith(("bias", "_token", "pos_embed", "bias_table")) or "norm" in n for n in decay
        )
        assert all(n.endswith("weight") for n in decay) and "head.weight" in decay


@pytest.mark.parametrize("model", ["deit_small", "swin_base"])
def test_the_default_for_large_images_is_the_papers_recipe(model):
    s = settings("--data", "/imagenet", "--model", model, "--device", "cuda")
    s = script.recipe(s, side=224, images=1_281_167)
    assert (s.epochs, s.batch_size, s.lr, s.weight_decay, s.smoothing) == (300, 1024, 1e-3, 0.05, 0.1)
    assert (s.img_size, s.augment, s.mix, s.targets) == (224, "full", "cutmix", "tl_align")
    if model == "deit_small":
        assert (s.patch_size, s.warmup, s.drop_path, s.clip, s.repeats) == (16, 5, 0.1, 0, 3)
    else:
        assert (s.patch_size, s.warmup, s.drop_path, s.clip, s.repeats) == (4, 20, 0.5, 5, 1)


def test_the_recipe_for_fine_tuning_is_deits():
    tune = ("--data", "/imagenet", "--model", "swin_tiny", "--init", "file.pt", "--device", "cuda")
    s = script.recipe(settings(*tune, "--img-size", 384), side=224, images=1_281_167)
    assert (s.epochs, s.weight_decay) == (30, 1e-8) and s.lr == pytest.approx(5e-6 * 1024 / 512)
    assert script.build(s, 10).layers[0].blocks[0].window == 12
    other_classes = script.recipe(settings(*tune), side=224, images=10_000)
    assert other_classes.lr == pytest.approx(5e-5 * 1024 / 512) and other_classes.batch_size == 500
    small = settings(*tune, "--model", "swin_micro")
    assert script.recipe(small, side=32, images=5000).lr == 3e-3  # as from scratch


def test_defaults_fit_odd_images_and_small_sets():
    s = script.recipe(settings("--data", "set", "--device", "cpu"), side=50, images=500)
    assert (s.img_size, s.patch_size, s.batch_size) == (52, 4, 24)


@pytest.mark.parametrize(
    "given", [{"WORLD_SIZE": "2"}, {"RANK": "0", "WORLD_SIZE": "x"}, {"LOCAL_RANK": "1"}]
)
def test_a_launchers_variables_that_are_set_in_part_end_in_one_line(train, monkeypatch, given):
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    one_line(train(), ", ".join(given), "torchrun", "unset")


def test_a_missing_compiler_ends_in_one_line(folder, tmp_path, start):
    env = {"CXX": "/nowhere/g++", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    run = start(1, "--data", folder, *TINY, "--compile", env=env)
    assert run.wait(timeout=200) == 1
    assert "error: torch.compile failed, --no-compile does without" in run.log.read_text().splitlines()[-1]
    assert "Traceback" not in run.log.read_text()


def test_a_small_set_of_large_images_is_told_of_init(train, folder):
    args = ("--data", folder, *TINY, "--img-size", 80)
    assert "--init FILE" in train(*args, "--out", "run").out
    assert "--init FILE" not in train(*args, "--out", "other", "--init", "run/last.pt").out


def test_a_small_set_has_smaller_batches_and_not_a_smaller_rate():
    scratch = ("--data", "set", "--device", "cpu")
    s = script.recipe(settings(*scratch), side=224, images=3000)
    assert (s.batch_size, s.lr) == (150, 1e-3)
    s = script.recipe(settings(*scratch, "--batch-size", 256), side=224, images=3000)
    assert (s.batch_size, s.lr) == (256, 2.5e-4)  # the paper's rule for a batch that is given


def test_a_full_gpu_and_ctrl_c_end_in_one_line(train, monkeypatch):
    for error, status, words in (
        (torch.OutOfMemoryError("CUDA out of memory"), 1, "--micro-batch"),
        (KeyboardInterrupt(), 130, "stopped"),
    ):

        def run(argv):
            raise error

        monkeypatch.setattr(script, "run", run)
        done = train()
        assert done.status == status and words in done.err and len(done.err.splitlines()) == 1


def test_help_names_every_setting(train):
    text = train("--help").out
    s = script.recipe(settings("--device", "cpu"), side=32, images=8000)
    assert all("--" + name.replace("_", "-") in text for name in vars(s))


def test_the_snippets_of_the_readme_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    snippets = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert snippets
    for snippet in snippets:
        exec(compile(snippet, "README.md", "exec"), {})


def test_the_lines_that_the_readme_shows_stand_in_the_code():
    (excerpt,) = re.findall(r"```py\n(.*?)```", README, re.DOTALL)
    code = {line.split("#")[0].strip() for line in Path(vit.__file__).read_text().splitlines()}
    assert all(line.split("#")[0].strip() in code for line in excerpt.splitlines())


def test_unmixed_is_the_share_of_images_that_stay_whole_and_boxes_are_spread_as_before():
    sizes, images = [], torch.zeros(4000, 3, 32, 32, dtype=torch.uint8)
    for share in (0.0, 0.75):
        s = script.recipe(script.parse(["--unmixed", str(share), "--batch-size", "4000"]), 32, 8000)
        trainer = script.Trainer(s, 10)
        trainer.loss = lambda model, x, y, rand, *more: sizes.append(rand[:, 0]) or model.head.weight.sum()
        trainer.step(images, torch.zeros(4000, dtype=torch.long), 0, 100)
    assert sizes[0].max() < 1 and sizes[1].lt(1).float().mean() == pytest.approx(0.25, abs=0.03)
    assert sizes[1][sizes[1] < 1].mean() == pytest.approx(0.5, abs=0.03)
    assert tl_align.cutmix_mask(torch.ones(2, 3), (32, 32), 4).eq(0).all()  # nothing is pasted at 1
    assert tl_align.mixup_mask(torch.ones(2, 3), (32, 32)).eq(0).all()
