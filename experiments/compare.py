"""Which way to mix, and to label the mix, trains the better model (the paper's Table 1).

    python experiments/compare.py                                # built-in images, minutes on a CPU
    python experiments/compare.py --data cifar10 --images 100 --batch-size 50 --seeds 24 # hours
    python experiments/compare.py --full                                                 # on a GPU

No mixing, Mixup, and CutMix with these targets: the area, also with half of the images left whole;
TransMix (ViT only); TL-Align, and TL-Align by norm and by parts, the rules of `weighing.py`. Each
has the same model, schedule and seeds. A seed draws the images and sets the weights at the start,
the order, the crops and the boxes alike for every method, so each method is held against the area
target seed by seed: the table gives the mean difference with its 95 % interval over seeds, and how
many seeds would tell a difference of half a point. Accuracy is that of the last epoch. Time is that
of the fastest epoch of all seeds beside the area's; runs go side by side, so it is within some
percent (`experiments/cost.py` measures it closely).
"""

import statistics

import runs


def main():
    parser = runs.arguments(__doc__)
    parser.add_argument(
        "--methods", nargs="+", default=[*runs.METHODS], choices=runs.METHODS, help="which"
    )
    args = runs.parsed(parser)
    sets = runs.open_part(args)
    methods = [m for m in runs.METHODS if m in args.methods or m == "area"]
    trained = {
        (model, method, seed): runs.settings(args, sets, model, method, seed)
        for seed in range(args.seeds)
        for model in args.models
        for method in methods
        if method != "TransMix" or runs.has_class_token(model)
    }
    runs.train_all([(s, sets) for s in trained.values()], args)

    rows, panels = [], []
    for model in args.models:
        top1, rate = {}, {}
        for (name, method, _), s in trained.items():
            if name == model:
                epochs = runs.done(s)
                top1.setdefault(method, []).append(epochs[-1]["val_top1"])
                rate[method] = max(rate.get(method, 0), *(e["images_per_s"] for e in epochs))
        points = []
        for method in top1:
            gains = [a - b for a, b in zip(top1[method], top1["area"], strict=False)]
            mean, half = runs.interval(gains)
            told = method != "area" and len(gains) > 1
            gain, seeds = (runs.signed(gains), runs.needed(gains, 0.5)) if told else ("", "")
            cost = f"{rate['area'] / rate[method]:.2f}"
            rows.append([model, method, f"{statistics.fmean(top1[method]):.2f}", gain, seeds, cost])
            points.append((mean, mean - half, mean + half))
        panels.append((model, [*top1], {"mean difference to area and its 95 % interval": points}))
    head = [
        "model",
        "method",
        "top-1 %",
        "difference to area",
        "seeds for ± 0.5",
        "time of a step / area's",
    ]
    text = runs.table(head, rows)
    text += f"\n{len(sets.val)} validation images of {args.data}.{runs.made_of(args, sets)}\n"
    runs.write(args, "compare", text, runs.chart(panels, "top-1, percentage points", joined=False))


if __name__ == "__main__":
    runs.run(main)
