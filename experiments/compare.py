"""Which target for a mixed image trains the better model? (the paper's Table 1)

    python experiments/compare.py                          # built-in images, minutes on a CPU
    python experiments/compare.py --seeds 24               # the published table, an hour
    python experiments/compare.py --seeds 24 --table       # of the seeds that are complete so far
    python experiments/compare.py --data cifar10 --images 100 --batch-size 50 --seeds 24

No mixing, and CutMix with these targets: the area; TransMix (ViT only); TL-Align; and the share of
the object pixels that the mix shows, which is known for the built-in images: no rule for labels can
be expected to do better than this oracle. A seed draws the training images and gives every method
the same images, start, order, crops and boxes, so each is held against the area seed by seed. ±
is half of a 95 % interval over seeds. Accuracy and expected calibration error are those after the
last epoch. "Part of the ceiling" is a method's gain over the area as a part of the oracle's, with a
95 % interval by bootstrap over seeds, where the oracle's gain is told from zero.
"""

import functools
import itertools
from pathlib import Path

import torch
from torch.utils.data import TensorDataset

import common
import data
import train
from data import UserError
from oracle import ObjectLoss
from transmix import transmix_loss

ORACLE = "objects (oracle)"

# What differs in the settings of train.py.
METHODS = {
    "no mixing": {"mix": "none"},
    "area": {"targets": "area"},
    "TransMix": {"compile": False},
    "TL-Align": {"targets": "tl_align"},
    ORACLE: {},
}


def make_parser(doc):
    """The flags of all experiments on models that are trained here."""
    parser = common.make_parser(doc)
    share = train.number(float, 0, 1)
    parser.add_argument("--mix-prob", type=share, default=1.0, help="share that is mixed [1]")
    parser.add_argument(
        "--clutter", type=share, default=0.0, help="of random blocks in the built-in images [0]"
    )
    return parser


# ------------------------------------------------------------------------------------------------
# Images.


def open_datasets(args, seed):
    """The images of a run."""
    return common.choose_images(open_images(args.data, args.root, args.clutter), args, seed)


@functools.cache
def open_images(name, root, clutter):
    """The datasets of --data. Raises UserError."""
    datasets = data.open_datasets(name, root)
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
    """The runs of --models and methods with every seed, {(model, method, seed): common.Run}.
    Seeds are completed one after another."""
    name = f"{Path(args.data).resolve().name}-{args.images}x{args.passes}x{args.epochs}"
    name += f"-batch{args.batch_size}-mix{args.mix_prob:g}-clutter{args.clutter:g}"
    runs = {}
    for seed, model, method in itertools.product(range(args.seeds), args.models, methods):
        if method == "TransMix" and model.startswith("swin"):
            continue  # without a class token
        if method == ORACLE and args.data != "shapes":
            continue
        changes = {"method": method, "mix_prob": args.mix_prob, **METHODS[method]}
        for flag in ("images", "passes", "clutter"):  # they tell runs from each other, too
            changes[flag] = getattr(args, flag)
        method_name = method.split(" (")[0].replace(" ", "-")
        out = f"{args.runs}/{name}/{model}-{method_name}-{seed}"
        open_own = functools.partial(open_datasets, args, seed)
        settings = common.make_settings(args, open_own(), model, seed, out, **changes)
        runs[model, method, seed] = common.Run(settings, open_own, train_run)
    return runs


def train_run(run):
    loss = train.mixed_loss
    if run.settings.method == "TransMix":
        loss = transmix_loss
    elif run.settings.method == ORACLE:
        datasets = run.open_datasets()
        checkpoint = train.find_checkpoint(run.settings, datasets)
        step = 0 if checkpoint is None else checkpoint["progress"]["step"]
        loss = ObjectLoss(datasets.train.indices, run.settings, step)
    return common.train_and_evaluate(run, loss)


def read_results(runs, model, methods, num_seeds):
    """{method: a list of results}, of the seeds with which the runs of all methods are done."""
    results = {method: [] for method in methods}
    for seed in range(num_seeds):
        found = [common.read_result(runs[model, method, seed]) for method in methods]
        if all(found):
            for method, result in zip(methods, found, strict=True):
                results[method].append(result)
    return results


def values_of(results, key="top1"):
    """{method: a list of numbers}. results: from `read_results`."""
    return {method: [result[key] for result in own] for method, own in results.items()}


# ------------------------------------------------------------------------------------------------
# The table.


def part_of(gains, ceiling, resamples=10_000):
    """The mean gain as a part of the mean gain of the ceiling, in percent, with its 95 % interval
    by bootstrap over seeds, as text; empty if the ceiling's gain is not told from zero."""
    mean, half = common.interval(ceiling)
    if not mean - half > 0:
        return ""
    gains, ceiling = torch.tensor(gains), torch.tensor(ceiling)
    drawn = torch.randint(
        len(gains), (resamples, len(gains)), generator=data.generator("bootstrap")
    )
    parts = 100 * gains[drawn].mean(1) / ceiling[drawn].mean(1)
    low, high = parts.quantile(torch.tensor([0.025, 0.975])).tolist()
    return f"{100 * gains.mean() / ceiling.mean():.0f} % ({low:.0f} to {high:.0f})"


def make_rows(results):
    """A row for each method. results: from `read_results`."""
    top1, errors = values_of(results), values_of(results, "calibration_error")
    rows = common.make_rows(top1, "area")
    for row in rows:
        method = row[0]
        part = ""
        if method in ("TransMix", "TL-Align") and ORACLE in top1:
            gains = [a - b for a, b in zip(top1[method], top1["area"], strict=True)]
            ceiling = [a - b for a, b in zip(top1[ORACLE], top1["area"], strict=True)]
            part = part_of(gains, ceiling)
        row += [common.show(errors[method]), part]
    return rows


def main():
    parser = make_parser(__doc__)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--table", action="store_true", help="train nothing")
    args = parser.parse_args()
    methods = [name for name in METHODS if name in args.methods or name == "area"]
    runs = make_runs(args, methods)
    if not args.table:
        common.run_all(runs.values(), args.jobs)

    rows, complete = [], ""
    for model in args.models:
        own = [method for method in methods if (model, method, 0) in runs]
        results = read_results(runs, model, own, args.seeds)
        if results["area"]:
            rows += [[model, *row] for row in make_rows(results)]
        complete += f" {model}: {len(results['area'])} seeds."
    header = ["model", "method", "top-1 %", "difference to area", "calibration error %"]
    text = common.markdown_table([*header, "part of the ceiling"], rows)
    text += f"\n{describe(args)} Mixed: {args.mix_prob:.0%}; clutter: {args.clutter:g}.{complete}\n"
    common.write_results("compare", text, args.runs)


def describe(args):
    """What was trained, for below a table."""
    return (
        f"{args.passes * args.epochs} passes over {args.images or 'all'} training images of "
        f"{args.data} in batches of {args.batch_size}; validation images: "
        f"{args.val_images or 'all'}; torch {torch.__version__}, {args.device}."
    )


if __name__ == "__main__":
    common.main(main)
