"""What the tests share: a small folder of images, and the script run as a user runs it."""

from types import SimpleNamespace

import pytest
import torch
from torchvision.transforms.v2.functional import to_pil_image

import train as script


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
def train(tmp_path, monkeypatch, capsys):
    """Run train.py in a folder of its own: train("--epochs", 1, ...) gives exit status and output."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def run(*args):
        status = 0
        try:
            script.main([str(a) for a in args])
        except SystemExit as end:
            status = end.code
        return SimpleNamespace(status=status, **capsys.readouterr()._asdict())

    return run
