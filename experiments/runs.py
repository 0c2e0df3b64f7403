"""What the experiments share: training runs, each done once, and how results are shown.

A run is `train.train` in a process of its own. Its folder is named by what it is, under --runs: a
run that is done is not done again, by whichever experiment, and one that was stopped goes on.
"""

import argparse
import contextlib
import itertools
import json
import math
import multiprocessing
import os
import statistics
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from html import escape
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils.data import Dataset, TensorDataset

from models import data, has_class_token, script  # noqa: F401 (experiments take them from here)
from transmix import transmix_loss

METHODS = {
    "no mixing": {"mix": "none"},
    "Mixup": {"mix": "mixup"},
    "area": {"targets": "area"},
    "area, half": {"targets": "area", "mix_prob": 0.5},
    "TransMix": {"targets": "transmix", "compile": False},
    "TL-Align": {},
    "TL-Align, norm": {"residual": "norm"},
    "TL-Align, parts": {"residual": "parts"},
}


def arguments(doc, without=(), **defaults):
    """A parser of what all experiments take, but for some; defaults replace those of this list."""
    (first, _, rest), style = doc.partition("\n"), argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=first, epilog=rest, formatter_class=style)
    options = {
        "data": ("shapes", "shapes, a torchvision set, or a folder, as for train.py"),
        "root": ("data", "folder that torchvision's sets are downloaded to"),
        "models": (["vit_micro", "swin_micro"], "which models"),
        "images": (60, "training images, drawn by each seed; 0 for all"),
        "passes": (100, "times that an epoch goes over them"),
        "val_images": (0, "validation images, chosen by chance; 0 for all"),
        "epochs": (1, "epochs, each with an evaluation"),
        "batch_size": (30, "images a step"),
        "seeds": (3, "runs of each kind, with seeds from 0"),
        "jobs": (None, "runs side by side [one a core; 5 on a GPU]"),
        "device": ("cuda" if torch.cuda.is_available() else "cpu", "where to train"),
        "runs": ("runs/experiments", "folder of the runs and the results"),
    }
    for name, (default, help) in ((k, v) for k, v in options.items() if k not in without):
        default = defaults.get(name, default)
        many = {"nargs": "+"} if isinstance(default, list) else {}
        if isinstance(default, (str, list)):
            kind = str
        elif name in ("passes", "epochs", "seeds"):
            kind = script.number(int, 1)
        else:
            kind = script.number(int, 0)
        text = f"{help} [{default}]" if default is not None else help
        parser.add_argument(
            "--" + name.replace("_", "-"), type=kind, default=default, help=text, **many
        )
    if "full" not in without:
        parser.add_argument(
            "--full", action="store_true", help="all of CIFAR-10 and more: for a GPU"
        )
    return parser


def parsed(parser, **full):
    """The arguments; --full stands in for those that were not given. full: the experiment's own."""
    args = parser.parse_args()
    if vars(args).get("full"):
        parser.set_defaults(data="cifar10", models=["deit_tiny", "swin_5m"], images=0, val_images=0)
        parser.set_defaults(passes=1, epochs=100, batch_size=128, seeds=5, **full)
        args = parser.parse_args()
    args.jobs = args.jobs or (5 if args.device == "cuda" else script.NUM_CPUS)
    return args


def open_part(args, classes=None, images=None, passes=None):
    """The sets of --data, of as many images as are wanted, chosen by chance, each so many times,
    and of the classes in the range, whose numbers then count from 0."""
    sets = data.open_datasets(args.data, args.root)
    classes, parts = classes or range(len(sets.classes)), []
    for name, part in (("train", sets.train), ("val", sets.val)):
        many = (
            (images or args.images, passes or args.passes)
            if name == "train"
            else (args.val_images, 1)
        )
        order = torch.randperm(len(part), generator=data.generator("chosen", name)).tolist()
        if len(classes) < len(sets.classes):
            numbers = classes_of(part)
            order = [i for i in order if int(numbers[i]) in classes]
        parts.append(Part(part, order, classes.start, *many))
    return data.Datasets(*parts, [sets.classes[i] for i in classes], sets.hflip)


def classes_of(part):
    """The number of each image's class, in order. A set that does not list them is read for it."""
    if isinstance(part, TensorDataset):
        return part.tensors[1]
    listed = getattr(part, "targets", None)
    return [part[i][1] for i in range(len(part))] if listed is None else listed


class Part(Dataset):
    """The first images of a pool, `most` or all (0), each `times` times; classes count from
    `first`."""

    def __init__(self, dataset, pool, first, most=0, times=1):
        self.dataset, self.pool, self.first, self.most, self.times = (
            dataset,
            pool,
            first,
            most,
            times,
        )
        self.indices = [*pool[: most or None]] * times

    def drawn(self, seed):
        """As many of the pool, another choice for each seed."""
        order = torch.randperm(len(self.pool), generator=data.generator("chosen", seed)).tolist()
        return Part(self.dataset, [self.pool[i] for i in order], self.first, self.most, self.times)

    def __len__(self):
        return len(self.indices)

    def __getitem__(self, i):
        image, target = self.dataset[self.indices[i]]
        return image, int(target) - self.first


def settings(args, sets, model, method, seed, name="", **more):
    """The complete settings of one run. name: what is special about its sets."""
    side, epochs = data.median_size(sets.train), more.get("epochs", args.epochs)
    times, most = sets.train.times, len(sets.train) // sets.train.times
    folder = f"{Path(args.data).name}{name}-{most}x{times}x{epochs}-b{args.batch_size}"
    folder += f"-val{len(sets.val)}"
    run = f"{model}-{method.lower().replace(', ', '-').replace(' ', '-')}-{seed}"
    s = script.parse_args(
        ["--data", args.data, "--model", model, "--seed", str(seed), "--device", args.device]
    )
    s.epochs, s.mix_prob, s.out = epochs, 1.0, f"{args.runs}/{folder}/{run}"
    if side <= data.SMALL_SIZE:
        # The rates with which the tables of README.md were measured.
        s.batch_size, s.workers = args.batch_size, 0
        s.lr = 3e-3 if model.endswith("micro") else 1e-3 * args.batch_size / 128
        s.clip_grad = 5.0 if model.startswith("swin") else 0.0
    vars(s).update({**METHODS[method], **more})
    script.fill_defaults(s, side, len(sets.train), sets.hflip)
    script.check_args(s, len(sets.train))
    return s


def train(s, sets):
    """Train one run on images that its seed draws."""
    with logged(s.out):
        sets = sets._replace(train=sets.train.drawn(s.seed))
        model = script.build_model(s, len(sets.classes))
        checkpoint = script.find_checkpoint(s, sets)
        if s.finetune and checkpoint is None:
            script.load_weights(model, s.finetune, sets.classes, new_head=True)
        loss = transmix_loss if s.targets == "transmix" else script.mixed_loss
        script.train(s, sets, model, loss, checkpoint)


def done(s):
    """The epochs of a run that is finished, as its metrics.jsonl tells them; else None."""
    path = Path(s.out) / "metrics.jsonl"
    lines = [json.loads(line) for line in path.open()] if path.exists() else []
    return lines if len(lines) == s.epochs else None


def train_all(runs, args, train=train):
    """Train what is not done yet. runs: pairs of settings and sets. train: what trains one of
    them."""
    todo = [run for run in runs if not done(run[0])]
    side_by_side(train, todo, args, len(runs), lambda s: f"top-1 {done(s)[-1]['val_top1']:.2f} %")


def side_by_side(function, todo, args, of, result):
    """Call function(s, ...) for each tuple of todo, in processes; say each as it ends, with its
    result(s). of: how many there are with those that are done."""
    script.print0(f"{function.__name__}: {len(todo)} to do of {of}, {args.jobs or 1} side by side")
    if not args.jobs:  # one after another, here, and on all processes of torchrun
        for run in todo:
            function(*run)
            if script.get_world_size() > 1:
                dist.barrier()  # until it is written
        return
    began, threads = time.perf_counter(), max(1, script.NUM_CPUS // args.jobs)
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.jobs, spawn, begin_process, (threads,)) as pool:
        futures = {pool.submit(function, *run): run[0] for run in todo}
        try:
            for count, future in enumerate(as_completed(futures), 1):
                future.result()
                s, left = (
                    futures[future],
                    (time.perf_counter() - began) / count * (len(todo) - count) / 60,
                )
                script.print0(
                    f"{count}/{len(todo)}  {s.eval or s.out}: {result(s)}; "
                    f"about {left:.0f} min left"
                )
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


@contextlib.contextmanager
def logged(out):
    """In a process of the pool, what is printed goes to the run's log.txt."""
    Path(out).mkdir(parents=True, exist_ok=True)
    with Path(out, "log.txt").open("a") as log:
        with contextlib.redirect_stdout(log if multiprocessing.parent_process() else sys.stdout):
            yield


def begin_process(threads):
    """What a process of the pool does first. It ends with the one that started it, even if that was
    killed and had no time to say so: else it would train on, and the same command would train
    beside it."""

    def end_with_parent():
        multiprocessing.parent_process().join()
        os._exit(1)

    torch.set_num_threads(threads)
    threading.Thread(target=end_with_parent, daemon=True).start()


def run(main, and_then="; the same command goes on from what is done"):
    """Run an experiment, and say in one line why it ended if it did not get to its end."""
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(f"stopped{and_then}")
    except data.UserError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)


def model_of(s, sets):
    """The trained model of a run, or of the checkpoint s.eval, ready to be looked at."""
    path = s.eval or f"{s.out}/last.pt"
    model = script.build_model(s, len(sets.classes)).to(s.device).eval()
    script.load_weights(model, path, sets.classes)
    return model.requires_grad_(False)


def args_of(checkpoint):
    """The settings in a checkpoint of train.py; none in another one."""
    args = checkpoint.get("args")
    return args if isinstance(args, dict) else {}


def crops_of(dataset, img_size, indices):
    """Evaluation crops of some images, (n, 3, S, S) uint8."""
    return torch.stack([data.center_crop(dataset[i][0], img_size) for i in indices])


def write_bytes(path, content):
    """Write a file so that it is never seen half written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)


# --- Intervals, tables, charts.


def student(n):
    """97.5 % point of Student's t for n degrees of freedom; from ten on its series, good to
    0.003."""
    z, table = 1.959964, [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262]
    return (
        table[n - 1]
        if n < 10
        else z + (z**3 + z) / (4 * n) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * n**2)
    )


def interval(values):
    """Mean of a few runs and half the width of its 95 % interval (Student's t; nan for one run)."""
    n, mean = len(values), statistics.fmean(values)
    return mean, student(n - 1) * statistics.stdev(values) / math.sqrt(n) if n > 1 else math.nan


def needed(values, half):
    """How many runs that spread as these do make half a 95 % interval that short."""
    spread = statistics.stdev(values)
    return next(n for n in itertools.count(2) if student(n - 1) * spread <= half * math.sqrt(n))


def signed(values):
    """The same as text: +1.23 ± 0.45."""
    mean, half = interval(values)
    return f"{mean:+.2f}" + (f" ± {half:.2f}" if half == half else "")


def beside(values, base="area"):
    """Of {way: a value for each seed}: rows (way, mean, difference to the base), and points for a
    chart."""
    rows, points = [], []
    for way, those in values.items():
        mean, half = interval(those)
        gain = (
            ""
            if way == base
            else signed([a - b for a, b in zip(those, values[base], strict=False)])
        )
        rows.append([way, f"{mean:.2f}", gain])
        points.append((mean, mean - half, mean + half))
    return rows, points


def made_of(args, sets, spread="± is half the 95 % interval over seeds"):
    """A sentence on what was trained, and how the table shows what chance does."""
    images, passes, last = (
        len(sets.train) // sets.train.times,
        args.epochs * sets.train.times,
        args.seeds - 1,
    )
    drawn = ", drawn by each seed" * bool(args.images)
    models = f" Models of {passes} passes over {images} training images{drawn}"
    return f"{models}, seeds 0 to {last}; {spread}."


def table(head, rows):
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"


def write(args, name, text, chart, more=""):
    """Print the text, and leave it, and what is too long to print, as NAME.md beside the chart,
    NAME.svg."""
    for end, content in ((".md", text + more), (".svg", chart)):
        write_bytes(Path(args.runs) / f"{name}{end}", content.encode())
    script.print0(f"\n{text}\nthe same in {args.runs}/{name}.md, and drawn in {name}.svg")


COLOURS = ["#888888", "#2b6cb0", "#d9822b", "#2f8f5b", "#b0413e", "#7b4fa3"]


def chart(panels, label, columns=None, joined=True, width=330, height=220):
    """Lines in SVG. panels: (title, names of the places on the x axis, {series: points}), with a
    point (y, low, high) or None for each place. label: of the y axis. joined: whether lines join
    the points."""
    names = list(dict.fromkeys(name for _, _, series in panels for name in series))
    colour = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(names)}
    columns, left, above, at = columns or len(panels), 52, 40, 14
    below = 34 + 4 * max(len(place) for _, places, _ in panels for place in places)
    rows = math.ceil(len(panels) / columns)
    size = f'viewBox="0 0 {width * columns} {30 + rows * (above + height + below)}"'
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="11">'
    ]
    out.append('<rect width="100%" height="100%" fill="white"/>')
    for name in names:
        out.append(f'<circle cx="{at}" cy="16" r="4" fill="{colour[name]}"/>')
        out.append(f'<text x="{at + 8}" y="20">{escape(name)}</text>')
        at += 34 + 6 * len(name)
    for number, (title, places, series) in enumerate(panels):
        x0, w = number % columns * width + left, width - left - 12
        top = 30 + number // columns * (above + height + below) + above
        values = [
            v for points in series.values() for p in points if p for v in p if math.isfinite(v)
        ]
        low, high = min(values), max(values)
        step = 10 ** math.floor(math.log10((high - low) or 1))
        step = next(k * step for k in (0.1, 0.2, 0.5, 1, 2) if (high - low or 1) / (k * step) <= 7)
        low = math.floor(low / step) * step
        lines = max(1, math.ceil((high - low) / step - 1e-6))

        def y(v):
            return round(top + height * (1 - (v - low) / (lines * step)), 1)

        middle = f'x="{x0 + w / 2:.0f}" text-anchor="middle"'
        out.append(f'<text {middle} y="{top - 24}" font-size="12">{escape(title)}</text>')
        out.append(f'<text x="{x0 - 34}" y="{top - 9}" fill="#555">{escape(label)}</text>')
        for i in range(lines + 1):
            v = low + i * step
            paint = "#888" if abs(v) < step / 9 else "#e4e4e4"
            out.append(f'<path d="M{x0} {y(v)}h{w}" stroke="{paint}"/>')
            out.append(
                f'<text x="{x0 - 5}" y="{y(v) + 4}" text-anchor="end">{round(v, 6):g}</text>'
            )
        x = [x0 + w * (i + 0.5) / len(places) for i in range(len(places))]
        for at, place in zip(x, places, strict=False):
            spot = f'x="{at:.0f}" y="{top + height + 14}"'
            turn = f'text-anchor="end" transform="rotate(-35 {at:.0f} {top + height + 14})"'
            turn = turn if len(place) > 3 else 'text-anchor="middle"'
            out.append(f"<text {spot} {turn}>{escape(place)}</text>")
        for k, (name, points) in enumerate(series.items()):
            shift, paint = (
                4 * (k - (len(series) - 1) / 2),
                colour[name],
            )  # so that bars stand side by side
            here = [(at + shift, *p) for at, p in zip(x, points, strict=False) if p]
            if joined:
                line = " ".join(f"{at:.1f},{y(v)}" for at, v, *_ in here)
                out.append(
                    f'<polyline points="{line}" fill="none" stroke="{paint}" stroke-width="1.5"/>'
                )
            for at, v, least, most in here:
                if math.isfinite(least):
                    bar = f"M{at:.1f} {y(least)}V{y(most)}"
                    out.append(f'<path d="{bar}" stroke="{paint}" stroke-width="2"/>')
                out.append(f'<circle cx="{at:.1f}" cy="{y(v)}" r="3" fill="{paint}"/>')
    return "\n".join([*out, "</svg>\n"])
