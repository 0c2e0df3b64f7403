"""Train a vision transformer with token-label alignment.

    python train.py                                          # a micro model on built-in images, a minute
    python train.py --data cifar10                           # a set that torchvision knows
    python train.py --data /imagenet --model deit_small      # the paper's recipe, on every GPU it sees
    python train.py --data /imagenet --model swin_tiny --targets area      # the CutMix baseline
    python train.py --model deit_small --bench               # how fast, on made-up images
    python train.py --eval runs/shapes-vit_micro-cutmix-tl_align/best.pt

Under torchrun or SLURM's srun, on one node or many, the same command joins their group of processes.
Settings that are not given fit the data and the model, and are printed at the start. A run's folder
holds last.pt, best.pt, metrics.jsonl, config.json and alignment.png; the same command continues a run
that was stopped, from the step of its last checkpoint. `python train.py --help` lists all settings.
"""

import argparse
import contextlib
import copy
import dataclasses
import json
import math
import os
import resource
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.utils import draw_bounding_boxes, save_image

import data
import swin
import tl_align
import vit
from data import InputError, bring, did_you_mean, uniform

VITS = [vit.vit_micro, vit.deit_tiny, vit.deit_small, vit.deit_base]
SWINS = [swin.swin_micro, swin.swin_tiny, swin.swin_small, swin.swin_base]
MODELS = {make.__name__: make for make in VITS + SWINS}

# ---------------------------------------------------------------------------------------------------
# Settings: the command line is made from them. None stands for what `recipe` finds fitting.


def option(default, help, choices=None, low=None, below=math.inf):
    """A setting: its default, its line of help, and what it may be: one of choices, or at least low and
    less than below."""
    limits = {"help": help, "choices": choices, "low": low, "below": below}
    return dataclasses.field(default=default, metadata=limits)


@dataclasses.dataclass
class Settings:
    data: str = option("shapes", "shapes, a torchvision set (cifar10, ...), or a folder with train/ and val/")
    root: str = option("data", "folder that torchvision's sets are downloaded to")
    model: str = option("vit_micro", "which model", [*MODELS])
    mix: str = option("cutmix", "how two images are mixed", ["cutmix", "mixup", "none"])
    targets: str = option("tl_align", "how the label of a mix is set", ["tl_align", "area", "transmix"])
    residual: str = option(
        "half", "how tl_align weighs a residual: the paper's half, or by norm", ["half", "norm"]
    )
    img_size: int = option(None, "side of the images in pixels", low=1)
    patch_size: int = option(None, "side of a patch in pixels", low=1)
    epochs: int = option(None, "passes over the training set", low=1)
    batch_size: int = option(None, "images a step, whatever the number of processes", low=1)
    micro_batch: int = option(None, "most images a process takes at once; 0 for its whole share", low=0)
    lr: float = option(None, "learning rate at its peak", low=1e-12)
    warmup: float = option(None, "epochs in which the learning rate rises", low=0)
    weight_decay: float = option(None, "AdamW's decay of weight matrices", low=0)
    clip: float = option(None, "norm to clip the gradient at, 0 for none", low=0)
    ema: float = option(
        0.0, "decay of a running mean of the weights, such as 0.9999; 0: none", low=0, below=1
    )
    smoothing: float = option(0.1, "label smoothing", low=0, below=1)
    drop_path: float = option(None, "rate of stochastic depth in the last block", low=0, below=1)
    augment: str = option(None, "light: crop and flip; full: RandAugment and erasing too", ["light", "full"])
    repeats: int = option(None, "crops of an image in a batch (repeated augmentation)", low=1)
    seed: int = option(0, "all randomness is a function of it", low=0, below=2**63)
    workers: int = option(None, "processes that decode images", low=0)
    device: str = option(None, "cpu, cuda (all GPUs) or cuda:N; cuda where there is one")
    bf16: bool = option(None, "compute in bfloat16 (autocast); the default on CUDA")
    compile: bool = option(None, "use torch.compile; the default on CUDA")
    log_every: int = option(50, "steps between two lines of the log", low=1)
    save_minutes: float = option(15.0, "minutes between checkpoints within an epoch", low=0)
    max_restarts: int = option(0, "how often the run may be restarted when a process fails", low=0)
    out: str = option(None, "folder of the run")
    resume: bool = option(True, "continue the run in that folder; --no-resume starts it over")
    init: str = option(None, "checkpoint to start from: ours, DeiT's, timm's ViT or Microsoft's Swin")
    eval: str = option(None, "checkpoint to evaluate instead of training; its settings are the defaults")
    bench: bool = option(False, "time training steps on made-up images instead of training")


# A run that is continued may differ in these alone.
FREE = {"root", "micro_batch", "workers", "device", "compile", "log_every", "save_minutes"}
FREE |= {"max_restarts", "out", "resume", "eval", "bench"}


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise InputError(message)


def parse(argv):
    """Settings from the command line. Raises InputError for what is unknown or out of bounds."""
    parser = Parser(
        description=__doc__.split("\n")[0], allow_abbrev=False, argument_default=argparse.SUPPRESS
    )
    fields = {"--" + f.name.replace("_", "-"): f for f in dataclasses.fields(Settings)}
    for flag, f in fields.items():
        choices, default = f.metadata["choices"], "fits data and model" if f.default is None else f.default
        text = f"{f.metadata['help']}{': ' + ', '.join(choices) if choices else ''} [{default}]"
        kind = (
            {"action": argparse.BooleanOptionalAction} if f.type is bool else {"type": f.type, "metavar": ""}
        )
        parser.add_argument(flag, help=text.replace("%", "%%"), **kind)
    given, unknown = parser.parse_known_args(argv)
    given = vars(given)
    if unknown:
        raise InputError(f"no setting is called {unknown[0]}{did_you_mean(unknown[0], fields)}; see --help")
    for flag, f in fields.items():
        value, (_, choices, low, below) = given.get(f.name), f.metadata.values()
        if value is not None and choices and value not in choices:
            hint = did_you_mean(value, choices)
            raise InputError(f"{flag} knows no {value!r}{hint}; it is one of {', '.join(choices)}")
        if value is not None and low is not None and not low <= value < below:
            upper = "finite" if below == math.inf else f"below {below}"
            raise InputError(f"{flag} must be at least {low} and {upper}, got {value}")
    if "eval" in given:
        saved = read_checkpoint(given["eval"]).get("settings", {})
        known = {f.name for f in fields.values()} - FREE
        given = {k: v for k, v in saved.items() if k in known} | given
    return Settings(**given)


def recipe(s, side, images):
    """Fill in what was not given. Images above 64 px get the paper's recipe, or Swin's own with Swin;
    smaller ones what trains small models well. With --init, DeiT's for fine-tuning: large images learn
    at a tenth of the rate, above 224 px, where a resolution changes, at a hundredth. side: of the set's
    images in pixels. images: how many there are to train on. Returns the complete Settings."""
    swin_like, micro, tune = s.model.startswith("swin"), s.model.endswith("micro"), s.init is not None
    large = (s.img_size or side) > data.SMALL
    patch_size = s.patch_size or ((4 if swin_like else 16) if large else (2 if swin_like else 4))
    img_size = s.img_size or math.ceil(side / patch_size) * patch_size
    epochs = s.epochs or (4 if s.data == "shapes" else 30 if tune else 300 if large else 100)
    cuda = s.device.startswith("cuda")
    batch_size = 64 if s.data == "shapes" or (s.bench and not cuda) else 1024 if large else 128
    batch_size = s.batch_size or max(2, min(batch_size, images // 20 // 2 * 2))  # some steps an epoch
    lr = 5e-4 * batch_size / 512 if large else 3e-3 if micro else 1e-3 * batch_size / 128
    rate = {"swin_tiny": 0.2, "swin_small": 0.3, "swin_base": 0.5}.get(s.model, 0.0 if micro else 0.1)
    fitting = {
        "img_size": img_size,
        "patch_size": patch_size,
        "epochs": epochs,
        "batch_size": batch_size,
        "micro_batch": 32 if large and not cuda else 0,
        "lr": lr / (100 if tune and img_size > 224 else 10 if tune and large else 1),
        "warmup": min(20 if swin_like else 5, epochs / 10),
        "weight_decay": 1e-8 if tune else 0.05,
        "clip": 5.0 if swin_like else 0.0,
        "drop_path": rate,
        "augment": "full" if large else "light",
        "repeats": 3 if large and not swin_like else 1,
        "workers": min(cpus() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)), 16),
        "bf16": cuda,
        "compile": cuda,
        "out": f"runs/{Path(s.data).name}-{s.model}-{s.mix}-{s.targets}{'-norm' * (s.residual == 'norm')}",
    }
    return dataclasses.replace(s, **{k: v for k, v in fitting.items() if getattr(s, k) is None})


def cpus():
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check(s, images, processes):
    """What only shows when settings and data are known. Raises InputError."""
    if s.eval:
        return
    if images < 2:
        raise InputError(f"{s.data} has {images} training image; at least two are needed")
    if s.repeats > 1 and data.fits_memory(images, s.img_size):
        raise InputError("--repeats is for images that workers decode, not for a small set held in memory")
    for flag, size in (("--batch-size", s.batch_size), ("--micro-batch", s.micro_batch)):
        if size % pair(s):
            raise InputError(f"{flag} must be even, for images are mixed two by two; got {size}")
    if s.batch_size > images:
        raise InputError(f"--batch-size {s.batch_size} is more than the {images} training images")
    if s.batch_size < processes * pair(s):
        needed = f"at least {processes * pair(s)}, {pair(s)} for each"
        raise InputError(f"--batch-size {s.batch_size} is too small for {processes} processes: {needed}")
    if s.targets == "transmix" and s.model.startswith("swin"):
        raise InputError("--targets transmix needs a class token: take a ViT, such as vit_micro, not a Swin")


def build(s, classes):
    """The model. Swin's windows are 4 x 4 tokens for small images; for large ones the last stage is one
    window where that is 7 x 7 or more, as at 224 px (7) and 384 px (12), and else 7 x 7."""
    options = {k: getattr(s, k) for k in ("img_size", "patch_size", "drop_path", "residual")}
    if s.model.startswith("swin"):
        small, last = s.img_size <= data.SMALL, 8 * s.patch_size
        options["window"] = 4 if small else 7 if s.img_size % last else max(7, s.img_size // last)
    try:
        return MODELS[s.model](num_classes=classes, **options)
    except ValueError as e:
        raise InputError(f"--img-size does not fit {s.model}: {e}") from e


# ---------------------------------------------------------------------------------------------------
# Processes: each drives one device, all hold the same weights and share every batch. Without a group of
# them there is one, of rank 0.


class Ended(Exception):
    """The run ends here, as all processes have agreed: message and exit status."""


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    return dist.get_world_size() if dist.is_initialized() else 1


def say(text):
    """Print a line once, whatever the number of processes."""
    if rank() == 0:
        print(text, flush=True)


def over_processes(numbers):
    """The sum over all processes of each number of a list. It waits for them, not for their devices."""
    if world() == 1:
        return numbers
    numbers = torch.tensor(numbers, dtype=torch.float64)
    dist.all_reduce(numbers)
    return numbers.tolist()


def from_processes(thing):
    """What each process gives, as a list."""
    things = [thing] * world()
    if world() > 1:
        dist.all_gather_object(things, thing)
    return things


def choose_device(s):
    """The device that was asked for, or cuda where there is one. Raises InputError."""
    name = s.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError("it is neither cpu nor cuda")
        if device.type == "cuda" and (device.index or 0) >= (gpus := torch.cuda.device_count()):
            raise RuntimeError(f"torch sees {gpus} GPUs")
    except RuntimeError as e:
        reason = str(e).splitlines()[0]
        raise InputError(f"--device {name} can't be used here: {reason}; --device cpu always works") from e
    return name


def join(s):
    """Join the group of processes that torchrun, or srun of SLURM, has started. False if neither has."""
    env = os.environ
    if "RANK" not in env and int(env.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        show = ["scontrol", "show", "hostnames", env["SLURM_STEP_NODELIST"]]
        hosts = subprocess.run(show, capture_output=True, text=True, check=True).stdout.split()
        env |= {"RANK": env["SLURM_PROCID"], "LOCAL_RANK": env["SLURM_LOCALID"]}
        env["WORLD_SIZE"] = env["SLURM_STEP_NUM_TASKS"]
        env.setdefault("MASTER_ADDR", hosts[0])
        env.setdefault("MASTER_PORT", str(20_000 + int(env["SLURM_JOB_ID"]) % 10_000))
    if "RANK" not in env:
        return False
    cuda = s.device.startswith("cuda")
    if cuda:  # SLURM may show each process its own GPU only
        torch.cuda.set_device(int(env["LOCAL_RANK"]) % torch.cuda.device_count())
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    if s.device not in ("cpu", "cuda") and world() > 1:
        raise Ended(f"--device {s.device} is one GPU for {world()} processes; say --device cuda", 2)
    return True


def launch(s, processes, argv):
    """Become torch's launcher of a process for each GPU, if there are several, or of one that is to be
    restarted when it fails. It calls this script again."""
    if processes == 1 and not s.max_restarts:
        return
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cpus() // processes)))
    # Processes that start again must not find the addresses of the dead (pytorch issue 135712).
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    run += [f"--nproc-per-node={processes}", f"--max-restarts={s.max_restarts}"]
    sys.stdout.flush()
    os.execv(sys.executable, [*run, __file__, *argv])


@contextlib.contextmanager
def stop_signals():
    """SIGTERM, SIGUSR1 and Ctrl-C ask the run to stop, which it does after its step. Yields a function
    that tells the signal, or 0; a launcher that is gone counts as SIGTERM. A second signal ends a single
    process at once; in a group, the launcher passes on what a terminal sent already."""
    asked, parent, launched = [0], os.getppid(), "TORCHELASTIC_RUN_ID" in os.environ

    def ask(number, frame):
        asked.append(number)
        if world() == 1:
            signal.signal(number, signal.SIG_DFL)

    before = {n: signal.signal(n, ask) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    try:
        yield lambda: signal.SIGTERM if launched and os.getppid() != parent else asked[-1]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ---------------------------------------------------------------------------------------------------
# Checkpoints.


def read_checkpoint(path):
    """A checkpoint as a dict with "model", the raw state dict. Nothing in the file is run. Raises
    InputError where the file is missing, damaged or no checkpoint."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as e:
        raise InputError(f"there is no checkpoint {path}") from e
    except Exception as e:  # whatever a damaged file makes of the unpickler
        reason = str(e).split("\n")[0][:100] or "it ends too early"
        raise InputError(f"{path} is no checkpoint, or a damaged one: {reason}") from e
    state = saved.get("model", saved) if isinstance(saved, dict) else None
    if not isinstance(state, dict) or not all(torch.is_tensor(v) for v in state.values()):
        raise InputError(f"{path} holds no model: expected a state dict, or a dict with one as 'model'")
    return saved if "model" in saved else {"model": saved}  # timm's files are the state dict itself


def write_beside(path, write):
    """A file is whole or it is not there: written under another name, then renamed over the old one.
    Raises InputError where it can't be written."""
    beside = path.with_name(path.name + ".tmp")
    try:
        with beside.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except (OSError, RuntimeError) as e:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)
        reason = e.strerror if isinstance(e, OSError) else "the disk is full"  # as torch.save meets it
        raise InputError(f"{path} can't be written: {reason}; what was there is as it was") from e


def on_cpu(thing):
    """A copy in the CPU's memory: of a tensor, or of dicts and lists of them."""
    if torch.is_tensor(thing):
        return thing.to("cpu", copy=True)
    if isinstance(thing, dict):
        return {key: on_cpu(value) for key, value in thing.items()}
    return [on_cpu(value) for value in thing] if isinstance(thing, list) else thing


def load_weights(model, saved, path, new_head=False):
    """Load a checkpoint, its running mean if it has one, into a model of the same kind. new_head: keep
    the model's own head where the file's is for another number of classes. Raises InputError where
    anything else differs."""
    state = model.adapt(saved.get("ema") or saved["model"])
    own = model.state_dict()
    if new_head and "head.weight" in state and state["head.weight"].shape != own["head.weight"].shape:
        say(f"{path}: the head is for {len(state['head.weight'])} classes, a new one is trained")
        state |= {k: own[k] for k in ("head.weight", "head.bias")}
    odd = [k for k in {**own, **state} if k not in own or k not in state or own[k].shape != state[k].shape]
    if odd:
        k = odd[0]
        this, that = (tuple(d[k].shape) if k in d else "nothing" for d in (own, state))
        raise InputError(
            f"{path} is of another model: {len(odd)} parameters differ, such as {k}, "
            f"where this model has {this} and the file has {that}"
        )
    model.load_state_dict(state)


# ---------------------------------------------------------------------------------------------------
# Training.


def lr_at(step, s, steps):
    """The learning rate as a function of the step: a line up from 1e-6, half a cosine down to 1e-5.
    steps: of an epoch."""
    warmup, total = s.warmup * steps, s.epochs * steps
    start, final = min(1e-6, s.lr), min(1e-5, s.lr)
    if step < warmup:
        return start + (s.lr - start) * step / warmup
    return final + (s.lr - final) * (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) / 2


def optimizer(model, s):
    """AdamW. Only matrices decay: not biases, norms, tokens, position embeddings or bias tables."""
    decay, rest = [], []
    for name, p in model.named_parameters():
        spared = p.dim() < 2 or name.endswith(("_token", "pos_embed", "bias_table"))
        (rest if spared else decay).append(p)
    groups = [{"params": decay}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=s.lr, weight_decay=s.weight_decay, fused=True)


def pair(s):
    """What must not be cut when a batch is divided: the two images of a mix."""
    return 1 if s.mix == "none" else 2


def loss_of(model, images, targets, rand, s):
    """Mix a batch, run the model, and take the loss for the target that `--targets` names.

    images: (B, 3, S, S), normalised. targets: (B,). rand: (B, 3 + 2 * depth), uniform: three columns
    for mixing, the others for drop path. Returns a scalar.
    """
    drop = rearrange(rand[:, 3:], "b (depth two) -> b depth two", two=2)
    if s.mix == "none":
        return F.cross_entropy(model(images, rand=drop), targets, label_smoothing=s.smoothing)
    if s.mix == "cutmix":
        mask = tl_align.cutmix_mask(rand[:, :3], images.shape[-2:], s.patch_size)
    else:
        mask = tl_align.mixup_mask(rand[:, :3], images.shape[-2:])
    mixed = tl_align.mix(images, mask)
    if s.targets == "area":
        logits, share = model(mixed, rand=drop), mask.mean((2, 3))
    else:
        transmix = {"transmix": True} if s.targets == "transmix" else {}
        labels = tl_align.token_labels(mask, s.patch_size)
        logits, share = model(mixed, labels, rand=drop, **transmix)
    return tl_align.mixed_cross_entropy(logits, targets, share, s.smoothing)


class Trainer:
    """A model and its optimizer, and the step that trains them.

    raw is the model itself, with the official parameter names; ddp the same, distributed; model what a
    step calls, compiled as well; ema the running mean of the weights, or None; loss what a step
    minimises, called as `loss_of`. rows: the places of every batch that are this process's, from and
    to: cut anywhere between two pairs, so that no size is forbidden."""

    def __init__(self, s, classes):
        self.s, self.device, self.loss = s, torch.device(s.device), loss_of
        torch.manual_seed(s.seed)
        self.raw = build(s, classes).to(self.device)
        # Newer versions of torch prefer cuDNN's attention on H100, whose gradients have come out as NaN
        # (pytorch issue 196678): flash attention it is.
        torch.backends.cuda.enable_cudnn_sdp(False)
        self.ddp = self.model = self.raw
        if world() > 1:
            self.ddp = self.model = DistributedDataParallel(self.raw, gradient_as_bucket_view=True)
            self.ddp.broadcast_buffers = False  # they are constants
        if s.compile:
            self.model = torch.compile(self.ddp)
        self.optimizer = optimizer(self.raw, s)
        self.ema = copy.deepcopy(self.raw).requires_grad_(False) if s.ema else None
        pairs = s.batch_size // pair(s)
        self.rows = tuple(pairs * r // world() * pair(s) for r in (rank(), rank() + 1))

    def step(self, images, targets, step, steps, flip=True):
        """One step of the optimizer. images, targets: this process's rows of the batch, as data.py
        brings them. step: its number in the run; steps: of an epoch. Returns this process's part of
        the mean loss, on the device: nothing here waits for it."""
        s, total = self.s, 0.0
        for group in self.optimizer.param_groups:
            group["lr"] = lr_at(step, s, steps)
        # A row a sample: 16 numbers for augmentation, 3 for mixing, 2 a block for drop path.
        rand = uniform((s.batch_size, 19 + 2 * self.raw.depth), s.seed, "step", step)[slice(*self.rows)]
        size = s.micro_batch or len(images)
        for start in range(0, len(images), size):
            part, last = slice(start, start + size), start + size >= len(images)
            batch = data.augment(images[part], rand[part, :16], flip, s.augment == "full")
            # Gradients are summed here and averaged over the processes, once a step.
            with contextlib.nullcontext() if last or self.ddp is self.raw else self.ddp.no_sync():
                with torch.autocast(self.device.type, torch.bfloat16, enabled=s.bf16):
                    loss = self.loss(self.model, batch, targets[part], bring(rand[part, 16:], self.device), s)
                loss = loss * (len(batch) / s.batch_size)
                (loss * world()).backward()
            total = total + loss.detach()
        if s.clip:
            torch.nn.utils.clip_grad_norm_(self.raw.parameters(), s.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.ema is not None:
            average = get_ema_multi_avg_fn(min(s.ema, (1 + step) / (10 + step)))  # short at first
            average(list(self.ema.parameters()), list(self.raw.parameters()), None)
        return total


@torch.no_grad()
def evaluate(model, batches, s):
    """Top-1 and top-5 accuracy in percent, of every image once: each process takes its share of them."""
    model.eval()
    hits, total = torch.zeros(2, device=s.device), 0
    for images, targets in batches.whole(rank(), world()):
        with torch.autocast(images.device.type, torch.bfloat16, enabled=s.bf16):
            logits = model(data.normalize(images))
        top = logits.topk(min(5, logits.shape[1])).indices == targets[:, None]  # (B, 5)
        hits += torch.stack([top[:, 0].sum(), top.sum()])
        total += len(targets)
    top1, top5, total = over_processes([*hits.tolist(), total])
    return round(100 * top1 / total, 3), round(100 * top5 / total, 3)


class Meter:
    """The losses and times of an epoch. Losses stay on the device until a log line reads them, so
    that nothing waits for the device between two lines. What was read goes into the checkpoint."""

    def __init__(self, batch_size, read=None):
        self.batch_size = batch_size
        self.read = read or {"losses": [], "seconds": 0.0, "waited": 0.0}
        self.pending, self.waited, self.since = [], 0.0, time.perf_counter()

    def waiting(self, batches):
        """The batches, and how long each was waited for."""
        asked = self.since = time.perf_counter()
        for batch in batches:
            self.waited += time.perf_counter() - asked
            yield batch
            asked = time.perf_counter()

    def line(self, step):
        """Mean loss, images/s and the share of time that waited for data, since the last line, which
        ends with this step. A loss that is not finite ends the run."""
        *losses, waited = over_processes([*torch.stack(self.pending).tolist(), self.waited])
        for number, loss in enumerate(losses, step - len(losses)):
            if not math.isfinite(loss):
                raise Ended(f"the loss is {loss} at step {number}; a lower --lr or --clip 1 may help", 1)
        now = time.perf_counter()
        new = {"losses": losses, "seconds": now - self.since, "waited": waited / world()}
        self.read = {k: self.read[k] + new[k] for k in new}
        self.pending, self.waited, self.since = [], 0.0, now
        return self.summary(new)

    def summary(self, read=None):
        """The same three of the whole epoch."""
        losses, seconds, waited = (read or self.read).values()
        return sum(losses) / len(losses), len(losses) * self.batch_size / seconds, waited / seconds


def train(s, sets, out):
    last = out / "last.pt"
    restarted = any(from_processes(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"))
    trainer = Trainer(s, len(sets.classes))
    raw, weights = trainer.raw, trainer.ema or trainer.raw  # what is trained, and what is evaluated

    # Everything random is a function of the seed, the step and the sample, so this is all it takes to
    # go on. An epoch is done when its line stands in the history: after its evaluation.
    step, best, history, meter = 0, -1.0, [], None
    if (s.resume or restarted) and last.exists():
        saved = read_checkpoint(last)
        if "settings" not in saved:
            raise Ended(f"{last} is not of a run of this script; give another --out", 2)
        check_same_run(s, saved["settings"], out)
        step, best, history = (saved[k] for k in ("step", "best", "history"))
        if len(history) == s.epochs:
            top1 = history[-1]["val_top1"]
            return say(f"{out} is finished: {s.epochs} epochs, top-1 {top1:.2f} %, best {best:.2f} %")
        raw.load_state_dict(saved["model"])
        trainer.optimizer.load_state_dict(saved["optimizer"])
        if trainer.ema:
            trainer.ema.load_state_dict(saved["ema"])
        meter = Meter(s.batch_size, saved["meter"])
        say(f"{out}: going on after step {step}, in epoch {len(history) + 1} of {s.epochs}")
    elif s.init:
        load_weights(raw, read_checkpoint(s.init), s.init, new_head=True)
        weights.load_state_dict(raw.state_dict())
    if any(other != step for other in from_processes(step)):
        raise Ended(f"not every process sees {last}: --out must be a folder that all nodes share", 2)
    if rank() == 0:
        try:
            out.mkdir(parents=True, exist_ok=True)
            if not (s.resume or restarted):
                last.unlink(missing_ok=True)
        except OSError as e:
            raise InputError(f"--out {out} cannot be written: {e.strerror}") from e
        config = json.dumps(dataclasses.asdict(s), indent=2) + "\n"
        write_beside(out / "config.json", lambda file: file.write(config.encode()))

    batches, val = (
        data.load(part, s.img_size, s.batch_size, trainer.rows, s.seed, s.device, s.workers, s.repeats)
        for part in (sets.train, sets.val)
    )
    steps, total = batches.steps, s.epochs * batches.steps
    parameters = sum(p.numel() for p in raw.parameters()) / 1e6
    say(
        f"{len(sets.train)} training images, {len(sets.val)} to validate, {len(sets.classes)} classes; "
        f"{parameters:.1f} M parameters; {steps} steps an epoch on {world()} process(es)"
    )

    def save(*paths):
        """Have the writer write the checkpoint to each path, from a copy, while training goes on."""
        nonlocal written, saved_at
        with torch.no_grad():
            healthy = raw.eval()(torch.zeros(1, 3, s.img_size, s.img_size, device=s.device)).isfinite().all()
        if not healthy:
            raise Ended(f"the model's outputs are not finite after step {step}; a lower --lr may help", 1)
        raw.train()
        if rank() == 0:
            saved = {
                "model": raw.state_dict(),
                "optimizer": trainer.optimizer.state_dict(),
                "step": step,
                "best": best,
                "history": history,
                "meter": meter and meter.read,
                "settings": dataclasses.asdict(s),
                "classes": [str(name) for name in sets.classes],
            }
            if trainer.ema:
                saved["ema"] = trainer.ema.state_dict()
            written.result()  # of the one before; raises what went wrong with it
            saved = on_cpu(saved)
            dump = lambda file: torch.save(saved, file)
            written = writer.submit(lambda: [write_beside(path, dump) for path in paths])
        saved_at = time.monotonic()

    saved_at = time.monotonic()
    with stop_signals() as asked, ThreadPoolExecutor(1) as writer:
        written = writer.submit(int)  # nothing yet
        for epoch in range(len(history), s.epochs):
            raw.train()
            meter = meter or Meter(s.batch_size)
            for images, targets in meter.waiting(batches.epoch(epoch, step - epoch * steps)):
                meter.pending.append(trainer.step(images, targets, step, steps, sets.flip))
                step += 1
                ends = step == (epoch + 1) * steps
                due = rank() == 0 and time.monotonic() - saved_at > 60 * s.save_minutes
                stop, due = over_processes([asked(), due])
                if step % s.log_every == 0 or ends or due or stop:
                    mean, rate, wait = meter.line(step)
                    say(
                        f"epoch {epoch + 1}/{s.epochs}  step {step}/{total}  loss {mean:.4f}  "
                        f"lr {lr_at(step - 1, s, steps):.2e}  {rate:.0f} images/s  data {wait:.0%}  "
                        f"left {timedelta(seconds=int((total - step) * s.batch_size / rate))}"
                    )
                if ends or due or stop:
                    save(last)
                if stop:
                    written.result()
                    status = 128 + (asked() or signal.SIGTERM)
                    raise Ended(f"stopped after step {step}: the same command goes on from there", status)

            top1, top5 = evaluate(weights, val, s)
            say(f"epoch {epoch + 1}/{s.epochs}  val top-1 {top1:.2f} %  top-5 {top5:.2f} %")
            for part in (batches, val):
                part.bad.update(*from_processes(part.bad))
            mean, rate, wait = meter.summary()
            history.append(
                {
                    "epoch": epoch + 1,
                    "step": step,
                    "train_loss": round(mean, 5),
                    "val_top1": top1,
                    "val_top5": top5,
                    "lr": lr_at(step - 1, s, steps),
                    "images_per_s": round(rate, 1),
                    "data_wait": round(wait, 4),
                    "undecodable": len(batches.bad | val.bad),
                }
            )
            improved, best = top1 > best, max(top1, best)
            meter = None
            if rank() == 0:
                lines = "".join(json.dumps(line) + "\n" for line in history).encode()
                write_beside(out / "metrics.jsonl", lambda file: file.write(lines))
                if epoch + 1 == s.epochs:
                    draw(weights, sets.val, s, out / "alignment.png")
            save(*[out / "best.pt"] * improved, last)
        written.result()
    say(
        f"finished: top-1 {top1:.2f} %, best {best:.2f} %; {out}/ holds the weights, the metrics and a "
        "picture of the aligned labels"
    )


def check_same_run(s, saved, out):
    """Raise Ended where a run was begun with other settings: only some may change on the way."""
    for name, then in saved.items():
        now = getattr(s, name, then)
        if name not in FREE and then != now:
            flag = f"--{'no-' if then is False else ''}{name.replace('_', '-')}"
            value = "" if isinstance(then, bool) else f" {then}, not {now}"
            way_out = "give another --out, or --no-resume to start over"
            raise Ended(f"{out} holds a run with {flag}{value}; {way_out}", 2)


# ---------------------------------------------------------------------------------------------------
# The picture: what the labels do between the first layer and the last.

CELL, CAPTION, GAP = 112, 18, 6  # pixels
OWN, PARTNER = (0.15, 0.32, 0.62), (0.98, 0.67, 0.23)  # colours of a share of 0 and of 1


@torch.no_grad()
def draw(model, dataset, s, path, rows=5, most=7):
    """A row for each of a few mixed validation images: the mix, the mask that mixed it, and the labels
    after at most `most` of the layers, the last one's being aligned, each with the share of the pasted
    image that the head would read there."""
    model.eval()
    crops = data.Crops(dataset, s.img_size)
    chosen = torch.linspace(0, len(dataset) - 1, 2 * rows).long().tolist()
    images = torch.stack([crops[i, ()][0][0] for i in chosen]).float()
    at = uniform((len(images), 3), "picture") * 0.5 + 0.25  # boxes of middling size, not at the border
    mask = tl_align.cutmix_mask(at, images.shape[-2:], s.patch_size)
    mixed = tl_align.mix(images, mask)
    labels = tl_align.token_labels(mask, s.patch_size)
    layers = model.layer_labels(data.normalize(mixed).to(s.device), labels.to(s.device))

    colours = torch.tensor([OWN, PARTNER])[:, :, None, None] * 255

    def paint(share):  # (B, 1, H, W) in [0, 1]
        return torch.lerp(colours[0], colours[1], share.cpu())

    columns = [("mixed image", mixed, None), ("pasted area", paint(mask), mask.mean((1, 2, 3)))]
    for depth in torch.linspace(1, len(layers) - 1, min(most, len(layers) - 1)).long().tolist():
        share, read = layers[depth]
        title = f"layer {depth}" if depth < len(layers) - 1 else "aligned"
        columns.append((title, paint(rearrange(share, "b h w 1 -> b 1 h w")), read[:, 0]))
    cells, frame = [], torch.tensor([[0, 0, CELL - 1, CAPTION + CELL - 1]])
    for row in range(rows):
        for title, pictures, read in columns:
            cell = F.interpolate(pictures[2 * row, None], (CELL, CELL), mode="area")[0]
            cell = F.pad(cell, (0, 0, CAPTION, 0), value=255).to(torch.uint8)
            caption = title if read is None else f"{title}: {read[2 * row].item():.2f}"
            cells.append(draw_bounding_boxes(cell, frame, [caption], "black") / 255)
    grid = {"nrow": len(columns), "padding": GAP, "pad_value": 1}
    write_beside(path, lambda file: save_image(cells, file, format="png", **grid))


# ---------------------------------------------------------------------------------------------------
# How fast it is, without data.


def bench(s, classes=1000):
    """Time steps of training on noise, the device's half of augmentation included, and print images/s,
    time a step, peak memory, and the model's arithmetic (three times that of its forward pass) as a
    share of what a large matrix product reaches on the same device."""
    trainer, cuda = Trainer(s, classes), s.device.startswith("cuda")
    n = trainer.rows[1] - trainer.rows[0]
    images = torch.randint(256, (n, 3, s.img_size, s.img_size), dtype=torch.uint8, device=s.device)
    targets = torch.randint(classes, (n,), device=s.device)

    def wait():
        if cuda:
            torch.cuda.synchronize()

    def seconds(action, least):
        """Of one action, the mean over at least `least` seconds, after three that compile and warm up."""
        for _ in range(3):
            action()
        wait()
        began, times = time.perf_counter(), 0
        while times < 3 or over_processes([time.perf_counter() - began < least])[0]:
            action()
            times += 1
        wait()
        return (time.perf_counter() - began) / times

    step = seconds(lambda: trainer.step(images, targets, 0, 1000), 5)
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    memory = torch.cuda.max_memory_allocated() if cuda else resident
    side = 8192 if cuda else 2048
    matrix = torch.randn(side, side, device=s.device, dtype=torch.bfloat16 if s.bf16 else torch.float32)
    peak = world() * 2 * side**3 / seconds(lambda: matrix @ matrix, 1)
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        build(s, classes)(torch.empty(1, 3, s.img_size, s.img_size))
    rate = s.batch_size / step
    reached = 3 * counter.get_total_flops() * rate
    say(
        f"{rate:.1f} images/s  {1000 * step:.1f} ms a step  peak memory {memory / 2**30:.2f} GiB  "
        f"{reached / 1e12:.2f} TFLOP/s, {reached / peak:.0%} of a matrix product's {peak / 1e12:.2f}"
    )


def prepare(s, processes):
    """Open the sets, complete the settings and check them. One process of a node goes first, for it may
    have to download. Raises Ended with the first error, in the order of ranks."""
    first, sets, error = os.environ.get("LOCAL_RANK", "0") == "0", None, None
    side, images = 32 if s.model.endswith("micro") else 224, 1_281_167  # what --bench makes up
    for turn in (True, False):
        try:
            if first == turn:
                if not s.bench:
                    sets = data.open_sets(s.data, s.root, s.seed)
                    side, images = data.native_size(sets.train), len(sets.train)
                s = recipe(s, side, images)
                check(s, images, processes)
        except InputError as e:
            error = str(e)
        if errors := [e for e in from_processes(error) if e]:
            raise Ended(errors[0], 2)
    return s, sets


def run(argv):
    s = parse(argv)
    s = dataclasses.replace(s, device=choose_device(s), data="noise" if s.bench else s.data)
    joined = join(s)
    processes = world() if joined or s.device != "cuda" else torch.cuda.device_count()
    s, sets = prepare(s, processes)
    if not joined:
        launch(s, processes, argv)
    if s.device.startswith("cuda:"):
        torch.cuda.set_device(s.device)  # cuda:1, say: what names no device means this one
    say("settings: " + "  ".join(f"{k} {v}" for k, v in dataclasses.asdict(s).items() if v is not None))
    if s.bench:
        bench(s)
    elif s.eval:
        model = build(s, len(sets.classes))
        load_weights(model, read_checkpoint(s.eval), s.eval)
        val = data.load(sets.val, s.img_size, s.batch_size, device=s.device, workers=s.workers)
        top1, top5 = evaluate(model.to(s.device), val, s)
        say(f"{s.eval}: top-1 {top1:.2f} %, top-5 {top5:.2f} % of {len(sets.val)} images")
    else:
        train(s, sets, Path(s.out))


def main(argv=None):
    """Run. Where it does not get to its end, say in one line why."""
    text, status, alone = None, 0, True
    try:
        run(sys.argv[1:] if argv is None else [str(word) for word in argv])
        alone = False
    except Ended as e:  # all processes know
        text, status = e.args
        text, alone = None if rank() else text, False
    except InputError as e:
        text, status = str(e), 2
    except KeyboardInterrupt:
        text, status = "stopped", 130
    except torch.OutOfMemoryError:
        text, status = "the GPU's memory is too small; --micro-batch 128 takes the same step in parts", 1
    except RuntimeError as e:
        lost = "gloo/transport" in str(e) or isinstance(e, dist.DistBackendError)
        if not (lost and dist.is_initialized()):
            raise
        reason = " ".join(str(e).split())[:300]
        text, status = f"process {rank()} lost another one, which may say why, or the network: {reason}", 1
    if text:
        print(text if status > 128 else f"error: {text}", file=sys.stderr, flush=True)
    if dist.is_initialized():
        if alone:  # to take leave would be to wait for the others, who may wait for this one
            sys.stdout.flush()
            os._exit(status)
        dist.destroy_process_group()
    if status:
        sys.exit(status)


if __name__ == "__main__":
    main()
