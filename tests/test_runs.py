"""Promises about whole runs: any number of processes gives one result, and no run is ever lost."""

import contextlib
import json
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import time

import pytest
import torch
from test_train import assert_equal, one_line, settings, weights
from torch.utils._python_dispatch import TorchDispatchMode

import train as script

RUN = ("--epochs", 4, "--img-size", 32, "--workers", 1, "--batch-size", 8, "--drop-path", 0.2, "--ema", 0.9)


def history(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: line[k] for k in ("epoch", "step", "train_loss", "val_top1", "val_top5")} for line in lines]


def finish(process):
    status = process.wait(timeout=300)
    assert status == 0, process.log.read_text()


# --- Processes.


def test_two_processes_equal_one_and_so_does_accumulation(train, folder, tmp_path, start):
    for name in ("dark/11", "dark/10", "light/11"):  # 21 to validate: odd, so the shares differ
        (folder / "val" / f"{name}.jpg").unlink()
    args = ["--data", folder, "--epochs", 10, "--img-size", 80, "--batch-size", 10, "--clip", 1]
    args += ["--augment", "full", "--drop-path", 0.2, "--ema", 0.9, "--workers", 1]  # rows 0-3 and 4-9
    assert train(*args, "--out", "one").status == 0
    assert train(*args, "--out", "parts", "--micro-batch", 4).status == 0
    finish(start(2, *args, "--out", "two", "--micro-batch", 4))
    expected = history(tmp_path / "one")
    assert expected[-1]["step"] == 20
    for name in ("parts", "two"):
        for kind in ("model", "ema"):
            a, b = (torch.load(tmp_path / n / "last.pt", weights_only=True)[kind] for n in ("one", name))
            for k in a:
                torch.testing.assert_close(a[k], b[k], atol=1e-5, rtol=0, msg=f"{name}: {k}")
        for ours, theirs in zip(history(tmp_path / name), expected, strict=True):
            assert ours.pop("train_loss") == pytest.approx(theirs["train_loss"], abs=2e-5)
            assert ours.items() <= theirs.items()
    measured = start(2, "--eval", "one/last.pt", "--workers", 1)
    finish(measured)
    assert f"top-1 {expected[-1]['val_top1']:.2f} %" in measured.log.read_text()
    assert "of 21 images" in measured.log.read_text()


def test_an_error_of_one_process_ends_all_and_is_shown(folder, tmp_path, start):
    for path in (folder / "train").rglob("*.jpg"):
        path.write_text("not an image")
    run = start(2, "--data", folder, *RUN, "--img-size", 80)
    assert run.wait(timeout=200) != 0  # left alone, the other would wait for half an hour
    text = run.log.read_text()
    assert "error: " in text and "cannot be decoded, more than one in a hundred" in text
    assert "Traceback" not in text.split("torch/distributed/elastic")[0]


def test_bad_input_is_said_once_by_many_processes(tmp_path, start):
    run = start(2, "--data", "cifar11")
    assert run.wait(timeout=300) != 0 and run.log.read_text().count("error: ") == 1


# --- Runs that are stopped.


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_ends_the_run_after_its_step_and_the_same_command_goes_on(
    train, folder, tmp_path, monkeypatch, number
):
    args = ("--data", folder, *RUN)
    assert train(*args, "--out", "whole").status == 0
    step = script.Trainer.step

    def signalled(trainer, images, targets, at, *more):
        if at in signalled.at:
            signalled.at.remove(at)
            signal.raise_signal(number)
        return step(trainer, images, targets, at, *more)

    signalled.at = [4, 5]  # within an epoch, and in its last step: before the evaluation
    monkeypatch.setattr(script.Trainer, "step", signalled)
    for done in (5, 6):
        stopped = train(*args, "--out", "run")
        assert stopped.status == 128 + number
        assert f"stopped after step {done}: the same command goes on from there" in stopped.err
    again = train(*args, "--out", "run")
    assert again.status == 0 and "going on after step 6, in epoch 2 of 4" in again.out
    assert_equal(weights(tmp_path / "whole"), weights(tmp_path / "run"))
    assert history(tmp_path / "whole") == history(tmp_path / "run")


def test_a_signal_to_the_launcher_stops_all_processes_and_the_same_command_goes_on(folder, tmp_path, start):
    (tmp_path / "often.py").write_text("import train; train.LOG_SECONDS = 0.1; train.main()")
    for i in range(300):  # more steps, within an epoch, than lines of the log
        (folder / "train" / "dark" / f"more{i}.jpg").hardlink_to(folder / "train" / "dark" / "00.jpg")
    args = ("--data", folder, *RUN, "--epochs", 2, "--save-minutes", 10)
    finish(start(2, *args, "--out", "whole"))
    run = start(2, *args, "--out", "run", script=tmp_path / "often.py")
    wait_for_step(run, 2)
    run.send_signal(signal.SIGTERM)
    assert run.wait(timeout=300) != 0
    assert "the same command goes on from there" in run.log.read_text()
    stopped = read_step(tmp_path / "run")
    assert 2 <= stopped < 80 and stopped != 40  # within an epoch
    finish(start(2, *args, "--out", "run"))
    assert_equal(weights(tmp_path / "whole"), weights(tmp_path / "run"))
    assert history(tmp_path / "whole") == history(tmp_path / "run")


def test_a_second_signal_ends_the_process_at_once(folder, tmp_path, start):
    pause = "import time, train; train.Trainer.step = lambda *args: time.sleep(1000); train.main()"
    (tmp_path / "slow.py").write_text(pause)
    run = start(1, "--data", folder, *RUN, script=tmp_path / "slow.py")
    while "training images" not in run.log.read_text():
        time.sleep(0.1)
    time.sleep(1)
    run.send_signal(signal.SIGTERM)
    run.send_signal(signal.SIGTERM)  # as from a launcher and from its group: one and the same
    time.sleep(1.5)
    assert run.poll() is None
    run.send_signal(signal.SIGTERM)
    assert run.wait(timeout=20) == 128 + signal.SIGTERM


def wait_for_step(process, least):
    for _ in range(3000):
        steps = re.findall(r"step (\d+)/", process.log.read_text())
        if steps and int(steps[-1]) >= least:
            return
        assert process.poll() is None, process.log.read_text()
        time.sleep(0.1)
    raise AssertionError(f"step {least} did not come: {process.log.read_text()}")


@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_that_is_killed_at_random_ends_with_the_same_weights(
    folder, tmp_path, start, processes, request
):
    planned = request.config.getoption("kills")
    args = ("--data", folder, *RUN, "--epochs", 2 + planned, "--save-minutes", 0)
    args += ("--model", "deit_tiny", "--patch-size", 8)  # large enough that a save takes its time
    finish(start(processes, *args, "--out", "whole"))
    chance, run, kills, torn, steps = random.Random(processes), tmp_path / "killed", 0, 0, []
    while kills < planned - (processes > 1):
        began, life = read_step(run), start(processes, *args, "--out", "killed")
        while life.poll() is None and read_step(run) == began:
            time.sleep(0.01)
        time.sleep(0.3 * chance.random())
        kill(life)
        kills, torn = kills + 1, torn + (run / "last.pt.tmp").exists()
        steps.append(read_step(run))
    env, began = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}, read_step(run)
    life = start(processes, *args, "--out", "killed", env=env, restarts=1)
    if processes > 1:  # at last only one of them is killed: the launcher starts all of them again
        while read_step(run) == began:
            time.sleep(0.01)
        os.kill(children(life.pid)[-1], signal.SIGKILL)
        kills += 1
    finish(life)
    assert life.log.read_text().count("going on after step") == (began > 0) + (processes > 1)
    print(f"{processes} process(es), killed {kills} times: after steps {steps}, {torn} times in a save")
    assert_equal(weights(tmp_path / "whole"), weights(run))
    assert history(tmp_path / "whole") == history(run)


def children(pid):
    found = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True)
    return [int(pid) for pid in found.stdout.split()]


def kill(process):
    """SIGKILL for a command and the processes that torchrun has started for it."""
    for pid in (process.pid, *children(process.pid)):
        os.kill(pid, signal.SIGKILL)
    process.wait()


def test_processes_whose_launcher_is_killed_stop_after_their_step(folder, tmp_path, start):
    run = start(2, "--data", folder, *RUN, "--epochs", 1000)
    wait_for_step(run, 5)
    run.kill()
    for _ in range(600):
        if "the same command goes on" in run.log.read_text():
            return
        time.sleep(0.1)
    raise AssertionError(run.log.read_text())


def read_step(run):
    try:
        return torch.load(run / "last.pt", weights_only=True, mmap=True)["step"]
    except FileNotFoundError:
        return 0


@pytest.mark.parametrize("processes", [1, 2])
def test_a_worker_that_is_killed_ends_the_run_soon_and_no_step_is_lost(folder, tmp_path, start, processes):
    for i in range(300):
        (folder / "train" / "dark" / f"more{i}.jpg").hardlink_to(folder / "train" / "dark" / "00.jpg")
    args = ("--data", folder, *RUN, "--img-size", 80, "--epochs", 2, "--save-minutes", 10)
    args += ("--augment", "light", "--repeats", 1)
    finish(start(processes, *args, "--out", "whole"))
    run = start(processes, *args, "--out", "run")
    wait_for_step(run, 1)
    pid = run.pid if processes == 1 else children(run.pid)[-1]
    os.kill(children(pid)[-1], signal.SIGKILL)
    began = time.monotonic()
    assert run.wait(timeout=60) == 1 and time.monotonic() - began < 30
    text = run.log.read_text()
    assert "fewer --workers or more shared memory" in text
    assert "Traceback" not in text.split("torch/distributed/elastic")[0]
    told = int(re.findall(r"step (\d+)/", text)[-1])
    assert told <= read_step(tmp_path / "run") < 80
    finish(start(processes, *args, "--out", "run"))
    assert_equal(weights(tmp_path / "whole"), weights(tmp_path / "run"))


def shell(tmp_path, line):
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return subprocess.run(["bash", "-c", line], cwd=tmp_path, env=env, capture_output=True, text=True)


def test_too_few_files_for_the_workers_end_the_run_in_one_line(folder, tmp_path):
    command = [sys.executable, "-W", "ignore", script.__file__, "--data", folder, *RUN, "--workers", 16]
    done = shell(tmp_path, f"ulimit -n 40; {shlex.join(map(str, [*command, '--img-size', 80]))}")
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    assert "Too many open files" in done.stderr and "fewer --workers" in done.stderr


@pytest.mark.parametrize("reader", ["", "| head -n 1", "> /dev/full", ">&- 2>&-"])
def test_a_run_whose_log_has_no_reader_goes_on(folder, tmp_path, reader):
    command = [sys.executable, script.__file__, "--data", folder, *RUN, "--workers", 0, "--out", "run"]
    done = shell(tmp_path, f"set -o pipefail; {shlex.join(map(str, command))} {reader}")
    assert done.returncode == 0 and done.stderr == ""
    assert len(history(tmp_path / "run")) == 4


def test_a_full_disk_leaves_the_last_checkpoint_whole(train, folder, tmp_path, monkeypatch):
    args = ("--data", folder, *RUN, "--out", "run", "--save-minutes", 0)
    step = script.Trainer.step

    def filling(trainer, images, targets, at, *more):
        if at == 3:
            while not script.read_checkpoint(tmp_path / "run" / "last.pt")["history"]:  # it is still written
                time.sleep(0.01)
            (tmp_path / "run" / "last.pt.tmp").symlink_to("/dev/full")
        return step(trainer, images, targets, at, *more)

    with monkeypatch.context() as m:
        m.setattr(script.Trainer, "step", filling)
        one_line(train(*args), "last.pt can't be written: No space left on device")
    assert not (tmp_path / "run" / "last.pt.tmp").exists() and read_step(tmp_path / "run") == 3
    assert "going on after step 3" in train(*args).out


def test_weights_that_diverge_in_the_last_step_are_not_saved(train, folder, tmp_path):
    one_step = ("--data", folder, *RUN, "--batch-size", 24, "--warmup", 0, "--out", "run")
    done = train(*one_step, "--lr", 1e30)
    assert done.status == 1 and "not finite" in done.err and len(done.err.splitlines()) == 1
    done = train(*one_step, "--lr", 1e15)
    assert done.status == 1 and "not finite" in done.err, done.out
    assert not (tmp_path / "run" / "last.pt").exists()


# --- Nothing waits for the device.


class CopiesToDevice(TorchDispatchMode):
    """Counts what is copied from the CPU to the meta device."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if torch.is_tensor(out) and args and torch.is_tensor(args[0]):
            self.count += out.is_meta and not args[0].is_meta and "copy" in str(function)
        return out


@pytest.mark.parametrize("model", ["vit_micro", "swin_micro"])
def test_a_step_reads_nothing_from_its_device_and_copies_only_its_random_numbers_there(model, monkeypatch):
    """A tensor on the meta device has no values: whatever asked for one would raise."""
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: contextlib.nullcontext())
    monkeypatch.setattr(script, "optimizer", lambda model, s: torch.optim.AdamW(model.parameters()))
    s = settings("--model", model, "--augment", "full", "--clip", 1, "--ema", 0.9, "--drop-path", 0.1)
    s.device = "meta"
    s = script.recipe(s, side=32, images=8000)
    trainer = script.Trainer(s, 10)
    images = torch.zeros(64, 3, 32, 32, dtype=torch.uint8, device="meta")
    targets = torch.zeros(64, dtype=torch.long, device="meta")
    for at in range(3):  # the first brings constants to the device
        if at == 1:
            monkeypatch.setattr(torch, "tensor", None)  # which would copy, unseen by the mode, and wait
        with CopiesToDevice() as copies:
            trainer.step(images, targets, at, 100)
    assert copies.count == 2  # for augmentation, and for mixing and drop path


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_step_does_not_wait_for_the_gpu():
    s = settings("--device", "cuda", "--augment", "full", "--clip", 1, "--ema", 0.9, "--drop-path", 0.1)
    s = script.recipe(s, side=32, images=8000)
    s.compile = False
    trainer = script.Trainer(s, 10)
    images = torch.zeros(64, 3, 32, 32, dtype=torch.uint8, device="cuda")
    targets = torch.zeros(64, dtype=torch.long, device="cuda")
    trainer.step(images, targets, 0, 100)
    torch.cuda.set_sync_debug_mode("error")
    try:
        trainer.step(images, targets, 1, 100)
    finally:
        torch.cuda.set_sync_debug_mode("default")
