"""Which way to mix, and to label the mix, trains the better model (the paper's Table 1).

    python experiments/compare.py                                    # built-in images, minutes on a CPU
    python experiments/compare.py --data cifar10 --images 5000 --seeds 5              # an hour on a CPU
    python experiments/compare.py --full                                                     # on a GPU

No mixing, Mixup, and CutMix with four targets: the area, TransMix (ViT only), TL-Align, and TL-Align with
residuals weighed by their norms; each with the same model, images, schedule and seeds. A seed sets the
weights at the start, the order, the crops and the boxes alike for every method, so each method is held
against the area target seed by seed: the table gives the mean difference with its 95 % interval over
seeds. Accuracy is that of the last epoch. Time is the mean over seeds of a run's seconds an image beside
the area's, from runs side by side: within some percent (`experiments/cost.py` measures it closely).
"""

import statistics

from runs import (
    METHODS,
    arguments,
    chart,
    done,
    interval,
    open_part,
    parsed,
    settings,
    table,
    train_all,
    write,
)


def main():
    parser = arguments(__doc__, epochs=10, seeds=3)
    parser.add_argument("--methods", nargs="+", default=[*METHODS], choices=METHODS, help="which methods")
    args = parsed(parser)
    sets = open_part(args)
    methods = [m for m in METHODS if m in args.methods or m == "area"]
    runs = {
        (model, method, seed): settings(args, sets, model, method, seed)
        for seed in range(args.seeds)
        for model in args.models
        for method in methods
        if method != "TransMix" or not model.startswith("swin")
    }
    train_all([(s, sets) for s in runs.values()], args)

    rows, panels = [], []
    for model in args.models:
        top1, seconds = {}, {}
        for (name, method, _), s in runs.items():
            if name == model:
                epochs = done(s)
                top1.setdefault(method, []).append(epochs[-1]["val_top1"])
                seconds.setdefault(method, []).append(
                    statistics.median(1 / e["images_per_s"] for e in epochs)
                )
        points = []
        for method in top1:
            mean, half = interval([a - b for a, b in zip(top1[method], top1["area"])])
            cost = statistics.fmean(a / b for a, b in zip(seconds[method], seconds["area"]))
            gain = "" if method == "area" else f"{mean:+.2f} ± {half:.2f}"
            rows.append([model, method, f"{statistics.fmean(top1[method]):.2f}", gain, f"{cost:.2f}"])
            points.append(None if method == "area" else (mean, mean - half, mean + half))
        panels.append((model, [*top1], {"mean difference to area, 95 % interval": points}))
    head = ["model", "method", "top-1 %", "difference to area", "time of a step / area's"]
    text = table(head, rows) + (
        f"\n{len(sets.train)} training and {len(sets.val)} validation images of {args.data}, "
        f"{args.epochs} epochs, seeds 0 to {args.seeds - 1}; ± is half the 95 % interval.\n"
    )
    write(args, "compare", text, chart(panels, "top-1, percentage points", joined=False))


if __name__ == "__main__":
    main()
