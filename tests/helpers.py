"""What several test files need: settings, and what a run has written."""

import json

import torch

import train

TINY = ("--epochs", 2, "--img-size", 32, "--workers", 0, "--batch-size", 8)  # six steps


def make_args(*words, image_size=32, num_images=8000):
    """The settings of a command line for such training images, with the defaults filled in."""
    args = train.parse_args([str(word) for word in words])
    return train.fill_defaults(args, image_size, num_images)


def read_weights(run, name="last.pt", key="model"):
    return torch.load(run / name, weights_only=True)[key]


def read_metrics(run):
    """metrics.jsonl without the fields that depend on the time."""
    names = ("epoch", "step", "train_loss", "val_top1", "val_top5", "lr")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: line[name] for name in names} for line in lines]


def assert_same_weights(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def assert_same_run(a, b):
    """Two folders of runs hold the same weights, bit for bit, and the same metrics."""
    assert_same_weights(read_weights(a), read_weights(b))
    assert_same_weights(read_weights(a, key="ema"), read_weights(b, key="ema"))
    assert read_metrics(a) == read_metrics(b)


def assert_one_line(done, *words):
    """The script ended with status 2 and one line on stderr, which holds the words."""
    assert done.status == 2, done.out + done.err
    assert done.err.startswith("error: ")
    assert len(done.err.splitlines()) == 1, done.err
    for word in words:
        assert word in done.err, done.err
