"""What the tests share: a small folder of images, and the script run as a user runs it."""

import os
import subprocess
import sys
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torchvision.transforms.v2.functional import to_pil_image

import data
import runs
import train as train_script

# What makes an experiment small.
SMALL = ["--epochs", 1, "--images", 40, "--passes", 1, "--val-images", 20, "--batch-size", 20]


def pytest_addoption(parser):
    parser.addoption("--kills", type=int, default=1, help="how often the test of SIGKILL kills each run [1]")


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


class Here:
    """In the place of a pool of processes, whose start takes seconds: the same calls, in this one."""

    def __init__(self, *args):
        pass

    __enter__ = lambda self: self
    __exit__ = lambda self, *error: None

    def submit(self, function, *args):
        future = Future()
        future.set_result(function(*args))
        return future


@pytest.fixture
def here(tmp_path, monkeypatch, capsys):
    """Run an experiment's main in this process and a folder of its own, on few built-in images: gives its
    output, and the Markdown that it wrote."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runs, "ProcessPoolExecutor", Here)
    monkeypatch.setattr(data, "SHAPES_TRAIN", 200)
    monkeypatch.setattr(data, "SHAPES_VAL", 60)

    def run(experiment, *args):
        name = experiment.__name__
        small = [*SMALL, "--seeds", 1, "--device", "cpu"]
        monkeypatch.setattr(sys, "argv", [name, *map(str, [*small, *args])])
        experiment.main()
        folder = tmp_path / "runs" / "experiments"
        assert (folder / f"{name}.svg").read_text().endswith("</svg>\n")
        return capsys.readouterr().out, (folder / f"{name}.md").read_text()

    return run


@pytest.fixture
def train(tmp_path, monkeypatch, capsys):
    """Run train.py in a folder of its own: train("--epochs", 1, ...) gives exit status and output."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # for models this small, two that wait for each other are slower than one

    def run(*args):
        status = 0
        try:
            train_script.main(args)
        except SystemExit as end:
            status = end.code
        return SimpleNamespace(status=status, **capsys.readouterr()._asdict())

    yield run
    torch.set_num_threads(threads)


@pytest.fixture
def start(tmp_path):
    """Start train.py as a command, of one process or under torchrun of several, each with one thread:
    start(2, "--epochs", 1, ...) gives the running Popen. Its output is in `log`, a path. script: what to
    start instead of train.py."""
    launcher = ["-m", "torch.distributed.run", "--standalone"]
    started = []

    def start(processes, *args, env=None, restarts=0, script=train_script.__file__):
        before = [*launcher, f"--nproc-per-node={processes}", f"--max-restarts={restarts}"]
        command = [sys.executable, *(before if processes > 1 else []), Path(script).resolve()]
        log = tmp_path / f"log{len(started)}"
        one_thread = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **(env or {})}
        one_thread["PYTHONPATH"] = str(Path(train_script.__file__).parent)
        process = subprocess.Popen(
            [*command, *map(str, args)],
            cwd=tmp_path,
            env=one_thread,
            stdout=log.open("w"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        process.log = log
        started.append(process)
        return process

    yield start
    for process in started:
        process.terminate()  # of which a launcher tells its processes
