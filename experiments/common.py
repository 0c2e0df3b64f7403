"""Shared by the experiments: runs in parallel, predictions, statistics and tables.

A run is one call of `train.train`, in its own folder under --runs. The folder's name ends in a
digest of the settings and images: the same command resumes or skips the run, other settings train
anew.
"""

import argparse
import functools
import hashlib
import json
import math
import multiprocessing
import os
import signal
import statistics
import sys
import threading
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import redirect_stdout, suppress
from pathlib import Path

import torch
from torch.utils.data import Subset

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for all experiments
import data
import train
from data import UserError

# ------------------------------------------------------------------------------------------------
# The command line.


def make_parser(doc):
    """A parser of the flags that all experiments with runs have."""
    style = argparse.RawDescriptionHelpFormatter
    parser = train.Parser(description=doc, formatter_class=style, allow_abbrev=False)
    add = parser.add_argument
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--seeds", type=train.number(int, 1), default=3, help="number of seeds [%(default)s]")
    add(
        "--jobs",
        type=train.number(int, 0),
        help="processes; 0: none beside this one [one per core, or five on a GPU]",
    )
    add("--device", default=device, choices=["cpu", "cuda"])
    add("--runs", default="runs/experiments", help="folder of runs and results [%(default)s]")
    return parser


def make_image_parser(doc, models=train.MODELS, default_models=("vit_micro", "swin_micro")):
    """The same, and the flags of experiments that train on few images."""
    parser = make_parser(doc)
    add = parser.add_argument
    count = train.number(int, 1)
    count_or_all = train.number(int, 0)
    add("--data", default="shapes", help="as for train.py [%(default)s]")
    add("--models", nargs="+", default=list(default_models), choices=models, help="%(default)s")
    add("--images", type=count_or_all, default=60, help="for training; 0: all [%(default)s]")
    add("--passes", type=count, default=100, help="over the images [%(default)s]")
    add("--batch-size", type=count, default=30, help="[%(default)s]")
    add("--val-images", type=count_or_all, default=0, help="for validation; 0: all [%(default)s]")
    return parser


def describe(args):
    """What was trained, for below a table."""
    return (
        f"{args.seeds} seeds. {args.passes} passes over {args.images or 'all'} training images of "
        f"{args.data} in batches of {args.batch_size}; validation images: "
        f"{args.val_images or 'all'}; torch {torch.__version__}, {args.device}."
    )


def main(function):
    """Run a script. A UserError ends it with status 2 and one line."""
    try:
        train.run_script(function)
    except KeyboardInterrupt:
        print("stopped: the same command continues", file=sys.stderr)
        sys.exit(130)


# ------------------------------------------------------------------------------------------------
# Runs. A run is its settings: those of train.py, and what else an experiment varies.


def make_folder(path):
    """Create a folder, with its parents. Raises UserError."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot create {path}: {error.strerror}") from error
    return Path(path)


def choose(dataset, num_images, *name):
    """The indices of images chosen at random, by a generator of that name; 0 chooses all. Raises
    UserError if there are not as many."""
    if num_images > len(dataset):
        raise UserError(f"{num_images} images were asked for, but there are only {len(dataset)}")
    order = torch.randperm(len(dataset), generator=data.generator("chosen", *name)).tolist()
    return order[: num_images or None]


def choose_images(datasets, settings):
    """The training images that the seed draws, repeated `passes` times, since a run is a single
    epoch; and the validation images, the same for every seed."""
    indices = choose(datasets.train, settings.images, settings.seed) * settings.passes
    val_indices = choose(datasets.val, settings.val_images, "val")
    return datasets._replace(
        train=Subset(datasets.train, indices), val=Subset(datasets.val, val_indices)
    )


def make_run(args, open_datasets, label, **changes):
    """The settings of a run on few images. Raises UserError.

    args: the flags of the experiment. open_datasets(settings): the images, see `choose_images`.
    label: what its folder's name starts with. changes: settings of its own, such as model and seed.
    """
    settings = train.parse_args(["--data", args.data, "--device", args.device])
    vars(settings).update(epochs=1, mix_prob=1.0, workers=0, compile=False)
    for name in ("images", "passes", "val_images", "batch_size"):
        setattr(settings, name, getattr(args, name))
    vars(settings).update(changes)
    datasets = open_datasets(settings)
    image_size = data.median_size(datasets.train)
    train.fill_defaults(settings, image_size, len(datasets.train), datasets.hflip)
    train.check_args(settings, len(datasets.train))
    set_folder(settings, datasets, args.runs, label)
    return settings


def set_folder(settings, datasets, runs, label):
    """Name the folder of a run. The name ends in a digest of the settings and the images."""
    identity = train.run_identity(settings, datasets)
    identity["args"] = {
        name: value for name, value in vars(settings).items() if name not in train.RESUMABLE_ARGS
    }
    digest = hashlib.blake2b(
        json.dumps(identity, sort_keys=True).encode(), digest_size=4
    ).hexdigest()
    name = f"{label}-{settings.seed}-{digest}".replace(" ", "-")
    settings.out = f"{runs}/{Path(settings.data).resolve().name}/{name}"


def result_file(settings):
    return Path(settings.out, "metrics.jsonl")  # written when the run is finished


def read_results(runs, model, names, num_seeds, key="val_top1"):
    """A result of finished runs, {name: a list over seeds}. runs: by (model, name, seed)."""
    results = {}
    for name in names:
        files = [result_file(runs[model, name, seed]) for seed in range(num_seeds)]
        results[name] = [json.loads(file.read_text())[key] for file in files]
    return results


def train_run(settings, datasets, model=None, validate=None, **options):
    """Train the model of a run, or resume it.

    model: by default the one of the settings. validate: as for `train.train`; by default
    `measure_accuracy`. options: for `train.train`.
    """
    if model is None:
        model = train.build_model(settings, len(datasets.classes))
        if settings.finetune:
            train.load_weights(model, settings.finetune, datasets.classes, new_head=True)
    if validate is None:
        validate = functools.partial(measure_accuracy, dataset=datasets.val, settings=settings)
    lock = train.lock_folder(settings.out)
    checkpoint = train.find_checkpoint(settings, datasets)
    train.train(settings, datasets, model, validate, checkpoint, **options)
    lock.close()


def load_model(settings, model):
    """The trained model of a run, in evaluation mode, without gradients. model: an untrained
    one of the same kind."""
    checkpoint = train.load_checkpoint(f"{settings.out}/last.pt")
    model.load_state_dict(checkpoint["model"])
    return model.to(settings.device).eval().requires_grad_(False)


# ------------------------------------------------------------------------------------------------
# Processes.

# Asks a process of the pool to save and end. It is not SIGTERM, which the pool itself may send: a
# second signal of the same kind ends training at once.
STOP_SIGNAL = signal.SIGUSR1


def run_all(function, runs, num_processes=None):
    """Call function(settings) for all runs that are not finished, in their order. What it prints
    goes to their log.txt.

    num_processes: how many processes, with one thread each, take runs side by side; None: one per
        core, or five on a GPU, which small models leave idle; 0: this process does all.
    """
    todo = [settings for settings in runs if not result_file(settings).exists()]
    data.print0(f"{len(todo)} of {len(runs)} runs to do")
    tasks = [(function, run, f"{number}/{len(todo)}") for number, run in enumerate(todo, 1)]
    if num_processes is None:
        on_cuda = any(settings.device == "cuda" for settings in runs)
        num_processes = 5 if on_cuda else train.NUM_CPUS
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
            for future in futures:
                future.cancel()
            for process in multiprocessing.active_children():
                with suppress(ProcessLookupError):
                    os.kill(process.pid, STOP_SIGNAL)
            raise


def do_run(function, settings, progress):
    """Do a run. progress: to be printed, such as "3/24"."""
    folder = make_folder(settings.out)
    try:
        with (folder / "log.txt").open("a") as log, redirect_stdout(log):
            function(settings)
    except SystemExit:  # of training that was asked to stop
        if multiprocessing.parent_process() is None:
            raise KeyboardInterrupt from None
        data.kill_workers()
        os._exit(1)  # a process of the pool would go on with the next run
    data.print0(f"{progress} {folder}")


def begin_process():
    torch.set_num_threads(1)
    multiprocessing.set_start_method(None, force=True)  # data workers start as in train.py
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent():
    """A parent that was killed had no time to end its children: they would train beside those that
    the same command starts."""
    multiprocessing.parent_process().join()
    os.kill(os.getpid(), STOP_SIGNAL)


# ------------------------------------------------------------------------------------------------
# Predictions.


def center_crops(dataset, indices, size):
    """The evaluation crops of some images, (n, 3, size, size) uint8."""
    return torch.stack([data.center_crop(dataset[i][0], size) for i in indices])


def measure_accuracy(model, dataset, settings):
    """Top-1 and the calibration error in percent, a dict."""
    logits, targets = predict(model.eval(), dataset, settings)
    top1 = (logits.argmax(1) == targets).float().mean().item()
    return {
        "val_top1": round(100 * top1, 3),
        "calibration_error": calibration_error(logits, targets),
    }


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
# Intervals and tables.

# The 97.5 % point of Student's t for 1 to 30 degrees of freedom.
STUDENT = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228]
STUDENT += [2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086]
STUDENT += [2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042]


def interval(values):
    """The mean and half of its 95 % interval, nan for a single value. From 32 values on it is a
    little wider than need be."""
    n = len(values)
    mean = statistics.fmean(values)
    if n < 2:
        return mean, math.nan
    t = STUDENT[min(n - 1, 30) - 1]
    return mean, t * statistics.stdev(values) / math.sqrt(n)


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


def write_results(name, text, folder):
    """Print a text in Markdown and write it to folder/NAME.md."""
    path = make_folder(folder) / f"{name}.md"
    train.write_text(path, text)
    print(f"\n{text}\nwritten to {path}", flush=True)
