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
import json
import statistics
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


def make_jobs(args, methods):
    """The runs of --models and methods with every seed: {(model, method, seed): (folder, settings,
    args)}. Seeds are completed one after another."""
    datasets = open_images(args.data, args.root, args.clutter)
    name = f"{Path(args.data).resolve().name}-{args.images}x{args.passes}x{args.epochs}"
    name += f"-batch{args.batch_size}-mix{args.mix_prob:g}-clutter{args.clutter:g}"
    jobs = {}
    for seed in range(args.seeds):
        chosen = common.choose_images(datasets, args, seed)
        for model in args.models:
            for method in methods:
                if method == "TransMix" and model.startswith("swin"):
                    continue  # without a class token
                if method == ORACLE and args.data != "shapes":
                    continue
                method_name = method.split(" (")[0].replace(" ", "-")
                folder = Path(args.runs, name, f"{model}-{method_name}-{seed}")
                settings = common.make_settings(
                    args, chosen, model, seed, folder, mix_prob=args.mix_prob, **METHODS[method]
                )
                settings.method = method  # tells runs from each other: the loss is no setting
                settings.images, settings.passes = args.images, args.passes
                settings.clutter = args.clutter
                jobs[model, method, seed] = (folder, settings, args)
    return jobs


def run_datasets(job):
    """The datasets of a run."""
    _, settings, args = job
    datasets = open_images(args.data, args.root, args.clutter)
    return common.choose_images(datasets, args, settings.seed)


def train_job(job):
    """Train a run and measure its calibration."""
    folder, settings, args = job
    datasets = run_datasets(job)
    model = common.train_run(settings, datasets, make_loss(job, datasets))
    logits, targets = common.predict(model, datasets.val, settings)
    result = {"calibration_error": common.calibration_error(logits, targets)}
    train.write_text(folder / "calibration.json", json.dumps(result))


def make_loss(job, datasets):
    settings = job[1]
    if settings.method == "TransMix":
        return transmix_loss
    if settings.method != ORACLE:
        return train.mixed_loss
    checkpoint = train.find_checkpoint(settings, datasets)
    step = 0 if checkpoint is None else checkpoint["progress"]["step"]
    return ObjectLoss(datasets.train.indices, settings, step)


def is_done(job):
    folder, settings, _ = job
    finished = common.is_finished(settings, run_datasets(job))
    return finished and (folder / "calibration.json").exists()


def complete_seeds(jobs, model, methods, num_seeds):
    """The seeds with which the runs of all methods are done."""
    seeds = range(num_seeds)
    return [s for s in seeds if all(is_done(jobs[model, method, s]) for method in methods)]


def read_top1(job):
    return common.read_metrics(job[0])[-1]["val_top1"]


def read_calibration_error(job):
    return json.loads((job[0] / "calibration.json").read_text())["calibration_error"]


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


def make_rows(model, jobs, methods, seeds):
    """The table's rows of a model, of these seeds."""
    top1 = {}
    for method in methods:
        top1[method] = [read_top1(jobs[model, method, seed]) for seed in seeds]
    rows = []
    for method in methods:
        errors = [read_calibration_error(jobs[model, method, seed]) for seed in seeds]
        difference, part = "", ""
        if method != "area":
            difference = common.show_difference(top1[method], top1["area"])
        if method in ("TransMix", "TL-Align") and ORACLE in methods:
            gains = [a - b for a, b in zip(top1[method], top1["area"], strict=True)]
            ceiling = [a - b for a, b in zip(top1[ORACLE], top1["area"], strict=True)]
            part = part_of(gains, ceiling)
        mean = f"{statistics.fmean(top1[method]):.2f}"
        rows.append([model, method, mean, difference, common.show(errors), part])
    return rows


def main():
    parser = make_parser(__doc__)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--table", action="store_true", help="train nothing")
    args = parser.parse_args()
    methods = [name for name in METHODS if name in args.methods or name == "area"]
    jobs = make_jobs(args, methods)
    if not args.table:
        common.run_jobs(train_job, list(jobs.values()), args.jobs, is_done)

    rows, complete = [], ""
    for model in args.models:
        own = [method for method in methods if (model, method, 0) in jobs]
        seeds = complete_seeds(jobs, model, own, args.seeds)
        if seeds:
            rows += make_rows(model, jobs, own, seeds)
        complete += f" {model}: {len(seeds)} seeds."
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
