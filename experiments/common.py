"""What the experiments share: runs side by side, each done once, and how results are shown.

A run has a folder of its own under --runs. The same command continues where it was stopped: a
finished run is not repeated, and one with other settings or images is never taken for it.
"""

import argparse
import json
import math
import multiprocessing
import os
import signal
import statistics
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import redirect_stdout
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils.data import Subset

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for all experiments
import data  # noqa: E402
import train  # noqa: E402
from data import UserError  # noqa: E402

# ------------------------------------------------------------------------------------------------
# The command line.


def make_parser(doc, any_data=True):
    """A parser of the flags that most experiments have. Change their defaults by `set_defaults`.
    any_data: whether the images and the models can be chosen."""
    parser = train.Parser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    count = train.number(int, 1)
    count_or_all = train.number(int, 0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if any_data:
        add("--data", default="shapes", help="as for train.py [shapes]")
        add("--root", default="data", help="folder of torchvision's datasets [data]")
        add("--models", nargs="+", default=["vit_micro", "swin_micro"], help="[both micro models]")
        add("--epochs", type=count, default=1, help="each ends with an evaluation [1]")
    add("--images", type=count_or_all, default=60, help="training images of a seed; 0: all [60]")
    add("--passes", type=count, default=100, help="over the images in each epoch [100]")
    add("--batch-size", type=count, default=30, help="[30]")
    add("--val-images", type=count_or_all, default=0, help="0: all [0]")
    add("--seeds", type=count, default=3, help="number of seeds, from 0 [3]")
    add("--jobs", type=train.number(int, 0), help="side by side; 0: none in a process of its own")
    add("--device", default=device, choices=["cpu", "cuda"])
    add("--runs", default="runs/experiments", help="folder of runs and results")
    return parser


def main(function):
    """Run a script. What the user gave and cannot be used ends it in one line and status 2."""
    try:
        function()
    except UserError as error:
        train.exit_with(error)
    except KeyboardInterrupt:
        print("stopped: the same command continues", file=sys.stderr)
        sys.exit(130)


# ------------------------------------------------------------------------------------------------
# Runs.


def choose(dataset, num_images, *name):
    """The indices of images chosen at random, by a generator of that name; 0 chooses all."""
    order = torch.randperm(len(dataset), generator=data.generator("chosen", *name)).tolist()
    return order[: num_images or None]


def choose_images(datasets, args, seed):
    """--images training images that the seed draws, each --passes times in an epoch, and
    --val-images validation images, the same for every seed."""
    indices = choose(datasets.train, args.images, seed) * args.passes
    val_indices = choose(datasets.val, args.val_images, "val")
    return datasets._replace(
        train=Subset(datasets.train, indices), val=Subset(datasets.val, val_indices)
    )


def make_settings(args, datasets, model, seed, out, **changes):
    """The complete settings of a run, as train.py has them, for the flags of an experiment.

    datasets: those of the run, from `choose_images`. model: one of train.MODELS. changes: settings
    that differ, such as targets="area", and what else tells the run from others.
    Raises UserError.
    """
    if model not in train.MODELS:
        raise UserError(f"--models {model}: expected some of {', '.join(train.MODELS)}")
    words = ["--data", args.data, "--root", args.root, "--model", model]
    words += ["--seed", str(seed), "--device", args.device, "--out", str(out)]
    settings = train.parse_args(words)
    settings.epochs = args.epochs
    settings.batch_size = args.batch_size
    settings.mix_prob = 1.0
    image_size = data.median_size(datasets.train)
    if image_size <= data.SMALL_SIZE:
        settings.workers = 0  # they would take longer to start
    vars(settings).update(changes)
    train.fill_defaults(settings, image_size, len(datasets.train), datasets.hflip)
    train.check_args(settings, len(datasets.train))
    return settings


class Run(NamedTuple):
    """A run of an experiment, in the folder settings.out. All of it can be pickled."""

    settings: argparse.Namespace  # as train.py has them
    open_datasets: Callable  # returns a data.Datasets
    do: Callable  # do(run) trains, and returns a dict of results


def read_result(run):
    """The results of a run, or None if it is not finished. Raises UserError if what its folder
    holds is another run."""
    path = Path(run.settings.out, "result.json")
    if not path.exists():
        return None
    result = json.loads(path.read_text())
    try:
        train.check_same_run(run.settings, run.open_datasets(), result)
    except UserError as error:
        raise UserError(f"{error}; in an experiment, give another --runs") from error
    return result


def train_model(run, loss=train.mixed_loss, model=None):
    """Train the model of a run, or go on with it. Returns it in evaluation mode."""
    settings, datasets = run.settings, run.open_datasets()
    if model is None:
        model = train.build_model(settings, len(datasets.classes))
    lock = train.lock_folder(settings.out)
    checkpoint = train.find_checkpoint(settings, datasets)
    if settings.finetune and checkpoint is None:
        train.load_weights(model, settings.finetune, datasets.classes, new_head=True)
    train.train(settings, datasets, model, loss, checkpoint)
    lock.close()
    return model.eval()


def train_and_evaluate(run, loss=train.mixed_loss, model=None):
    """Train the model of a run. Returns its accuracy and calibration after the last epoch."""
    model = train_model(run, loss, model)
    metrics = Path(run.settings.out, "metrics.jsonl").read_text().splitlines()
    logits, targets = predict(model, run.open_datasets().val, run.settings)
    return {
        "top1": json.loads(metrics[-1])["val_top1"],
        "calibration_error": calibration_error(logits, targets),
    }


def load_model(run, model=None):
    """The model of a finished run, in evaluation mode, without gradients."""
    settings, classes = run.settings, run.open_datasets().classes
    if model is None:
        model = train.build_model(settings, len(classes))
    train.load_weights(model, Path(settings.out, "last.pt"), classes)
    return model.to(settings.device).eval().requires_grad_(False)


# ------------------------------------------------------------------------------------------------
# Processes.


def run_all(runs, num_processes=None):
    """Do all runs that are not finished, in their order; what they print goes to their log.txt.

    num_processes: how many processes, with one thread each, take runs side by side; None: one per
        core, or five on a GPU; 0: this process does all.
    """
    todo = [run for run in runs if read_result(run) is None]
    print(f"{len(todo)} of {len(runs)} runs to do", flush=True)
    tasks = [(run, f"{number}/{len(todo)}") for number, run in enumerate(todo, 1)]
    if num_processes is None:
        num_processes = 5 if torch.cuda.is_available() else train.NUM_CPUS
    if num_processes == 0:
        for task in tasks:
            do_run(*task)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_processes, context, begin_process) as pool:
        # Ctrl-C would end processes while they start. Training takes note of it.
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
        futures = [pool.submit(do_run, *task) for task in tasks]
        signal.signal(signal.SIGINT, handler)
        try:
            for future in as_completed(futures):
                future.result()
        except BaseException:  # such as Ctrl-C
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.terminate()
            raise


def do_run(run, number):
    """Do a run, and write its result.json. number: of the run, to be printed."""
    folder = Path(run.settings.out)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with (folder / "log.txt").open("a") as log, redirect_stdout(log):
            result = run.do(run)
    except SystemExit:  # of training that was asked to stop
        if multiprocessing.parent_process() is None:
            raise KeyboardInterrupt from None
        data.kill_workers()
        os._exit(1)  # a process of the pool would go on with the next run
    if train.get_rank() == 0:
        identity = train.run_identity(run.settings, run.open_datasets())
        train.write_text(folder / "result.json", json.dumps({**identity, **result}))
        print(f"{number} {folder}", flush=True)


def begin_process():
    torch.set_num_threads(1)
    multiprocessing.set_start_method(None, force=True)  # data workers start as in train.py
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent():
    """A parent that was killed had no time to end its children: they would train beside those that
    the same command starts."""
    multiprocessing.parent_process().join()
    os.kill(os.getpid(), signal.SIGTERM)


# ------------------------------------------------------------------------------------------------
# What models answer.


def center_crops(dataset, indices, size):
    """The evaluation crops of some images, (n, 3, size, size) uint8."""
    return torch.stack([data.center_crop(dataset[i][0], size) for i in indices])


@torch.no_grad()
def predict(model, dataset, settings):
    """Logits (n, classes) and targets (n,) of a dataset's evaluation crops."""
    logits, targets = [], []
    for images, batch_targets in data.batches_on_device(
        data.make_val_loader(dataset, settings), settings.device
    ):
        logits.append(model(data.normalize(images)))
        targets.append(batch_targets)
    return torch.cat(logits), torch.cat(targets)


def calibration_error(logits, targets, num_bins=15):
    """The expected calibration error in percent (Naeini et al. 2015): how far accuracy is from
    confidence, in bins of equal width of the confidence, weighted by their images."""
    confidence, top1 = logits.softmax(1).max(1)
    bins = (confidence * num_bins).long().clamp(max=num_bins - 1)
    gap = (top1 == targets).float() - confidence
    gaps = torch.zeros(num_bins, device=gap.device).index_add(0, bins, gap)
    return 100 * gaps.abs().sum().item() / len(targets)


# ------------------------------------------------------------------------------------------------
# Intervals, tables and charts.

# The 97.5 % point of Student's t for 1, 2, ... degrees of freedom.
STUDENT = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262]


def student(degrees):
    """The 97.5 % point of Student's t; from ten degrees of freedom on its series, to 0.003."""
    if degrees <= len(STUDENT):
        return STUDENT[degrees - 1]
    z = 1.959964  # of the normal distribution
    return z + (z**3 + z) / (4 * degrees) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)


def interval(values):
    """The mean and half of its 95 % interval, nan for a single value."""
    n = len(values)
    mean = statistics.fmean(values)
    if n < 2:
        return mean, math.nan
    return mean, student(n - 1) * statistics.stdev(values) / math.sqrt(n)


def show(values, digits=2, sign=""):
    """The interval of some values as text: 1.23 ± 0.45; of one, the value. sign: "+" shows it."""
    mean, half = interval(values)
    text = f"{mean:{sign}.{digits}f}"
    return text if math.isnan(half) else f"{text} ± {half:.{digits}f}"


def show_difference(a, b):
    """The paired interval of a - b as text: +1.23 ± 0.45."""
    return show([x - y for x, y in zip(a, b, strict=True)], sign="+")


def make_rows(values, baseline):
    """[name, mean, difference to the baseline] for each name. values: {name: a list over seeds}."""
    rows = []
    for name, own in values.items():
        difference = "" if name == baseline else show_difference(own, values[baseline])
        rows.append([name, f"{statistics.fmean(own):.2f}", difference])
    return rows


def markdown_table(header, rows):
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(map(str, line)) + " |\n" for line in lines)


def write_results(name, text, folder="runs/experiments"):
    """Print a text in Markdown and write it to folder/NAME.md."""
    path = Path(folder, f"{name}.md")
    path.parent.mkdir(parents=True, exist_ok=True)
    train.write_text(path, text)
    print(f"\n{text}\nwritten to {path}", flush=True)


def line_chart(path, x, lines, xlabel, ylabel, title=""):
    """Draw lines to an image file where matplotlib is installed; a line says so where not.

    x: numbers or names. lines: a dict of name: values, or name: (values, half-intervals).
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print(f"{path} is not drawn: matplotlib is not installed")
        return
    figure = Figure(figsize=(5, 3.5), layout="constrained")
    axes = figure.subplots()
    for name, values in lines.items():
        halves = None
        if isinstance(values, tuple):
            values, halves = values
        axes.errorbar(x, values, halves, marker="o", markersize=4, capsize=3, label=name)
    axes.set_xticks(x)
    axes.set(xlabel=xlabel, ylabel=ylabel, title=title)
    axes.legend()
    figure.savefig(path)
