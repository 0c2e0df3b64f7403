"""What the tests share: a small folder of images, and the script run as a user runs it."""

import gc
import multiprocessing
import os
import socket
import subprocess
import sys
import traceback
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torchvision.transforms.v2.functional import to_pil_image

import data
import train as train_script

# What makes an experiment small.
SMALL = ["--images", 40, "--passes", 1, "--val-images", 20, "--batch-size", 20]


def pytest_addoption(parser):
    parser.addoption(
        "--kills", type=int, default=1, help="how often the test of SIGKILL kills each run [1]"
    )


@pytest.fixture
def folder(tmp_path):
    """train/ and val/ with two classes, a dark and a light one, of 12 images of 40 x 32 px each."""
    g = torch.Generator().manual_seed(0)
    for part in ("train", "val"):
        for name, low in (("dark", 0), ("light", 150)):
            (tmp_path / "set" / part / name).mkdir(parents=True)
            for i in range(12):
                image = torch.randint(low, low + 100, (3, 32, 40), dtype=torch.uint8, generator=g)
                to_pil_image(image).save(tmp_path / "set" / part / name / f"{i:02}.jpg")
    return tmp_path / "set"


@pytest.fixture
def one_thread():
    """Where cores are busy, threads wait for each other much longer than small models take."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def here(tmp_path, monkeypatch, capsys):
    """Run an experiment's main in this process and a folder of its own, on few built-in images.

    here(compare, "--seeds", 1, ...) returns what it printed, and the Markdown that it wrote.
    common_flags: whether it has the flags that most experiments have.
    """
    import compare  # here, so that the tests of the core do not need the experiments

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "SHAPES_TRAIN", 200)
    monkeypatch.setattr(data, "SHAPES_VAL", 60)

    def run(experiment, *words, common_flags=True):
        compare.open_images.cache_clear()
        name = experiment.__name__
        small = [*SMALL, "--seeds", 1, "--device", "cpu", "--jobs", 0] if common_flags else []
        monkeypatch.setattr(sys, "argv", [name, *map(str, [*small, *words])])
        experiment.main()
        text = (tmp_path / "runs" / "experiments" / f"{name}.md").read_text()
        return capsys.readouterr().out, text

    yield run
    compare.open_images.cache_clear()


@pytest.fixture
def train(tmp_path, monkeypatch, capsys):
    """Run train.py in this process, on the CPU, in a folder of its own.

    train("--epochs", 1, ...) returns its exit status and what it printed, `out` and `err`.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # for models this small, two threads are slower than one

    def run(*args):
        status = 0
        try:
            train_script.main(args)
        except SystemExit as end:
            status = end.code
            if end.__context__ is not None:  # what a script frees at its end, such as workers
                traceback.clear_frames(end.__context__.__traceback__)
        printed = capsys.readouterr()
        return SimpleNamespace(status=status, out=printed.out, err=printed.err)

    yield run
    torch.set_num_threads(threads)


@pytest.fixture
def start(tmp_path):
    """Start train.py, or another script, in one process or in several under torchrun.

    start(2, "--epochs", 1, ...) returns the Popen. Its attribute `log` is the file of its output.
    """
    started = []

    def start(num_processes, *args, script=train_script.__file__, restarts=0, env=None):
        command = [sys.executable]
        if num_processes > 1:
            command += ["-m", "torch.distributed.run", "--standalone"]
            command += [f"--nproc-per-node={num_processes}", f"--max-restarts={restarts}"]
        command += [Path(script).resolve(), *args]
        log = tmp_path / f"log{len(started)}"
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "PYTHONPATH": str(Path(train_script.__file__).parent),
            **(env or {}),
        }
        process = subprocess.Popen(
            [str(word) for word in command],
            cwd=tmp_path,
            env=environment,
            stdout=log.open("w"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        process.log = log
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.terminate()  # torchrun ends its processes
            process.wait(timeout=60)


@pytest.fixture
def fork(train, tmp_path):
    """Run train.py in forked processes, which do not have to import torch again.

    fork(2, "--epochs", 1, ...) returns the processes as `processes`, and the file of their output
    as `log`. They form one group, as under torchrun, and run what a test has replaced.
    """
    started = []

    def start(num_processes, *args):
        with socket.socket() as unused:
            unused.bind(("", 0))
            port = unused.getsockname()[1]
        log = tmp_path / f"fork{len(started)}"
        log.touch()
        context = multiprocessing.get_context("fork")
        processes = []
        for rank in range(num_processes):
            group = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_processes}
            group.update({"MASTER_ADDR": "localhost", "MASTER_PORT": port})
            if num_processes == 1:
                group = {}
            process = context.Process(target=run_forked, args=(args, group, log))
            process.start()
            processes.append(process)
        started.extend(processes)
        return SimpleNamespace(processes=processes, log=log)

    yield start
    for process in started:
        process.kill()
        process.join()


def run_forked(args, environment, log):
    gc.freeze()  # leaves the parent's objects alone
    sys.stdout = sys.stderr = log.open("a", buffering=1)
    os.environ.update({name: str(value) for name, value in environment.items()})
    try:
        train_script.main(args)
    finally:
        data.kill_workers()  # registered with atexit, which multiprocessing does not call
