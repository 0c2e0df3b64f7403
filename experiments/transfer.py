"""Does training with aligned targets carry over to other classes? (a claim of the paper)

    python experiments/transfer.py                               # built-in images, minutes on a CPU
    python experiments/transfer.py --data cifar10 --images 5000

Models are trained on the first half of a dataset's classes, with the area target and with aligned
ones, and then fine-tuned, with a new head, on a few images of the other half. The fine-tuning mixes
nothing and is the same for all; a model from scratch is trained as long on the same images. Top-1
is that of the other half's validation images, and ± is half of a 95 % interval over seeds.
"""

import argparse
import functools
import itertools
from pathlib import Path

import common
import compare
import data
import train

NUM_IMAGES = 2000  # of the first half
STARTS = ("from scratch", *compare.PAIR)


@functools.cache
def half_of(name, is_second):
    """The datasets of the first or the second half of the classes of --data, in memory. Their
    numbers count from zero."""
    datasets = data.open_datasets(name)
    middle = len(datasets.classes) // 2
    half = range(middle, len(datasets.classes)) if is_second else range(middle)

    def keep(dataset):
        return [(image, int(target) - half[0]) for image, target in dataset if target in half]

    classes = [datasets.classes[number] for number in half]
    return datasets._replace(train=keep(datasets.train), val=keep(datasets.val), classes=classes)


def open_datasets(settings):
    """The images of a run."""
    return common.choose_images(half_of(settings.data, settings.is_second), settings)


def make_run(args, is_second, model, method, seed, **changes):
    """A run on one half of the classes."""
    label = f"{'second' if is_second else 'first'}-half-{model}-{method}"
    own = {"model": model, "seed": seed, "is_second": is_second, **changes}
    return common.make_run(args, open_datasets, label, **own)


def make_first_run(args, model, method, seed):
    return make_run(args, False, model, method, seed, **compare.METHODS[method])


def train_run(settings):
    common.train_run(settings, open_datasets(settings))


def make_parser(doc):
    parser = common.make_image_parser(doc)
    parser.set_defaults(images=NUM_IMAGES, passes=5)
    return parser


def main():
    parser = make_parser(__doc__)
    add = parser.add_argument
    count = train.number(int, 1)
    add("--finetune-images", type=count, default=60, help="[%(default)s]")
    add("--finetune-passes", type=count, default=100, help="over those [%(default)s]")
    args = parser.parse_args()
    finetune_args = argparse.Namespace(**vars(args))
    finetune_args.images, finetune_args.passes = args.finetune_images, args.finetune_passes
    first, second = {}, {}
    for seed, model, start in itertools.product(range(args.seeds), args.models, STARTS):
        own = {"mix": "none"}
        if start in compare.PAIR:
            run = make_first_run(args, model, start, seed)
            first[model, start, seed] = run
            own["finetune"] = str(Path(run.out, "last.pt").resolve())
        second[model, start, seed] = make_run(finetune_args, True, model, start, seed, **own)
    common.run_all(train_run, first.values(), args.jobs)
    common.run_all(train_run, second.values(), args.jobs)

    rows = []
    for model in args.models:
        top1 = common.read_results(second, model, STARTS, args.seeds)
        rows += [[model, *row] for row in common.make_rows(top1, "area")]
    text = common.markdown_table(["model", "trained with", "top-1 %", "difference to area"], rows)
    text += f"\n{common.describe(args)} Then {args.finetune_passes} passes over "
    text += f"{args.finetune_images} images of the other half of the classes.\n"
    common.write_results("transfer", text, args.runs)


if __name__ == "__main__":
    common.main(main)
