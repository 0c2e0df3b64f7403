"""Does training with aligned targets carry over to other classes? (the paper's Table 4)

    python experiments/transfer.py                               # built-in images, minutes on a CPU
    python experiments/transfer.py --data cifar10 --images 5000

Models are trained on the first half of a dataset's classes, with the area target and with aligned
ones, and then fine-tuned, with a new head, on a few images of the other half. The fine-tuning mixes
nothing and is the same for all; a model from scratch is trained as long on the same images. Top-1
is that of the other half's validation images, and ± is half of a 95 % interval over seeds.
"""

import argparse
import functools
import statistics
from pathlib import Path

import common
import compare
import data
import train

TRAINED = ("area", "TL-Align")


@functools.cache
def half_of(name, root, is_second):
    """The datasets of the first or the second half of the classes of --data, in memory. Their
    numbers count from zero."""
    datasets = data.open_datasets(name, root)
    middle = len(datasets.classes) // 2
    half = range(middle, len(datasets.classes)) if is_second else range(middle)

    def keep(dataset):
        return [(image, int(target) - half[0]) for image, target in dataset if target in half]

    classes = [datasets.classes[number] for number in half]
    return datasets._replace(train=keep(datasets.train), val=keep(datasets.val), classes=classes)


def run_datasets(job):
    _, settings, args, is_second = job
    half = half_of(args.data, args.root, is_second)
    return common.choose_images(half, args, settings.seed)


def train_job(job):
    common.train_run(job[1], run_datasets(job))


def is_done(job):
    return common.is_finished(job[1], run_datasets(job))


def make_job(args, is_second, model, seed, name, **changes):
    """A run on one half of the classes: (folder, settings, args, is_second)."""
    datasets = common.choose_images(half_of(args.data, args.root, is_second), args, seed)
    half = "second" if is_second else "first"
    folder = f"{Path(args.data).resolve().name}-{half}-half-{args.images}x{args.passes}"
    folder = Path(args.runs, folder, f"{model}-{name}-{seed}")
    settings = common.make_settings(args, datasets, model, seed, folder, **changes)
    return folder, settings, args, is_second


def main():
    parser = common.make_parser(__doc__)
    count = train.number(int, 1)
    parser.add_argument("--few", type=count, default=60, help="images to fine-tune on [60]")
    parser.add_argument("--tune-passes", type=count, default=100, help="over those [100]")
    parser.set_defaults(images=2000, passes=5)
    args = parser.parse_args()
    tune_args = argparse.Namespace(**{**vars(args), "images": args.few, "passes": args.tune_passes})

    first, second = {}, {}
    for seed in range(args.seeds):
        for model in args.models:
            second[model, "from scratch", seed] = make_job(
                tune_args, True, model, seed, "from-scratch", mix="none"
            )
            for method in TRAINED:
                job = make_job(args, False, model, seed, method, **compare.METHODS[method])
                first[model, method, seed] = job
                second[model, method, seed] = make_job(
                    tune_args, True, model, seed, method, mix="none", finetune=f"{job[0]}/last.pt"
                )
    common.run_jobs(train_job, list(first.values()), args.jobs, is_done)
    common.run_jobs(train_job, list(second.values()), args.jobs, is_done)

    rows = []
    for model in args.models:
        top1 = {}
        for start in ("from scratch", *TRAINED):
            jobs = [second[model, start, seed] for seed in range(args.seeds)]
            top1[start] = [compare.read_top1(job) for job in jobs]
        for start, values in top1.items():
            difference = "" if start == "area" else common.show_difference(values, top1["area"])
            rows.append([model, start, f"{statistics.fmean(values):.2f}", difference])
    text = common.markdown_table(["model", "trained with", "top-1 %", "difference to area"], rows)
    text += f"\nFirst half: {compare.describe(args)} Second half: {args.tune_passes} passes over "
    text += f"{args.few} images. {args.seeds} seeds.\n"
    common.write_results("transfer", text, args.runs)


if __name__ == "__main__":
    common.main(main)
