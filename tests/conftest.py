"""What the tests share: a small folder of images, and the script run as a user runs it."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torchvision.transforms.v2.functional import to_pil_image

import train as train_script


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
