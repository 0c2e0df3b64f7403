"""Promises about whole runs: any number of processes gives the same result, and a run that is
stopped or killed is resumed with the same weights."""

import os
import random
import re
import signal
import subprocess
import time

import pytest
import torch
from helpers import assert_same_run, make_args, read_metrics, read_weights

import train as script

RUN = ("--epochs", 3, "--img-size", 32, "--batch-size", 8, "--workers", 1, "--log-interval", 1)
RUN += ("--drop-path", 0.2, "--ema-decay", 0.9)
LARGE = ("--img-size", 80, "--patch-size", 16, "--model", "deit_tiny")  # saved in about 0.1 s


def read_log(run):
    return run.log.read_text()


def finish(run):
    """Wait for the processes of `start` or `fork` to end with status 0."""
    if isinstance(run, subprocess.Popen):
        statuses = [run.wait(timeout=300)]
    else:
        for process in run.processes:
            process.join(300)
        statuses = [process.exitcode for process in run.processes]
    assert not any(statuses), read_log(run)


def wait_for(condition, run):
    """Wait until condition() is true."""
    for _ in range(20_000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError(read_log(run))


def saved_step(folder):
    """The step of a run's last checkpoint, 0 before the first one."""
    if not (folder / "last.pt").exists():
        return 0
    return torch.load(folder / "last.pt", weights_only=True, mmap=True)["progress"]["step"]


def children(pid):
    done = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True)
    return [int(word) for word in done.stdout.split()]


# --- Processes.


def assert_close_runs(run, expected):
    """Two folders of runs hold the same weights and metrics, up to rounding."""
    for key in ("model", "ema"):
        weights = read_weights(run, key=key)
        for name, tensor in read_weights(expected, key=key).items():
            if name.endswith("qkv.bias"):
                # Attention does not depend on the bias of the keys: Adam amplifies its rounding.
                weights[name].chunk(3)[1].zero_()
                tensor.chunk(3)[1].zero_()
            torch.testing.assert_close(weights[name], tensor, atol=5e-6, rtol=0, msg=name)
    for ours, theirs in zip(read_metrics(run), read_metrics(expected), strict=True):
        assert ours.pop("train_loss") == pytest.approx(theirs.pop("train_loss"), abs=2e-5)
        assert ours == theirs


def test_two_processes_and_micro_batches_give_one_process_weights(train, fork, folder, tmp_path):
    for name in ("dark/11", "dark/10", "light/11"):  # 21 to validate: odd, so the shares differ
        (folder / "val" / f"{name}.jpg").unlink()
    args = ["--data", folder, "--epochs", 6, "--img-size", 80, "--patch-size", 8, "--workers", 1]
    args += ["--batch-size", 10, "--clip-grad", 1, "--drop-path", 0.2, "--ema-decay", 0.9]
    args += ["--augment", "full", "--aug-repeats", 3, "--mix", "switch"]
    assert train(*args, "--out", "one", "--micro-batch", 0).status == 0
    assert train(*args, "--out", "parts", "--micro-batch", 4).status == 0
    finish(fork(2, *args, "--out", "two", "--micro-batch", 4))  # the shares are 4 and 6 images
    metrics = read_metrics(tmp_path / "one")
    assert metrics[-1]["step"] == 12
    assert_close_runs(tmp_path / "parts", tmp_path / "one")
    assert_close_runs(tmp_path / "two", tmp_path / "one")


def test_two_processes_evaluate_each_image_once(train, fork, folder):
    (folder / "val" / "dark" / "11.jpg").unlink()  # 23 images: the shares differ
    done = train("--data", folder, *RUN, "--epochs", 1, "--ema-decay", 0, "--out", "run")
    (top1,) = re.findall(r"finished: (top-1 .* %), best", done.out)
    evaluated = fork(2, "--eval", "run/last.pt", "--workers", 1)
    finish(evaluated)
    (line,) = read_log(evaluated).splitlines()
    assert top1 in line and line.endswith("of 23 images")


def test_compiled_processes_with_micro_batches_give_one_process_weights(
    train, fork, folder, tmp_path, monkeypatch
):
    args = ("--data", folder, *RUN, "--patch-size", 8, "--mix", "switch")
    assert train(*args, "--out", "one").status == 0
    compile_model = torch.compile

    def compile_without_inductor(model):  # which takes a minute
        print("compiling", type(model).__name__)
        return compile_model(model, backend="aot_eager")

    monkeypatch.setattr(torch, "compile", compile_without_inductor)
    two = fork(2, *args, "--micro-batch", 2, "--compile", "--out", "two")
    finish(two)
    assert read_log(two).count("compiling DistributedDataParallel") == 2
    assert_close_runs(tmp_path / "two", tmp_path / "one")


def test_bad_input_is_reported_once(fork):
    run = fork(2, "--data", "cifar11")
    for process in run.processes:
        process.join(60)
        assert process.exitcode not in (0, None)
    assert run.processes[0].exitcode == 2
    assert len(re.findall("^error: ", read_log(run), re.MULTILINE)) == 1


def test_error_of_one_process_ends_all(folder, start):
    (folder / "train" / "dark" / "01.jpg").write_text("text")
    run = start(2, "--data", folder, *RUN, "--img-size", 80, "--workers", 0)
    assert run.wait(timeout=120) != 0  # left alone, the other process would wait for half an hour
    assert len(re.findall("^error: cannot decode .*dark/01.jpg", read_log(run), re.MULTILINE)) == 1


@pytest.mark.parametrize("error", ["image", "flag"])
def test_error_of_all_processes_is_reported_once(folder, start, error):
    if error == "image":  # which every process decodes
        (folder / "train" / "dark" / "01.jpg").write_text("text")
    flags = ("--epoch", 3) if error == "flag" else ()
    run = start(2, "--data", folder, *RUN, "--workers", 0, *flags)
    assert run.wait(timeout=120) != 0
    assert len(re.findall("^error: ", read_log(run), re.MULTILINE)) == 1, read_log(run)


# --- Runs that are stopped.


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
def test_stopped_run_is_resumed_with_the_same_weights(train, folder, tmp_path, monkeypatch, number):
    args = ("--data", folder, *RUN, "--log-interval", 50)
    assert train(*args, "--out", "whole").status == 0
    train_step = script.Trainer.train_step
    steps = [4, 5]  # in mid-epoch, and in the last step of an epoch, before its evaluation

    def raise_signal(trainer, images, targets, step, lr):
        if step in steps:
            steps.remove(step)
            signal.raise_signal(number)
        return train_step(trainer, images, targets, step, lr)

    handler = signal.getsignal(number)
    monkeypatch.setattr(script.Trainer, "train_step", raise_signal)
    for step in (5, 6):
        stopped = train(*args, "--out", "run")
        assert stopped.status == 128 + number
        assert f"stopped after step {step}: the same command resumes" in stopped.out
        assert saved_step(tmp_path / "run") == step
    assert signal.getsignal(number) == handler
    resumed = train(*args, "--out", "run", "--workers", 0, "--micro-batch", 8)
    assert resumed.status == 0 and "resuming after step 6" in resumed.out
    assert_same_run(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_to_the_workers_too_stops_the_run(train, fork, folder, tmp_path, number):
    args = ("--data", folder, *RUN, "--img-size", 80, "--batch-size", 2, "--workers", 2)
    run = fork(1, *args, "--out", "run")
    (process,) = run.processes
    wait_for(lambda: "step 2/36" in read_log(run), run)
    for pid in (*children(process.pid), process.pid):  # as Ctrl-C and SLURM do
        os.kill(pid, number)
    process.join(60)
    assert process.exitcode == 128 + number
    step = saved_step(tmp_path / "run")
    assert read_log(run).endswith(f"stopped after step {step}: the same command resumes the run\n")
    assert train(*args, "--out", "run").status == 0
    assert train(*args, "--out", "whole").status == 0
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_signal_to_one_process_stops_all(fork, folder, tmp_path):
    run = fork(2, "--data", folder, *RUN, "--epochs", 20, "--out", "run")
    wait_for(lambda: "step 2/60" in read_log(run), run)
    os.kill(run.processes[1].pid, signal.SIGUSR1)
    for process in run.processes:
        process.join(60)
    statuses = [process.exitcode for process in run.processes]
    assert statuses == [128 + signal.SIGTERM, 128 + signal.SIGUSR1], read_log(run)
    assert 2 <= saved_step(tmp_path / "run") < 60


def test_second_signal_ends_the_process_at_once(fork, folder, monkeypatch):
    def never_end(*args):
        print("in a step")
        while True:
            time.sleep(0.1)

    monkeypatch.setattr(script.Trainer, "train_step", never_end)
    run = fork(1, "--data", folder, *RUN, "--out", "run")
    (process,) = run.processes
    wait_for(lambda: "in a step" in read_log(run), run)
    for number in (signal.SIGINT, signal.SIGTERM):  # the second is the first of its kind
        os.kill(process.pid, number)
        process.join(0.5)
        assert process.is_alive()
    os.kill(process.pid, signal.SIGTERM)
    process.join(20)
    assert process.exitcode == -signal.SIGTERM


def test_torchrun_restarts_killed_processes_and_stops_at_a_signal(fork, start, folder, tmp_path):
    args = ("--data", folder, *RUN, *LARGE, "--workers", 0, "--batch-size", 4, "--save-minutes", 0)
    # Without this variable, a group that is restarted may not get its port again.
    env = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    run = start(2, *args, "--out", "run", "--no-resume", restarts=1, env=env)
    wait_for(lambda: saved_step(tmp_path / "run") > 0, run)
    os.kill(children(run.pid)[-1], signal.SIGKILL)
    wait_for(lambda: re.search("resuming after step .* step 8/18", read_log(run), re.DOTALL), run)
    run.send_signal(signal.SIGTERM)
    assert run.wait(timeout=120) != 0
    step = saved_step(tmp_path / "run")
    assert 8 <= step < 12  # in the second epoch
    assert f"stopped after step {step}: the same command resumes" in read_log(run)
    resumed = fork(2, *args, "--out", "run")
    finish(resumed)
    assert f"resuming after step {step}" in read_log(resumed)
    finish(fork(2, *args, "--out", "whole"))
    assert_same_run(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize("num_processes", [1, 2])
def test_killed_run_is_resumed_with_the_same_weights(
    fork, folder, tmp_path, num_processes, request
):
    num_kills = request.config.getoption("kills")
    args = ("--data", folder, *RUN, *LARGE, "--epochs", 2 + num_kills, "--save-minutes", 0)
    finish(fork(num_processes, *args, "--out", "whole"))
    rng = random.Random(num_processes)
    for _ in range(num_kills):
        step = saved_step(tmp_path / "run")
        run = fork(num_processes, *args, "--out", "run")
        wait_for(lambda step=step: saved_step(tmp_path / "run") > step, run)
        time.sleep(0.5 * rng.random())
        for process in run.processes:
            process.kill()
            process.join()
        saving = (tmp_path / "run" / "last.pt.tmp").exists()
        print(f"killed after step {saved_step(tmp_path / 'run')}, while saving: {saving}")
    run = fork(num_processes, *args, "--out", "run")
    finish(run)
    assert read_log(run).count("resuming after step") == 1
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_interrupted_save_leaves_the_checkpoint_before(train, folder, tmp_path, monkeypatch):
    args = ("--data", folder, *RUN, "--save-minutes", 0)
    assert train(*args, "--out", "whole").status == 0
    save = torch.save

    def save_half(checkpoint, path):
        save(checkpoint, path)
        if checkpoint["progress"]["step"] == 4:
            os.truncate(path, 1000)
            raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", save_half)
        with pytest.raises(OSError, match="No space left"):
            train(*args, "--out", "run")
    assert saved_step(tmp_path / "run") == 3
    assert "resuming after step 3" in train(*args, "--out", "run").out
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_run_that_was_killed_at_its_end_has_all_metrics(train, folder, tmp_path, monkeypatch):
    args = ("--data", folder, *RUN, "--epochs", 1, "--out", "run")
    write_text = script.write_text

    def stop(path, text):
        if path.name == "metrics.jsonl":
            raise KeyboardInterrupt
        write_text(path, text)

    with monkeypatch.context() as patch:
        patch.setattr(script, "write_text", stop)
        with pytest.raises(KeyboardInterrupt):
            train(*args)
    assert train(*args).status == 0
    assert len(read_metrics(tmp_path / "run")) == 1


# --- The GPU.


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("model_name", ["vit_micro", "swin_micro"])
def test_step_does_not_wait_for_the_gpu(model_name):
    flags = ("--augment", "full", "--mix", "switch", "--clip-grad", 1, "--ema-decay", 0.9)
    args = make_args("--model", model_name, "--device", "cuda", *flags, "--drop-path", 0.1)
    trainer = script.Trainer(args, script.build_model(args, 10))
    images = torch.zeros(64, 3, 32, 32, dtype=torch.uint8, device="cuda")
    targets = torch.zeros(64, dtype=torch.long, device="cuda")
    for step in range(2):  # constants are copied to the device
        trainer.train_step(images, targets, step, 1e-3)
    torch.cuda.set_sync_debug_mode("error")
    try:
        trainer.train_step(images, targets, 2, 1e-3)
    finally:
        torch.cuda.set_sync_debug_mode("default")
