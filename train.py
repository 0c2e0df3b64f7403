"""Train a vision transformer with token-label alignment.

    python train.py                                        # a small ViT on generated images
    python train.py --data cifar10                         # a torchvision dataset
    python train.py --data /imagenet --model deit_small    # the paper's recipe, on all GPUs
    python train.py --data /imagenet --model deit_small --mix switch --targets area    # baseline
    python train.py --data my_images --model deit_tiny --finetune deit_tiny_patch16_224.pth
    python train.py --eval runs/shapes-vit_micro-cutmix-tl_align-0/best.pt

Under torchrun, on one node or many, the same command joins the group of processes. A run's folder
holds last.pt, best.pt, metrics.jsonl, config.json and a lock, and the same command resumes a
stopped run.
"""

import argparse
import contextlib
import copy
import dataclasses
import fcntl
import functools
import json
import math
import os
import pickle
import re
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import get_ema_multi_avg_fn

import data
import swin
import tl_align
import vit
from data import UserError, print0

MODELS = {
    "vit_micro": vit.vit_micro,
    "deit_tiny": vit.deit_tiny,
    "deit_small": vit.deit_small,
    "deit_base": vit.deit_base,
    "swin_micro": swin.swin_micro,
    "swin_tiny": swin.swin_tiny,
    "swin_small": swin.swin_small,
    "swin_base": swin.swin_base,
}

NUM_CPUS = len(os.sched_getaffinity(0))  # that this process may use

# ------------------------------------------------------------------------------------------------
# Recipes: the settings that are used where the command line gives none. `choose_recipe` starts
# with one of the two long tables and applies the short ones, which say what differs.

# DeiT's recipe, which the paper uses (Touvron et al. 2021, table 9, and main.py of their code),
# for datasets of ImageNet's kind: 100,000 images or more, of more than 64 px.
IMAGENET = {
    "epochs": 300,
    "batch_size": 1024,
    "lr": 5e-4,  # for a batch of 512; scaled with the batch size
    "warmup_epochs": 5,
    "weight_decay": 0.05,
    "clip_grad": 0.0,
    "mix_prob": 1.0,
    "augment": "full",
    "aug_repeats": 3,
}

# DeiT's fine-tuning at a higher resolution (its README); the rate is for a batch of 512.
IMAGENET_FINETUNE = {"epochs": 30, "lr": 5e-6, "weight_decay": 1e-8}

# Smaller datasets, and images of up to 64 px. Measured on parts of CIFAR-10 at 32, 64 and 100 px,
# see experiments/results/defaults.md.
SMALL = {
    "epochs": 100,
    "batch_size": 128,
    "lr": 1e-3,  # not scaled with the batch size
    "warmup_epochs": 5,
    "weight_decay": 0.05,
    "clip_grad": 0.0,
    "mix_prob": 0.5,
    "augment": "light",
    "aug_repeats": 1,
}

SMALL_FINETUNE = {"epochs": 30, "lr": 1e-4, "weight_decay": 1e-8}

# Swin's own settings (Liu et al. 2021, appendix A2.1).
SWIN = {"warmup_epochs": 20, "clip_grad": 5.0, "aug_repeats": 1}

# Narrow models learn small datasets faster with a higher rate, also in fine-tuning.
SMALL_MICRO = {"lr": 3e-3}

# The generated images, learned in a minute.
SHAPES = {"epochs": 2, "batch_size": 64, "mix_prob": 1.0}

# The rate of stochastic depth, as DeiT and Swin set it.
DROP_PATH = {
    "vit_micro": 0.0,
    "deit_tiny": 0.1,
    "deit_small": 0.1,
    "deit_base": 0.1,
    "swin_micro": 0.0,
    "swin_tiny": 0.2,
    "swin_small": 0.3,
    "swin_base": 0.5,
}


def choose_recipe(args, is_imagenet):
    """The tables above that apply, merged."""
    recipe = dict(IMAGENET if is_imagenet else SMALL)
    if args.finetune:
        recipe.update(IMAGENET_FINETUNE if is_imagenet else SMALL_FINETUNE)
    if args.model.startswith("swin"):
        recipe.update(SWIN)
    if args.model.endswith("micro") and not is_imagenet:
        recipe.update(SMALL_MICRO)
    if args.data == "shapes":
        recipe.update(SHAPES)
    return recipe


def fill_defaults(args, image_size, num_images, hflip=True):
    """Fill in the settings that were not given.

    image_size: the shorter side of the training images, in pixels. num_images: of the training set.
    hflip: whether a mirrored image still shows its class. Returns args.
    """
    cuda = args.device == "cuda"
    set_default(args, "img_size", default_img_size(image_size))
    set_default(args, "patch_size", default_patch_size(args))
    is_large = args.img_size > data.SMALL_SIZE
    is_imagenet = is_large and num_images >= 100_000
    recipe = choose_recipe(args, is_imagenet)
    if not is_imagenet:  # at least 20 steps per epoch, and a pair of images for every process
        batch_size = min(recipe["batch_size"], num_images // 20 // 2 * 2)
        recipe["batch_size"] = max(batch_size, 2 * get_world_size())
    set_default(args, "batch_size", recipe["batch_size"])
    set_default(args, "epochs", recipe["epochs"])
    if is_imagenet:
        recipe["lr"] *= args.batch_size / 512
    recipe["warmup_epochs"] = min(recipe["warmup_epochs"], args.epochs / 10)
    for name, value in recipe.items():
        set_default(args, name, value)
    set_default(args, "drop_path", DROP_PATH[args.model])
    set_default(args, "hflip", hflip)
    micro_batch = 256 if cuda else 32  # DeiT-S then takes 8 GiB of a GPU, Swin-B 32
    set_default(args, "micro_batch", micro_batch if is_large else 0)
    set_default(args, "workers", min(NUM_CPUS // int(os.environ.get("LOCAL_WORLD_SIZE", 1)), 16))
    # A GPU that emulates bf16 is faster without it.
    set_default(args, "bf16", cuda and torch.cuda.is_bf16_supported(including_emulation=False))
    # Runs on small images may be over before the model is compiled.
    set_default(args, "compile", cuda and is_large)
    set_default(args, "log_interval", 10 if is_large and not cuda else 50)
    name = f"{Path(args.data).resolve().name}-{args.model}-{args.mix}-{args.targets}-{args.seed}"
    set_default(args, "out", f"runs/{name}")
    return args


def set_default(args, name, value):
    if getattr(args, name) is None:
        setattr(args, name, value)


def default_img_size(image_size):
    """At most 224 px, rounded down to a multiple of 32, or of 4 for the smallest images."""
    image_size = min(image_size, 224)
    step = 32 if image_size >= 32 else 4
    return max(4, image_size // step * step)


def default_patch_size(args):
    """About 64 to 200 tokens for a ViT. A Swin starts with smaller patches, as it merges them."""
    if args.img_size <= 32:
        vit_patch_size = 4
    elif args.img_size <= 96:
        vit_patch_size = 8
    else:
        vit_patch_size = 16
    return min(vit_patch_size // 2, 4) if args.model.startswith("swin") else vit_patch_size


# ------------------------------------------------------------------------------------------------
# The command line.


def number(kind, low, high=1e12):
    """The type of a flag: an int or a float between low and high."""

    def parse(text):
        value = kind(text)
        if not low <= value <= high:  # true for nan
            raise ValueError
        return value

    parse.__name__ = f"{kind.__name__} from {low} to {high:g}"  # which argparse shows
    return parse


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message}; --help lists all flags")


def make_parser():
    parser = Parser(
        description=__doc__.split("\n")[0],
        epilog="A setting without a default here follows the recipe for the data and the model.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    switch = argparse.BooleanOptionalAction
    device = "cuda" if torch.cuda.is_available() else "cpu"
    mixes = ["cutmix", "mixup", "switch", "none"]
    add("--data", default="shapes", help="shapes, a torchvision dataset, or a folder [shapes]")
    add("--root", default="data", help="folder of torchvision's datasets [data]")
    add("--model", default="vit_micro", choices=MODELS)
    add("--mix", default="cutmix", choices=mixes, help="switch: half by Mixup, half by CutMix")
    add("--mix-prob", type=number(float, 0, 1), help="share of the images that are mixed")
    add("--targets", default="tl_align", choices=["tl_align", "area"], help="[tl_align]")
    add("--img-size", type=number(int, 1), help="in pixels")
    add("--patch-size", type=number(int, 1), help="in pixels")
    add("--epochs", type=number(int, 1))
    add("--batch-size", type=number(int, 1), help="of all processes together")
    add("--micro-batch", type=number(int, 0), help="images at a time per process, at most; 0: all")
    add("--lr", type=number(float, 1e-12), help="peak learning rate")
    add("--warmup-epochs", type=number(float, 0))
    add("--weight-decay", type=number(float, 0))
    add("--clip-grad", type=number(float, 0), help="maximum gradient norm; 0: no clipping")
    add("--ema-decay", type=number(float, 0, 1), default=0.0, help="average the weights; 0: off")
    add("--smoothing", type=number(float, 0, 1), default=0.1, help="label smoothing [0.1]")
    add("--drop-path", type=number(float, 0, 1), help="rate of stochastic depth in the last block")
    add("--augment", choices=["light", "full"], help="full: with RandAugment and random erasing")
    add("--hflip", action=switch, help="mirror half of the images")
    add("--aug-repeats", type=number(int, 1), help="crops of an image per epoch")
    add("--seed", type=number(int, 0), default=0, help="of all random numbers [0]")
    add("--workers", type=number(int, 0), help="processes that decode images")
    add("--device", default=device, choices=["cpu", "cuda"], help="cuda: all GPUs that it sees")
    add("--bf16", action=switch, help="autocast to bfloat16")
    add("--compile", action=switch, help="use torch.compile")
    add("--save-minutes", type=number(float, 0), default=15.0, help="between checkpoints [15]")
    add("--log-interval", type=number(int, 1), help="steps between two log lines")
    add("--out", help="folder of the run")
    add("--resume", action=switch, help="continue with other settings; --no-resume: start over")
    add("--finetune", metavar="FILE", help="checkpoint to start from")
    add("--eval", metavar="FILE", help="checkpoint to evaluate, with its own settings as defaults")
    return parser


def parse_args(argv=None):
    """The command line as a namespace. Settings that it does not give are None until
    `fill_defaults`. Raises UserError."""
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.eval:
        saved = load_checkpoint(args.eval).get("args")
        if isinstance(saved, dict):  # a checkpoint of this script
            names = ["data", "root", "model", "img_size", "patch_size"]
            parser.set_defaults(**{name: saved[name] for name in names if name in saved})
            args = parser.parse_args(argv)
        if args.model not in MODELS:
            raise UserError(f"{args.eval} is of an unknown model, {args.model!r}")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: no GPU is available; --device cpu works everywhere")
    return args


def check_args(args, num_images):
    """Raises UserError for settings that contradict each other. num_images: of the training set."""
    for flag, value in (("--batch-size", args.batch_size), ("--micro-batch", args.micro_batch)):
        if value % 2:
            raise UserError(f"{flag} must be even, because images are mixed in pairs; got {value}")
    smallest = 2 * get_world_size()
    if not smallest <= args.batch_size <= num_images:
        raise UserError(
            f"--batch-size must be between {smallest} (two per process) and {num_images} (the "
            f"training images), got {args.batch_size}"
        )
    if args.drop_path == 1:
        raise UserError("--drop-path must be less than 1")


# ------------------------------------------------------------------------------------------------
# Processes. Each drives one device, and all of them together train on every batch.


def get_rank():
    return dist.get_rank() if dist.is_initialized() else 0


def get_world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def init_distributed(args, argv):
    """Join the process group under torchrun. Without it, if there are several GPUs, start
    torchrun with one process for each of them."""
    if "RANK" in os.environ:
        if args.device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        backend = "cpu:gloo,cuda:nccl" if args.device == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(hours=1))  # to download a dataset
    elif args.device == "cuda" and torch.cuda.device_count() > 1:
        num_gpus = torch.cuda.device_count()
        for name in ("OMP_NUM_THREADS", "TORCHINDUCTOR_COMPILE_THREADS"):
            os.environ.setdefault(name, str(max(1, NUM_CPUS // num_gpus)))
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_gpus}"]
        os.execv(sys.executable, [sys.executable, *torchrun, __file__, *argv])


@contextlib.contextmanager
def first_process_first():
    """The first process of a node runs the block before the others: it may have to download a
    dataset, and it reports the user's errors once for all."""
    is_first = int(os.environ.get("LOCAL_RANK", 0)) == 0
    if dist.is_initialized() and not is_first:
        dist.barrier()
    yield
    if dist.is_initialized() and is_first:
        dist.barrier()


def any_process(flag):
    """Whether the flag is true on any process. Runs on the CPU: the device is not waited for."""
    if get_world_size() == 1:
        return flag
    count = torch.tensor(int(flag))
    dist.all_reduce(count)
    return count.item() > 0


class StopRequest:
    """Notes a signal that asks the run to stop. It then saves a checkpoint and ends. A second
    signal of the same kind ends the process at once.

        with StopRequest() as stop:
            ... if stop.signal: ...
    """

    def __init__(self):
        self.signal = 0
        self.signals = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # which nohup sets
            self.signals.append(signal.SIGHUP)

    def __enter__(self):
        self.previous = [signal.signal(number, self.handle) for number in self.signals]
        return self

    def handle(self, number, frame):
        self.signal = number
        signal.signal(number, signal.SIG_DFL)

    def __exit__(self, *exception):
        for number, handler in zip(self.signals, self.previous, strict=True):
            signal.signal(number, handler)


# ------------------------------------------------------------------------------------------------
# Checkpoints.

FORMAT = "tl-align-1"  # marks the checkpoints of this script

# What a checkpoint may hold besides tensors: DeiT's settings, and numpy's numbers, which a function
# creates that has one name in files written by numpy 1 and another one in newer files.
numpy_scalar, _ = np.float64(0).__reduce__()
SAFE_GLOBALS = [argparse.Namespace, np.dtype]
SAFE_GLOBALS += [(numpy_scalar, "numpy.core.multiarray.scalar")]
SAFE_GLOBALS += [(numpy_scalar, "numpy._core.multiarray.scalar")]
SAFE_GLOBALS += [type(np.dtype(name)) for name in ("f2", "f4", "f8", "i4", "i8", "bool")]


def load_checkpoint(path):
    """A checkpoint of this script, DeiT, timm or Microsoft as a dict whose "model" is the state
    dict with the official names. No code in the file is executed. Raises UserError."""
    try:
        if str(path).endswith(".safetensors"):
            from safetensors.torch import load_file

            checkpoint = load_file(path)
        else:
            with torch.serialization.safe_globals(SAFE_GLOBALS):
                checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except ImportError as error:
        raise UserError(f"{path} needs another package: pip install safetensors") from error
    except pickle.UnpicklingError as error:
        raise UserError(f"{path} was refused by torch.load(weights_only=True): {error}") from error
    except Exception as error:  # a damaged file can raise anything
        raise UserError(f"{path} cannot be loaded: {type(error).__name__}: {error}") from error
    if not isinstance(checkpoint, dict):
        raise UserError(f"{path} is no checkpoint: it holds a {type(checkpoint).__name__}")
    state = checkpoint  # as in timm's files
    for key in ("model", "state_dict", "model_ema", "teacher"):
        if key in checkpoint:
            state = checkpoint[key]
            break
    is_state_dict = isinstance(state, dict) and all(
        isinstance(name, str) and torch.is_tensor(tensor) for name, tensor in state.items()
    )
    if not is_state_dict:
        raise UserError(f"{path} holds no model: expected a state dict, or one under 'model'")
    # Prefixes of DistributedDataParallel, torch.compile and DINO.
    prefix = re.compile(r"^(module\.|_orig_mod\.|backbone\.)+")
    state = {prefix.sub("", name): tensor for name, tensor in state.items()}
    return {**checkpoint, "model": state}


def load_weights(model, path, classes, new_head=False):
    """Load a checkpoint, its averaged weights if there are any, into a model.

    classes: the names of the model's classes. new_head: keep the model's own head if the
    checkpoint has one for other classes, or none, and ignore layers that the model lacks, such as
    a decoder. Raises UserError if anything else differs.
    """
    checkpoint = load_checkpoint(path)
    is_ours = checkpoint.get("format") == FORMAT
    state = checkpoint["ema"] if is_ours and checkpoint["ema"] else checkpoint["model"]
    state = model.convert_state_dict(state)
    own_state = model.state_dict()
    head = state.get("head.weight")
    same_classes = checkpoint.get("classes", classes) == classes  # foreign files name no classes
    head_fits = head is not None and len(head) == len(classes) and same_classes
    if new_head and not head_fits:
        print0(f"{path} has no head for these {len(classes)} classes: a new one is trained")
        state = {name: tensor for name, tensor in state.items() if not name.startswith("head.")}
        state["head.weight"] = own_state["head.weight"]
        state["head.bias"] = own_state["head.bias"]
    elif head is not None and not head_fits:
        raise UserError(f"{path} was trained on other classes, or on classes in another order")
    layers = {name.split(".")[0] for name in own_state}
    unused = sorted({name.split(".")[0] for name in state} - layers)
    if new_head and unused:
        print0(f"{path}: ignored, as the model has no such layers: {', '.join(unused)}")
        state = {name: tensor for name, tensor in state.items() if name.split(".")[0] in layers}
    for name in sorted(own_state.keys() | state.keys()):
        here = tuple(own_state[name].shape) if name in own_state else "missing"
        there = tuple(state[name].shape) if name in state else "missing"
        if here != there:
            raise UserError(f"{path} is of another model: {name} is {there}, here it is {here}")
    model.load_state_dict(state)


# Settings that may differ when a run is resumed.
RESUMABLE_ARGS = ["data", "root", "out", "resume", "eval"]  # where things are
RESUMABLE_ARGS += ["device", "workers", "micro_batch", "compile"]  # how the same is computed
RESUMABLE_ARGS += ["log_interval", "save_minutes"]
# Settings that must not differ. All others may with an explicit --resume.
FIXED_ARGS = ["model", "img_size", "patch_size"]


def run_identity(args, datasets):
    """The part of a checkpoint that tells which run it belongs to."""
    return {
        "args": vars(args),
        "classes": datasets.classes,
        "num_images": [len(datasets.train), len(datasets.val)],
        "digest": datasets.digest,
    }


def lock_folder(out):
    """Create a run's folder and lock it, until the returned file is closed or the process ends.
    Raises UserError if it cannot be written, or if another run has locked it."""
    try:
        Path(out).mkdir(parents=True, exist_ok=True)
        lock = open(Path(out, "lock"), "w")
    except OSError as error:
        raise UserError(f"--out {out} cannot be written: {error}") from error
    if get_rank() == 0:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"another run is using --out {out}: choose another folder") from error
        except OSError:
            pass  # a file system without locks
    return lock


def find_checkpoint(args, datasets):
    """The last checkpoint in --out, or None. Raises UserError if it is of another run."""
    is_restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"  # by torchrun
    if args.resume is False and not is_restarted:
        return None
    path = Path(args.out, "last.pt")
    best = path.with_name("best.pt")
    if not path.exists():
        if best.exists():
            raise UserError(f"{args.out} has a best.pt but no last.pt; give another --out")
        if args.resume:
            print0(f"{args.out} has no last.pt to resume from: this is a new run")
        return None
    try:
        checkpoint = load_checkpoint(path)
    except UserError as error:
        advice = "there is no best.pt"
        if best.exists():
            advice = f"copy {best} to it to resume from there"
        raise UserError(f"{error}; {advice}; --no-resume starts over") from error
    if checkpoint.get("format") != FORMAT:
        raise UserError(f"{path} was not written by this version of train.py; give another --out")
    check_same_run(args, datasets, checkpoint)
    return checkpoint


def check_same_run(args, datasets, checkpoint):
    """Raises UserError if the checkpoint is of another model or other images, or of other settings
    and there is no --resume on the command line."""
    identity = run_identity(args, datasets)
    refused, changed = [], []
    if checkpoint["classes"] != identity["classes"]:
        refused.append("other classes")
    digest = checkpoint.get("digest", identity["digest"])  # older checkpoints have none
    if checkpoint["num_images"] != identity["num_images"] or digest != identity["digest"]:
        refused.append("other images")
    for name, value in identity["args"].items():
        saved = checkpoint["args"].get(name)
        if name in RESUMABLE_ARGS or saved == value:
            continue
        change = f"--{name.replace('_', '-')} {saved} (now {value})"
        if name in FIXED_ARGS:
            refused.append(change)
        else:
            changed.append(change)
    if refused:
        raise UserError(
            f"{args.out} holds another run: {', '.join(refused)}; give another --out, or "
            "--no-resume to replace it"
        )
    if changed and not args.resume:
        raise UserError(
            f"{args.out} holds a run with other settings: {', '.join(changed)}; give --resume to "
            "continue with the new ones, another --out, or --no-resume to replace it"
        )
    if changed:
        print0(f"{args.out} is continued with other settings: {', '.join(changed)}")


def write_text(path, text):
    """Write a file so that it is never seen half written."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


# ------------------------------------------------------------------------------------------------
# Training.


def build_model(args, num_classes):
    """The model, with initial weights that depend on --seed only. Raises UserError."""
    options = {"img_size": args.img_size, "patch_size": args.patch_size}
    options["drop_path_rate"] = args.drop_path
    if args.model.startswith("swin"):
        options["window_size"] = swin_window_size(args.img_size, args.patch_size)
    torch.manual_seed(args.seed)
    try:
        return MODELS[args.model](num_classes=num_classes, **options)
    except ValueError as error:
        raise UserError(f"--img-size does not fit {args.model}: {error}") from error


def swin_window_size(img_size, patch_size):
    """7 at 224 px and 12 at 384 px, as in Microsoft's models: the last stage is one window. 4 for
    small images, and 7 where the last stage would be smaller or is not a whole number of tokens."""
    if img_size <= data.SMALL_SIZE:
        return 4
    if img_size % (8 * patch_size):
        return 7
    return max(7, img_size // (8 * patch_size))


def lr_at(step, args, steps_per_epoch):
    """The learning rate: linear warm-up from 1e-6, then half a cosine down to 1e-5 (DeiT)."""
    warmup_steps = args.warmup_epochs * steps_per_epoch
    total_steps = args.epochs * steps_per_epoch
    start = min(1e-6, args.lr)
    final = min(1e-5, args.lr)
    if step < warmup_steps:
        return start + (args.lr - start) * step / warmup_steps
    done = (step - warmup_steps) / (total_steps - warmup_steps)
    return final + (args.lr - final) * (1 + math.cos(math.pi * done)) / 2


def make_optimizer(model, args):
    """AdamW. Biases, norms, the class token, position embeddings and bias tables do not decay."""
    decay, no_decay = [], []
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2 or name.endswith(("cls_token", "pos_embed", "bias_table")):
            no_decay.append(parameter)
        else:
            decay.append(parameter)
    groups = [{"params": decay}, {"params": no_decay, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=args.lr, weight_decay=args.weight_decay, fused=True)


MIXUP_ALPHA = 0.8  # lambda ~ Beta(0.8, 0.8), as in DeiT; for CutMix it is Beta(1, 1), uniform


def draw_mixing(args, rand, step, share):
    """How the images of a step are mixed.

    rand: (b, 3), uniform: lambda, and the row and column of the centre of a CutMix box.
    share: the slice of the batch that this process trains on, b images.
    Returns the same (b, 3), with Mixup's lambda where Mixup is used and lambda = 1 for an image
    that is not mixed; and whether Mixup is used, (b,).
    """
    choice = data.uniform((args.batch_size, 2), args.seed, "mix", step)[share]
    mixup_lam = data.beta(MIXUP_ALPHA, args.batch_size, args.seed, "mixup", step)[share]
    mixup_prob = {"cutmix": 0.0, "switch": 0.5, "mixup": 1.0}[args.mix]
    is_mixup = choice[:, 0] < mixup_prob
    lam = torch.where(is_mixup, mixup_lam, rand[:, 0])
    lam[choice[:, 1] >= args.mix_prob] = 1.0
    return torch.column_stack([lam, rand[:, 1:]]), is_mixup


def make_mask(rand, is_mixup, size, patch_size):
    """The mask (b, 1, H, W) of each image's partner. rand, is_mixup: from `draw_mixing`."""
    cutmix_mask = tl_align.cutmix_mask(rand, size, patch_size)
    mixup_mask = tl_align.mixup_mask(rand, size)
    return torch.where(is_mixup[:, None, None, None], mixup_mask, cutmix_mask)


def mixed_loss(model, images, targets, mask, rand, args):
    """The loss of a batch.

    images: (b, 3, H, W), normalized. targets: (b,). mask: (b, 1, H, W), or None without mixing.
    rand: (b, depth, 2), for drop path. Returns the mean over the batch, a scalar.
    """
    if mask is None:
        logits = model(images, rand=rand)
        return F.cross_entropy(logits.float(), targets, label_smoothing=args.smoothing)
    mixed = tl_align.mix(images, mask)
    if args.targets == "area":
        logits = model(mixed, rand=rand)
        share = mask.mean((2, 3))
    else:
        labels = tl_align.token_labels(mask, args.patch_size)
        logits, share = model(mixed, labels, rand=rand)
    return tl_align.mixed_cross_entropy(logits.float(), targets, share, args.smoothing)


@dataclasses.dataclass
class Progress:
    """How far a run is; saved with its checkpoints."""

    step: int = 0  # optimizer steps so far
    best_top1: float = -1.0  # the largest first result of `validate` so far
    history: list = dataclasses.field(default_factory=list)  # an entry per epoch, see `end_epoch`
    epoch_loss: float = 0.0  # sums over the steps of the epoch so far
    epoch_seconds: float = 0.0
    epoch_waited: float = 0.0  # seconds waiting for data


NOT_FINITE_ADVICE = "try --resume with a lower --lr, or with --clip-grad 1"


class Trainer:
    """A model, its optimizer, and the step that trains it.

    raw_model has the official parameter names, which DDP and compile prefix; model is what a step
    calls; ema_model has the averaged weights, or is None. loss: a function like `mixed_loss`.
    """

    def __init__(self, args, model, loss=mixed_loss):
        self.args = args
        self.loss = loss
        self.raw_model = model.to(args.device)
        self.ddp_model = self.raw_model
        if get_world_size() > 1:
            self.ddp_model = DistributedDataParallel(self.raw_model, gradient_as_bucket_view=True)
        self.model = torch.compile(self.ddp_model) if args.compile else self.ddp_model
        self.optimizer = make_optimizer(self.raw_model, args)
        self.ema_model = None
        if args.ema_decay:
            self.ema_model = copy.deepcopy(self.raw_model).requires_grad_(False)
        self.eval_model = self.raw_model if self.ema_model is None else self.ema_model
        self.share = data.process_share(args.batch_size, get_rank(), get_world_size())

    def train_step(self, images, targets, step, lr):
        """One optimizer step on this process's share of a batch, uint8 (b, 3, S, S) and (b,).
        Returns the mean loss of the whole batch, on the device, which is not waited for."""
        args = self.args
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        # A row per sample: 16 numbers for augmentation, 3 for CutMix, 2 per block for drop path.
        depth = self.raw_model.depth
        rand = data.uniform((args.batch_size, 19 + 2 * depth), args.seed, "step", step)[self.share]
        augment_rand, mix_rand, drop_path_rand = rand.split([16, 3, 2 * depth], dim=1)
        drop_path_rand = data.to_device(drop_path_rand.unflatten(1, (depth, 2)), args.device)
        if args.mix != "none":
            mix_rand, is_mixup = draw_mixing(args, mix_rand, step, self.share)
            mix_rand = data.to_device(mix_rand, args.device)
            is_mixup = data.to_device(is_mixup, args.device)

        images = data.augment(images, augment_rand, args.hflip, full=args.augment == "full")
        total_loss = torch.zeros((), device=args.device)
        num_parts = math.ceil(len(images) / (args.micro_batch or len(images)))
        for i in range(num_parts):  # of equal size, if possible: compiled code is for one size
            part = data.process_share(len(images), i, num_parts)
            batch = images[part]
            mask = None
            if args.mix != "none":
                size = batch.shape[-2:]
                mask = make_mask(mix_rand[part], is_mixup[part], size, args.patch_size)
            # The processes average their gradients after the last part only.
            self.ddp_model.require_backward_grad_sync = i == num_parts - 1
            with torch.autocast(batch.device.type, torch.bfloat16, enabled=args.bf16):
                loss = self.loss(self.model, batch, targets[part], mask, drop_path_rand[part], args)
            loss = loss * len(batch) / args.batch_size  # its part of the mean over the batch
            (loss * get_world_size()).backward()  # DDP divides the gradients by the world size
            total_loss += loss.detach()
        if get_world_size() > 1:
            dist.all_reduce(total_loss)

        if args.clip_grad:
            torch.nn.utils.clip_grad_norm_(self.raw_model.parameters(), args.clip_grad)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.update_ema(step)
        return total_loss

    def update_ema(self, step):
        if self.ema_model is not None:
            decay = min(self.args.ema_decay, (1 + step) / (10 + step))  # shorter at first
            update = get_ema_multi_avg_fn(decay)
            update(list(self.ema_model.parameters()), list(self.raw_model.parameters()), None)

    def save(self, path, progress, identity):
        """Write a checkpoint on the first process. identity: see `run_identity`. A kill while it
        is written leaves the old one whole. Raises UserError if a weight is not finite."""
        if get_rank() != 0:
            return
        if not all(parameter.isfinite().all() for parameter in self.raw_model.parameters()):
            raise UserError(
                f"the weights are not finite after step {progress.step}: {NOT_FINITE_ADVICE}"
            )
        checkpoint = {
            "format": FORMAT,
            "model": self.raw_model.state_dict(),
            "ema": None if self.ema_model is None else self.ema_model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "progress": dataclasses.asdict(progress),
            **identity,
        }
        temporary = path.with_name(path.name + ".tmp")
        torch.save(checkpoint, temporary)
        os.replace(temporary, path)

    def load(self, checkpoint):
        """Continue from a checkpoint of this script. Returns its progress. With another batch size
        the epoch starts again. Without averaged weights in the checkpoint, averaging starts here.
        """
        self.raw_model.load_state_dict(checkpoint["model"])
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        # load_state_dict has restored the former one
        self.optimizer.param_groups[0]["weight_decay"] = self.args.weight_decay
        if self.ema_model is not None:
            self.ema_model.load_state_dict(checkpoint["ema"] or checkpoint["model"])
        progress = Progress(**checkpoint["progress"])
        if checkpoint["args"]["batch_size"] != self.args.batch_size:
            steps_per_epoch = checkpoint["num_images"][0] // self.args.batch_size
            step = len(progress.history) * steps_per_epoch
            progress = Progress(step, progress.best_top1, progress.history)
        return progress


def train_one_epoch(trainer, loader, progress, stop, save):
    """The rest of an epoch. Logs every --log-interval steps and calls save() every --save-minutes.
    Returns after the current step if any process was asked to stop."""
    args = trainer.args
    steps_per_epoch = len(loader)
    epoch = len(progress.history)
    end = (epoch + 1) * steps_per_epoch
    loader.set_epoch(epoch, first_step=progress.step - epoch * steps_per_epoch)
    trainer.raw_model.train()
    batches = iter(loader)
    losses, waited = [], 0.0  # since the last log line
    log_time = save_time = time.perf_counter()
    while progress.step < end:
        wait_start = time.perf_counter()
        images, targets = next(batches)
        waited += time.perf_counter() - wait_start
        lr = lr_at(progress.step, args, steps_per_epoch)
        losses.append(trainer.train_step(images, targets, progress.step, lr))
        progress.step += 1

        stopping = any_process(stop.signal != 0)
        if progress.step % args.log_interval and progress.step < end and not stopping:
            continue
        losses = torch.stack(losses).tolist()  # waits for the device; no other line of a step does
        now = time.perf_counter()
        check_losses(losses, progress.step)
        for loss in losses:  # one by one, so that the sum does not depend on the log interval
            progress.epoch_loss += loss
        progress.epoch_seconds += now - log_time
        progress.epoch_waited += waited
        if stopping:
            return
        if now - save_time > 60 * args.save_minutes:
            save()
            save_time = time.perf_counter()
        print0(log_line(progress.step, losses, now - log_time, waited, args, steps_per_epoch))
        losses, waited, log_time = [], 0.0, now


def log_line(step, losses, seconds, waited, args, steps_per_epoch):
    """losses: of the steps since the last line. seconds: their duration. waited: how much
    of it was spent waiting for data."""
    epoch = (step - 1) // steps_per_epoch + 1
    total_steps = args.epochs * steps_per_epoch
    steps_per_s = len(losses) / seconds
    return (
        f"epoch {epoch}/{args.epochs}  step {step}/{total_steps}"
        f"  loss {sum(losses) / len(losses):.4f}  lr {lr_at(step - 1, args, steps_per_epoch):.2e}"
        f"  {steps_per_s * args.batch_size:.0f} images/s  data {waited / seconds:.0%}"
        f"  left {timedelta(seconds=int((total_steps - step) / steps_per_s))}"
    )


def check_losses(losses, step):
    """Raises UserError for a loss that is not finite. step: after the last of the losses."""
    for i, loss in enumerate(losses, start=step - len(losses)):
        if not math.isfinite(loss):
            raise UserError(f"the loss is {loss} at step {i}: {NOT_FINITE_ADVICE}")


@torch.no_grad()
def evaluate(model, loader, args):
    """Top-1 and top-5 accuracy in percent, a dict. loader: this process's images, from
    `data.make_val_loader`."""
    model.eval()
    counts = torch.zeros(3, device=args.device)  # correct, correct among the first five, images
    for images, targets in data.batches_on_device(loader, args.device):
        with torch.autocast(images.device.type, torch.bfloat16, enabled=args.bf16):
            logits = model(data.normalize(images))
        top5 = logits.topk(min(5, logits.shape[1])).indices
        correct = top5 == targets[:, None]  # (b, 5)
        counts[0] += correct[:, 0].sum()
        counts[1] += correct.sum()
        counts[2] += len(targets)
    if get_world_size() > 1:
        dist.all_reduce(counts)
    top1, top5, total = counts.tolist()
    return {
        "val_top1": round(100 * top1 / total, 3),
        "val_top5": round(100 * top5 / total, 3),
    }


def train(
    args,
    datasets,
    model,
    validate,
    checkpoint=None,
    loss=mixed_loss,
    make_loader=data.make_train_loader,
):
    """Train a model, from the start or from a checkpoint of `find_checkpoint`, and write its run
    to the folder --out. Returns its progress.

    validate(model): a dict of results after an epoch, for metrics.jsonl; best.pt is of the epoch
    whose first result is the largest. loss: like `mixed_loss`. make_loader: like
    `data.make_train_loader`.
    """
    out = Path(args.out)
    identity = run_identity(args, datasets)
    trainer = Trainer(args, model, loss)
    progress = Progress()
    if checkpoint is not None:
        progress = trainer.load(checkpoint)
        print0(f"{out}: resuming after step {progress.step}")
    check_same_step(progress.step, out)
    if len(progress.history) >= args.epochs:
        print0(f"{out} is finished")
        return progress
    prepare_folder(out, args, is_new=checkpoint is None)
    loader = make_loader(datasets.train, args, trainer.share)
    num_parameters = sum(p.numel() for p in model.parameters())
    print0(
        f"{len(datasets.train)} training images, {len(datasets.val)} validation images, "
        f"{len(datasets.classes)} classes; {num_parameters / 1e6:.1f} M parameters; "
        f"{len(loader)} steps per epoch on {get_world_size()} process(es)"
    )

    def save_last():
        trainer.save(out / "last.pt", progress, identity)

    def end_if_stopped():
        if any_process(stop.signal != 0):
            is_finished = len(progress.history) >= args.epochs
            advice = "the run is finished" if is_finished else "the same command resumes the run"
            print0(f"stopped after step {progress.step}: {advice}")
            sys.exit(128 + (stop.signal or signal.SIGTERM))

    with StopRequest() as stop:
        while len(progress.history) < args.epochs:
            train_one_epoch(trainer, loader, progress, stop, save_last)
            save_last()  # also before the validation, which takes minutes on a large dataset
            end_if_stopped()
            is_best = end_epoch(progress, validate(trainer.eval_model), len(loader), args)
            if get_rank() == 0:  # before last.pt, which says that the epoch is done
                lines = [json.dumps(entry) + "\n" for entry in progress.history]
                write_text(out / "metrics.jsonl", "".join(lines))
            if is_best:
                trainer.save(out / "best.pt", progress, identity)
            save_last()
            end_if_stopped()
    return progress


def end_epoch(progress, results, steps_per_epoch, args):
    """Add the line of an epoch in metrics.jsonl to the history. results: what `validate` returned.
    Returns whether the first of them is the best so far."""
    entry = {
        "epoch": len(progress.history) + 1,
        "step": progress.step,
        "train_loss": round(progress.epoch_loss / steps_per_epoch, 5),
        **results,
        "lr": lr_at(progress.step - 1, args, steps_per_epoch),
        "images_per_s": round(steps_per_epoch * args.batch_size / progress.epoch_seconds, 1),
        "data_wait": round(progress.epoch_waited / progress.epoch_seconds, 4),  # share of the time
    }
    shown = "  ".join(f"{name} {value:.2f}" for name, value in results.items())
    print0(f"epoch {entry['epoch']}/{args.epochs}  {shown}")
    progress.history.append(entry)
    progress.epoch_loss = progress.epoch_seconds = progress.epoch_waited = 0.0
    score = next(iter(results.values()))
    is_best = score > progress.best_top1
    progress.best_top1 = max(progress.best_top1, score)
    return is_best


def check_same_step(step, out):
    """Raises UserError if the processes do not all resume from the same step."""
    if get_world_size() > 1:
        steps = [None] * get_world_size()
        dist.all_gather_object(steps, step)
        if len(set(steps)) > 1:
            raise UserError(f"--out {out} must be a folder that all nodes share")


def prepare_folder(out, args, is_new):
    """Write config.json. A new run removes the files of an older one."""
    if get_rank() != 0:
        return
    if is_new:
        for name in ("last.pt", "best.pt", "metrics.jsonl"):
            (out / name).unlink(missing_ok=True)
    write_text(out / "config.json", json.dumps(vars(args), indent=2))


def main(argv=None):
    argv = sys.argv[1:] if argv is None else [str(word) for word in argv]
    run_script(run, argv)


def run_script(function, *args):
    """Call a function. A UserError ends the process with status 2 and one line."""
    try:
        function(*args)
    except UserError as error:
        message = str(error).split("UserError: ")[-1]  # from a worker, it follows a traceback
        if os.environ.get("RANK", "0") != "0":
            time.sleep(10)  # torchrun ends this process if the first one has the same error
        print("error:", " ".join(message.split()), file=sys.stderr)
        sys.exit(2)
    if dist.is_initialized():
        dist.destroy_process_group()


def run(argv):
    """Train or evaluate, as the command line says. Raises UserError."""
    args = parse_args(argv)
    init_distributed(args, argv)
    with first_process_first():
        datasets = data.open_datasets(args.data, args.root, args.seed)
        if not args.eval and len(datasets.train) == 0:
            raise UserError(f"{args.data} has no train/, only images to evaluate on")
        image_size = data.median_size(datasets.val if args.eval else datasets.train)
        fill_defaults(args, image_size, len(datasets.train), datasets.hflip)
        if not args.eval:
            check_args(args, len(datasets.train))
        model = build_model(args, len(datasets.classes))
        checkpoint = None
        if args.eval:
            load_weights(model, args.eval, datasets.classes)
        else:
            lock = lock_folder(args.out)  # until the run ends
            checkpoint = find_checkpoint(args, datasets)
            if args.finetune and checkpoint is None:
                load_weights(model, args.finetune, datasets.classes, new_head=True)
    val_loader = data.make_val_loader(datasets.val, args, get_rank(), get_world_size())
    validate = functools.partial(evaluate, loader=val_loader, args=args)
    if args.eval:
        top1, top5 = validate(model.to(args.device)).values()
        print0(f"{args.eval}: top-1 {top1:.2f} %, top-5 {top5:.2f} % of {len(datasets.val)} images")
    else:
        settings = {name: value for name, value in vars(args).items() if value is not None}
        print0("  ".join(f"{name} {value}" for name, value in settings.items()))
        progress = train(args, datasets, model, validate, checkpoint)
        top1, best = progress.history[-1]["val_top1"], progress.best_top1
        print0(f"finished: top-1 {top1:.2f} %, best {best:.2f} %; see {args.out}")
        print0(f"to draw the aligned labels: python experiments/picture.py {args.out}/best.pt")
        lock.close()


if __name__ == "__main__":
    main()
