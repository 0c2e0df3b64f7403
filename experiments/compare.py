"""Which target for a mixed image trains the better model? (the paper's main claim)

    python experiments/compare.py                          # built-in images, minutes on a CPU
    python experiments/compare.py --seeds 24               # the published table, half an hour
    python experiments/compare.py --data cifar10 --images 100 --batch-size 50 --val-images 5000

No mixing, and CutMix with these targets: the area; TransMix (ViT only); TL-Align; and the share of
the object pixels that the mix shows, which is known for the built-in images: no rule for labels can
be expected to do better than this oracle. A seed draws the training images and gives every method
the same images, start, order, crops and boxes, so differences to the area are paired by seed. ± is
half of a 95 % interval over seeds. "Part of the ceiling" is a method's gain over the area as a part
of the oracle's, with a 95 % interval by bootstrap over seeds, if the oracle's gain is significantly
above zero.
"""

import functools
import itertools
import math

import torch
from torch.utils.data import TensorDataset

import common
import data
import train
from data import UserError
from oracle import ObjectLoader, object_loss
from transmix import transmix_loss

ORACLE = "oracle"

# What differs in the settings of train.py. TransMix and the oracle have losses of their own.
METHODS = {
    "no mixing": {"mix": "none"},
    "area": {"targets": "area"},
    "TransMix": {},
    "TL-Align": {"targets": "tl_align"},
    ORACLE: {},
}

PAIR = ("area", "TL-Align")  # what other experiments compare


def make_parser(doc):
    """The flags of this script, mixing_ratio.py and robustness.py."""
    parser = common.make_image_parser(doc)
    add = parser.add_argument
    fraction = train.number(float, 0, 1)
    add("--mix-prob", type=fraction, default=1.0, help="share of the images that are mixed [1]")
    add("--clutter", type=fraction, default=0.0, help="random blocks in the built-in images [0]")
    return parser


# ------------------------------------------------------------------------------------------------
# Images.


def open_datasets(settings):
    """The images of a run."""
    return common.choose_images(open_images(settings.data, settings.clutter), settings)


@functools.cache
def open_images(name, clutter):
    """The datasets of --data. Raises UserError."""
    datasets = data.open_datasets(name)
    if not clutter:
        return datasets
    if name != "shapes":
        raise UserError("--clutter is for the built-in images only")
    train_images, train_classes = datasets.train.tensors
    val_images, val_classes = datasets.val.tensors
    return datasets._replace(
        train=TensorDataset(add_clutter(train_images, clutter, "train"), train_classes),
        val=TensorDataset(add_clutter(val_images, clutter, "val"), val_classes),
    )


def add_clutter(images, amount, part):
    """Blend images with random colours in blocks of 2 px. images: (n, 3, S, S) uint8."""
    size = images.shape[-1] // 2
    blocks = data.uniform((len(images), 3, size, size), "clutter", part) * 255
    blocks = blocks.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    return torch.lerp(images.float(), blocks, amount).to(torch.uint8)


# ------------------------------------------------------------------------------------------------
# Runs.


def make_runs(args, methods):
    """The runs of --models and methods with every seed, {(model, method, seed): settings}."""
    runs = {}
    for seed, model, method in itertools.product(range(args.seeds), args.models, methods):
        if method == "TransMix" and model.startswith("swin"):
            continue  # without a class token
        if method == ORACLE and args.data != "shapes":
            continue
        own = {"model": model, "seed": seed, "method": method, **METHODS[method]}
        own |= {"mix_prob": args.mix_prob, "clutter": args.clutter}
        runs[model, method, seed] = common.make_run(args, open_datasets, f"{model}-{method}", **own)
    return runs


def train_run(settings):
    options = {}
    if settings.method == "TransMix":
        options = {"loss": transmix_loss}
    elif settings.method == ORACLE:
        options = {"loss": object_loss, "make_loader": ObjectLoader}
    common.train_run(settings, open_datasets(settings), **options)


# ------------------------------------------------------------------------------------------------
# The table.


def part_of(gains, ceiling, resamples=10_000):
    """The mean gain as a part of the mean gain of the ceiling, in percent, with its 95 % interval
    by bootstrap over seeds, as text; empty if the ceiling's gain is not significantly above 0."""
    mean, half = common.interval(ceiling)
    if math.isnan(half) or mean <= half:
        return ""
    gains, ceiling = torch.tensor(gains), torch.tensor(ceiling)
    drawn = torch.randint(
        len(gains), (resamples, len(gains)), generator=data.generator("bootstrap")
    )
    parts = 100 * gains[drawn].mean(1) / ceiling[drawn].mean(1)
    low, high = parts.quantile(torch.tensor([0.025, 0.975])).tolist()
    return f"{100 * gains.mean() / ceiling.mean():.0f} % ({low:.0f} to {high:.0f})"


def main():
    parser = make_parser(__doc__)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    args = parser.parse_args()
    methods = [name for name in METHODS if name in args.methods or name == "area"]
    runs = make_runs(args, methods)
    common.run_all(train_run, runs.values(), args.jobs)

    rows = []
    for model in args.models:
        own_methods = [method for method in methods if (model, method, 0) in runs]
        top1 = common.read_results(runs, model, own_methods, args.seeds)
        errors = common.read_results(runs, model, own_methods, args.seeds, "calibration_error")
        gains = {m: [a - b for a, b in zip(top1[m], top1["area"], strict=True)] for m in top1}
        for method, mean, difference in common.make_rows(top1, "area"):
            part = ""
            if method in ("TransMix", "TL-Align") and ORACLE in top1:
                part = part_of(gains[method], gains[ORACLE])
            rows.append([model, method, mean, difference, common.show(errors[method]), part])
    header = ["model", "method", "top-1 %", "difference to area", "calibration error %"]
    text = common.markdown_table([*header, "part of the ceiling"], rows)
    text += f"\n{common.describe(args)} Mixed: {args.mix_prob:.0%}; clutter: {args.clutter:g}.\n"
    common.write_results("compare", text, args.runs)


if __name__ == "__main__":
    common.main(main)
