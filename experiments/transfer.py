"""Does pre-training with aligned targets carry over to other classes? (the paper's Table 4)

    python experiments/transfer.py                               # built-in images, minutes on a CPU
    python experiments/transfer.py --data cifar10 --images 5000

Models are trained on the first half of a set's classes, with the area target and with aligned
targets, and then, by `--finetune`, with a new head on a few images of the other half. That second
training mixes nothing and is the same for all, with `train.py`'s weight decay for fine-tuning; a
model from scratch, trained as long on the same images by the ordinary recipe, stands beside them.
Top-1 is of the second half's classes.
"""

import runs
from runs import data

TRAINED = ("area", "TL-Align")


def pretrain(args):
    """Train on the first half of the classes. Returns {(model, target, seed): settings}, and the
    sets."""
    number = len(data.open_datasets(args.data, args.root).classes)
    first = runs.open_part(args, range(number // 2))
    before = {
        (model, way, seed): runs.settings(args, first, model, way, seed, "-first-half")
        for seed in range(args.seeds)
        for model in args.models
        for way in TRAINED
    }
    runs.train_all([(s, first) for s in before.values()], args)
    return before, first


def main():
    parser = runs.arguments(__doc__, images=2000, passes=5)
    parser.add_argument(
        "--few", type=int, default=60, help="images of the other half to train on [60]"
    )
    parser.add_argument("--tune-passes", type=int, default=100, help="times to go over those [100]")
    args = runs.parsed(parser)
    number = len(data.open_datasets(args.data, args.root).classes)
    second = runs.open_part(args, range(number // 2, number), args.few, args.tune_passes)

    before, first = pretrain(args)
    after = {}
    for (model, way, seed), s in before.items():
        for start, path in (("from scratch", None), (way, f"{s.out}/last.pt")):
            name = f"-second-half-{start.lower().replace(' ', '-')}"
            after[model, start, seed] = runs.settings(
                args, second, model, "no mixing", seed, name, finetune=path
            )
    runs.train_all([(s, second) for s in after.values()], args)

    rows, panels = [], []
    for model in args.models:
        top1 = {way: [] for way in ("from scratch", *TRAINED)}
        for (name, way, _), s in after.items():
            if name == model:
                top1[way].append(runs.done(s)[-1]["val_top1"])
        told, points = runs.beside(top1)
        rows += [[model, *row] for row in told]
        panels.append((model, [*top1], {"mean over seeds and its 95 % interval": points}))
    text = runs.table(["model", "pre-trained with", "top-1 %", "difference to area"], rows)
    text += (
        f"\n{len(second.val)} validation images of {args.data}, of classes {second.classes[0]} to "
        f"{second.classes[-1]}; {args.tune_passes} passes over {args.few} training images of "
        "theirs."
        f"{runs.made_of(args, first)}\n"
    )
    chart = runs.chart(panels, "top-1 %, other classes", joined=False)
    runs.write(args, "transfer", text, chart)


if __name__ == "__main__":
    runs.run(main)
