"""Each experiment runs from its command, at its smallest size, and writes what it says."""

import subprocess
import sys
from pathlib import Path

import pytest

EXPERIMENTS = Path(__file__).parent.parent / "experiments"


def run(tmp_path, name, *args):
    command = [sys.executable, EXPERIMENTS / name, *map(str, args)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("given", [True, False], ids=["a folder", "its own images"])
def test_loader(tmp_path, folder, given):
    args = (folder / "train",) if given else ()
    out = run(tmp_path, "loader.py", *args, "--images", 8, "--rounds", 1, "--size", 64)
    assert "| decode once, crop three times |" in out
    assert (tmp_path / "runs" / "loader" / "augmented.png").stat().st_size > 10_000


def test_cost(tmp_path):
    args = ["--forms", "explicit", "fused", "--rounds", 1, "--batch-size", 2, "--device", "cpu"]
    out = run(tmp_path, "cost.py", "--models", "deit_tiny", "--sizes", 64, *args)
    table = (tmp_path / "runs" / "cost" / "cost.md").read_text()
    assert table.strip() in out and len(table.splitlines()) == 4
