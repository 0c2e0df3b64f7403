"""Train a vision transformer with token-label alignment.

    python train.py                                          # a micro model on built-in images, a minute
    python train.py --data cifar10                           # a set that torchvision knows
    python train.py --data /imagenet --model deit_small      # the paper's recipe, on every GPU it sees
    python train.py --data /imagenet --model swin_tiny --targets area      # the CutMix baseline
    python train.py --eval runs/shapes-vit_micro-cutmix-tl_align/best.pt

Under torchrun, on one node or many, the same command joins its group of processes. A run's folder holds
last.pt, best.pt, metrics.jsonl and config.json, and the same command continues a run that was stopped.
"""

import argparse
import contextlib
import copy
import io
import json
import math
import os
import re
import signal
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils._pytree import tree_map_only

import data
import swin
import tl_align
import vit
from data import Ended, bring, uniform

VITS = [vit.vit_micro, vit.deit_tiny, vit.deit_small, vit.deit_base]
SWINS = [swin.swin_micro, swin.swin_tiny, swin.swin_small, swin.swin_base]
MODELS = {make.__name__: make for make in VITS + SWINS}
CPUS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
# A run that is continued may differ in these alone.
FREE = set("data root micro_batch workers device compile save_minutes out resume eval".split())
pair = lambda s: 1 if s.mix == "none" else 2  # images that a cut through a batch must not part
LOG_SECONDS = 5  # between two lines of the log, about; so long may many processes take to answer a signal

# --- Settings. What is not given and has no default here is filled in by `recipe`.


def number(text, kind, low, below=math.inf):
    """For argparse: a number of at least low and less than below."""
    with contextlib.suppress(ValueError):
        if low <= kind(text) < below:
            return kind(text)
    raise argparse.ArgumentTypeError(f"{text!r} is no {kind.__name__} of at least {low} and below {below}")


def refuse(message):
    raise Ended(f"{message}; see --help")


def parse(argv):
    """The settings that a command line gives, as a namespace. Raises Ended for what it can't mean."""
    style = {"formatter_class": argparse.ArgumentDefaultsHelpFormatter, "argument_default": argparse.SUPPRESS}
    about = __doc__.split("\n")[0] + " Settings without a default fit the data and the model."
    parser = argparse.ArgumentParser(description=about, allow_abbrev=False, **style)
    parser.error = refuse
    add, switch, count = parser.add_argument, argparse.BooleanOptionalAction, lambda t: number(t, int, 1)
    amount, share, devices = lambda t: number(t, float, 0), lambda t: number(t, float, 0, 1), ["cpu", "cuda"]
    add("--data", default="shapes", help="shapes, a torchvision set, or a folder: train/CLASS/, val/CLASS/")
    add("--root", default="data", help="folder that torchvision's sets are downloaded to")
    add("--model", default="vit_micro", choices=MODELS, help="which model")
    add("--mix", default="cutmix", choices=["cutmix", "mixup", "none"], help="how two images are mixed")
    add("--unmixed", type=share, default=0.0, help="share of images that are left as they are")
    add("--targets", default="tl_align", choices=["tl_align", "area", "transmix"], help="how it is labelled")
    add("--img-size", type=count, help="side of the images in pixels")
    add("--patch-size", type=count, help="side of a patch in pixels")
    add("--epochs", type=count, help="passes over the training set")
    add("--batch-size", type=count, help="images a step, whatever the number of processes")
    add("--micro-batch", type=lambda t: number(t, int, 0), help="most images a process takes at once; 0: all")
    add("--lr", type=lambda t: number(t, float, 1e-12), help="learning rate at its peak")
    add("--warmup", type=amount, help="epochs in which the learning rate rises")
    add("--weight-decay", type=amount, help="AdamW's decay of weight matrices")
    add("--clip", type=amount, help="norm to clip the gradient at; 0: none")
    add("--ema", type=share, default=0.0, help="decay of a running mean of the weights, as 0.9999; 0: none")
    add("--smoothing", type=share, default=0.1, help="label smoothing")
    add("--drop-path", type=share, help="rate of stochastic depth in the last block")
    add("--augment", choices=["light", "full"], help="light: crop and flip; full: RandAugment, erasing too")
    add("--repeats", type=count, help="crops of an image in an epoch (repeated augmentation)")
    add("--seed", type=lambda t: number(t, int, 0, 2**63), default=0, help="of all randomness")
    add("--workers", type=lambda t: number(t, int, 0), help="processes that decode, in shared memory")
    add("--device", default=devices[torch.cuda.is_available()], choices=devices, help="cuda: on all GPUs")
    add("--bf16", action=switch, help="compute in bfloat16 (autocast); the default on CUDA")
    add("--compile", action=switch, help="use torch.compile (wants a C++ compiler); the default on CUDA")
    add("--save-minutes", type=amount, default=15.0, help="minutes between checkpoints within an epoch")
    add("--out", help="folder of the run")
    add("--resume", action=switch, default=True, help="continue the run in that folder; or start it over")
    add("--init", default=None, help="checkpoint to start from: ours, DeiT's, Microsoft's or timm's")
    add("--eval", default=None, help="checkpoint to evaluate instead; its settings are the defaults")
    s = parser.parse_args(argv)
    if s.eval:
        saved = read_checkpoint(s.eval).get("settings", {})
        known = {action.dest for action in parser._actions} - (FREE - {"data"})
        parser.set_defaults(**{k: v for k, v in saved.items() if k in known})
    s = parser.parse_args(argv)
    if s.model not in MODELS:
        refuse(f"{s.eval} is of a model {s.model!r}, which is not among {', '.join(MODELS)}")
    if "" in vars(s).values():
        refuse("a set, a folder or a file is given, but its name is empty")
    return s


def recipe(s, side, images):
    """Fill in what was not given: for images above 64 px the paper's recipe, or Swin's own; for others what
    trains small models well; with --init, DeiT's for fine-tuning, of large ones at a tenth of the rate, above
    224 px at a hundredth. side: of the images in pixels; images: how many to train on. Returns s."""
    fill = vars(s).setdefault
    swin_like, micro, tune = s.model.startswith("swin"), s.model.endswith("micro"), s.init is not None
    large, cuda = vars(s).get("img_size", side) > data.SMALL, s.device == "cuda"
    patch_size = fill("patch_size", (4 if swin_like else 16) if large else (2 if swin_like else 4))
    fill("img_size", math.ceil(side / patch_size) * patch_size)
    fill("epochs", 2 if s.data == "shapes" else 30 if tune else 300 if large else 100)
    usual = vars(s).get("batch_size", 64 if s.data == "shapes" else 1024 if large else 128)
    fill("batch_size", max(2, min(usual, images // 20 // 2 * 2)))  # some steps an epoch, at the usual rate
    fill("micro_batch", 32 if large and not cuda else 0)
    lr = 5e-4 * usual / 512 if large else 3e-3 if micro else 1e-3 * usual / 128
    fill("lr", lr / (100 if tune and s.img_size > 224 else 10 if tune and large else 1))
    fill("warmup", min(20 if swin_like else 5, s.epochs / 10))
    fill("weight_decay", 1e-8 if tune else 0.05)
    fill("clip", 5.0 if swin_like else 0.0)
    rates = {"swin_tiny": 0.2, "swin_small": 0.3, "swin_base": 0.5, "vit_micro": 0.0, "swin_micro": 0.0}
    fill("drop_path", rates.get(s.model, 0.1))
    fill("augment", "full" if large else "light")
    fill("repeats", 3 if large and not swin_like else 1)
    fill("workers", min(CPUS // int(os.environ.get("LOCAL_WORLD_SIZE", 1)), 16))
    fill("bf16", cuda)
    fill("compile", cuda)
    fill("out", f"runs/{Path(s.data).absolute().name}-{s.model}-{s.mix}-{s.targets}")
    return s


def check(s, images, processes):
    """What only shows when settings and data are known. Raises Ended."""
    least = processes * pair(s)
    if s.batch_size % pair(s) or s.micro_batch % pair(s):
        raise Ended(f"--batch-size {s.batch_size} and --micro-batch must be even: mixing takes pairs")
    if not least <= s.batch_size <= images:
        raise Ended(f"--batch-size must be from {least} to the {images} training images, got {s.batch_size}")
    if s.targets == "transmix" and s.model.startswith("swin"):
        raise Ended("--targets transmix needs a class token: take a ViT, such as vit_micro, not a Swin")


def build(s, classes):
    """The model. Swin's windows are 4 x 4 tokens for small images; for large ones the last stage is one
    window where that is 7 x 7 or more, as at 224 px (7) and 384 px (12), and else 7 x 7."""
    # Not cuDNN's attention, which newer torch prefers on H100: its gradients were NaN (pytorch issue 196678).
    torch.backends.cuda.enable_cudnn_sdp(False)
    options = {k: getattr(s, k) for k in ("img_size", "patch_size", "drop_path")}
    if s.model.startswith("swin"):
        small, last = s.img_size <= data.SMALL, 8 * s.patch_size
        options["window"] = 4 if small else 7 if s.img_size % last else max(7, s.img_size // last)
    try:
        return MODELS[s.model](num_classes=classes, **options)
    except ValueError as e:
        raise Ended(f"--img-size does not fit {s.model}: {e}") from e


# --- Processes: each drives one device, all hold the same weights and share every batch. One alone is rank 0.

rank = lambda: dist.get_rank() if dist.is_initialized() else 0
world = lambda: dist.get_world_size() if dist.is_initialized() else 1


def say(line):
    """Print a line once, whatever the number of processes."""
    if rank() == 0:
        data.tell(line)


def agreed(line, status=2):
    """What to raise where all processes end alike: one of them says why."""
    return Ended(line if rank() == 0 else "", status)


def from_processes(thing):
    """What each process gives, as a list."""
    things = [thing] * world()
    if world() > 1:
        dist.all_gather_object(things, thing)
    return things


@contextlib.contextmanager
def stop_signals():
    """SIGTERM, SIGUSR1, Ctrl-C and a closing terminal ask the run to stop. Yields a function that tells the
    signal, or 0; a launcher that is gone counts as SIGTERM. A second signal ends the process at once, if it
    comes a second later: launchers may pass on what the whole group got."""
    asked, parent, launched = [], os.getppid(), "TORCHELASTIC_RUN_ID" in os.environ

    def ask(number, frame):
        if asked and time.monotonic() > asked[1] + 1:
            os._exit(128 + number)
        asked[:] = asked or [number, time.monotonic()]

    hangup = [signal.SIGHUP] * (signal.getsignal(signal.SIGHUP) != signal.SIG_IGN)  # as under nohup
    before = {n: signal.signal(n, ask) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, *hangup)}
    try:
        yield lambda: asked[0] if asked else signal.SIGTERM * (launched and os.getppid() != parent)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# --- Checkpoints.


def read_checkpoint(path):
    """A checkpoint as a dict with "model", the raw state dict, under whatever name and with whatever prefixes
    the file has it. Nothing in it is run. Raises Ended where it is missing, damaged or no checkpoint."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # DeiT's files hold the command line
            saved = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # no such file, or whatever a damaged one makes of the unpickler
        reason = textwrap.shorten(str(e).split("WeightsUnpickler error: ")[-1], 120)
        raise Ended(f"{path} can't be read, no checkpoint or a damaged one: {reason}") from e
    kinds = ["model", "state_dict", "model_ema", "teacher", "student"]  # timm's are the state dict itself
    state = next((saved[k] for k in kinds if k in saved), saved) if isinstance(saved, dict) else None
    if not isinstance(state, dict) or not all(torch.is_tensor(v) for v in state.values()):
        raise Ended(f"{path} holds no model: expected a state dict, or a dict with one as 'model'")
    prefix = r"^(module\.|_orig_mod\.|backbone\.)+"  # of DDP, of torch.compile, of DINO
    return {**saved, "model": {re.sub(prefix, "", name): tensor for name, tensor in state.items()}}


def write_beside(path, content):
    """A file is whole or it is not there: written under another name, then renamed over the old one.
    content: bytes. Raises Ended where it can't be written."""
    beside = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with beside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as e:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)
        raise Ended(f"{path} can't be written: {e.strerror}; what was there is as it was") from e


def kind(saved):
    """What must stay the same for a run to go on: its settings, the number of its images, its classes."""
    flags = {f"--{k.replace('_', '-')}": v for k, v in saved["settings"].items() if k not in FREE}
    classes = {f"class {i}": name for i, name in enumerate(saved["classes"])}
    return {**flags, "number of images": saved["images"], **classes}


def differ(then, now):
    """Where a checkpoint and what is here differ, in words, or "". Both are dicts of what there is."""
    pairs = {k: (then.get(k, "missing"), now.get(k, "missing")) for k in {**now, **then}}
    odd = [f"{k} is {that} there, {this} here" for k, (that, this) in pairs.items() if that != this]
    return "".join(odd[:1]) + f" (one of {len(odd)} differences)" * (len(odd) > 1)


def load_weights(model, saved, path, classes, new_head=False):
    """Load a checkpoint, its running mean if it has one, into a model of the same kind, the rows of its head
    in the order of these classes. new_head: keep the model's own head where the file has none for them, by
    their names if it tells names. Raises Ended where anything else differs."""
    state, own = model.adapt(saved.get("ema") or saved["model"]), model.state_dict()
    names, head = saved["classes"] if "sums" in saved else classes, ["head.weight", "head.bias"]
    if sorted(names) == sorted(classes) and len(state.get(head[0], [])) == len(classes):
        row = {name: i for i, name in enumerate(names)}
        state |= {k: state[k][[row[name] for name in classes]] for k in head if k in state}
    elif new_head:
        say(f"{path} has no head for these {len(classes)} classes, a new one is trained")
        state |= {k: own[k] for k in head}
    elif odd := differ(dict(enumerate(names)), dict(enumerate(classes))):
        raise Ended(f"{path} was trained on other classes: number {odd}")
    if odd := differ(*({k: tuple(v.shape) for k, v in d.items()} for d in (state, own))):
        raise Ended(f"{path} is of another model: {odd}")
    model.load_state_dict(state)


# --- Training.


def lr_at(step, s, steps):
    """The learning rate at a step: a line up from 1e-6, half a cosine down to 1e-5. steps: of an epoch."""
    warmup, total = s.warmup * steps, s.epochs * steps
    start, final = min(1e-6, s.lr), min(1e-5, s.lr)
    if step < warmup:
        return start + (s.lr - start) * step / warmup
    return final + (s.lr - final) * (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) / 2


def optimizer(model, s):
    """AdamW. Only matrices decay: not biases, norms, tokens, position embeddings or bias tables."""
    spared = lambda name, p: p.dim() < 2 or name.endswith(("_token", "pos_embed", "bias_table"))
    decay, rest = ([p for n, p in model.named_parameters() if spared(n, p) == flag] for flag in (False, True))
    groups = [{"params": decay}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=s.lr, weight_decay=s.weight_decay, fused=True)


class Trainer:
    """A model and its optimizer, and the step that trains them. raw: the model, with the official names; ddp:
    the same, distributed; model: what a step calls, compiled as well; ema: the running mean of weights or
    None; loss: what a step minimises; rows: this process's slice of a batch, cut between pairs."""

    def __init__(self, s, classes):
        self.s, self.device, self.loss = s, torch.device(s.device), tl_align.mixed_loss
        torch.manual_seed(s.seed)
        self.raw = build(s, classes).to(self.device)
        options = {"broadcast_buffers": False, "gradient_as_bucket_view": True}
        self.ddp = DDP(self.raw, **options) if world() > 1 else self.raw
        self.model = torch.compile(self.ddp) if s.compile else self.ddp
        self.optimizer = optimizer(self.raw, s)
        self.ema = copy.deepcopy(self.raw).requires_grad_(False) if s.ema else None
        pairs = s.batch_size // pair(s)
        self.rows = slice(*(pairs * r // world() * pair(s) for r in (rank(), rank() + 1)))

    def step(self, images, targets, step, steps, flip=True):
        """One optimizer step. images, targets: this process's rows of the batch. step: its number in the run;
        steps: of an epoch. Returns the batch's mean loss, on the device: nothing here waits for it."""
        s, total = self.s, 0.0
        for group in self.optimizer.param_groups:
            group["lr"] = lr_at(step, s, steps)
        # A row a sample: 16 numbers for augmentation, 3 for mixing, 2 a block for drop path.
        rand = uniform((s.batch_size, 19 + 2 * self.raw.depth), s.seed, "step", step)[self.rows]
        rand[:, 16].div_(1 - s.unmixed).clamp_(max=1)  # at 1 nothing is pasted
        size = s.micro_batch or len(images)
        for start in range(0, len(images), size):
            part, last = slice(start, start + size), start + size >= len(images)
            batch = data.augment(images[part], rand[part, :16], flip, s.augment == "full")
            # Gradients are summed here and averaged over the processes, once a step.
            with contextlib.nullcontext() if last or self.ddp is self.raw else self.ddp.no_sync():
                with torch.autocast(self.device.type, torch.bfloat16, enabled=s.bf16):
                    inputs = batch, targets[part], bring(rand[part, 16:], self.device)
                    loss = self.loss(self.model, *inputs, s.patch_size, s.mix, s.targets, s.smoothing)
                loss = loss * (len(batch) / s.batch_size)
                (loss * world()).backward()
            total = total + loss.detach()
        if world() > 1:
            dist.all_reduce(total)  # before the step is done, so that its loss is known wherever it is
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
    hits = torch.zeros(2, device=s.device)
    for images, targets in batches.whole():
        with torch.autocast(images.device.type, torch.bfloat16, enabled=s.bf16):
            logits = model(data.normalize(images))
        top = logits.topk(min(5, logits.shape[1])).indices == targets[:, None]  # (B, 5)
        hits += torch.stack([top[:, 0].sum(), top.sum()])
    return tuple(round(100 * sum(n) / len(batches.sets.val), 3) for n in zip(*from_processes(hits.tolist())))


def train(s, sets, out):
    """All epochs of a run, or those that its folder `out` lacks. Raises Ended where it stops before."""
    last, trainer = out / "last.pt", Trainer(s, len(sets.classes))
    raw, weights = trainer.raw, trainer.ema or trainer.raw  # what is trained, and what is evaluated
    states = {"model": raw, "optimizer": trainer.optimizer, **({"ema": weights} if trainer.ema else {})}
    batches = data.batches(sets, s, trainer.rows, slice(rank(), None, world()))
    steps, total = batches.steps, s.epochs * batches.steps
    about = {"settings": vars(s), "images": [len(sets.train), len(sets.val)], "classes": sets.classes}

    # Everything random is a function of the seed, the step and the sample, so this is all it takes to
    # go on. An epoch is done when its line stands in the history: after its evaluation.
    step, best, history, sums = 0, -1.0, [], [0.0] * 3
    resume = s.resume or any(from_processes(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"))
    if resume and last.exists():
        saved = read_checkpoint(last)
        if "images" not in saved:
            raise agreed(f"{last} is not of a run of this script; give another --out")
        if odd := differ(kind(saved), kind(about)):
            raise agreed(f"{out} holds another run: {odd}; give another --out, or --no-resume")
        step, best, history, sums = (saved[k] for k in ("step", "best", "history", "sums"))
        if len(history) == s.epochs:
            return say(f"{out} is finished: top-1 {history[-1]['val_top1']:.2f} %, best {best:.2f} %")
        for name, part in states.items():
            part.load_state_dict(saved[name])
        say(f"{out}: going on after step {step}, in epoch {len(history) + 1} of {s.epochs}")
    elif s.init:
        load_weights(raw, read_checkpoint(s.init), s.init, sets.classes, new_head=True)
        weights.load_state_dict(raw.state_dict())
    if any(other != step for other in from_processes(step)):
        raise agreed(f"not every process sees {last}: --out must be a folder that all nodes share")
    if rank() == 0:
        write_beside(out / "config.json", json.dumps(vars(s), indent=2).encode())
        if not resume:
            last.unlink(missing_ok=True)
    counts = f"{len(sets.train)} training images, {len(sets.val)} to validate, {len(sets.classes)} classes"
    parameters = f"{sum(p.numel() for p in raw.parameters()) / 1e6:.1f} M parameters"
    say(f"{counts}; {parameters}; {steps} steps an epoch on {world()} process(es)")
    if others := sum(getattr(part, "others", 0) for part in (sets.train, sets.val)):
        say(f"{others} files are left out, for their names end in none of {' '.join(data.FORMATS)}")
    if len(sets.train) < 1000 and s.img_size > data.SMALL and not s.init:
        say("these are few images to learn from; --init FILE starts from a model that was trained on many")

    @torch.no_grad()
    def save(*paths):
        """Have the writer write the checkpoint to each path while training goes on."""
        nonlocal written, kept, saved_at
        if not raw.eval()(torch.zeros(1, 3, s.img_size, s.img_size, device=s.device)).isfinite().all():
            raise agreed(f"the model's outputs are not finite after step {step}; a lower --lr may help", 1)
        raw.train()
        if rank() == 0:
            saved = {k: part.state_dict() for k, part in states.items()} | about
            saved |= {"step": step, "best": best, "history": history, "sums": sums}
            saved = tree_map_only(torch.Tensor, torch.Tensor.cpu, saved)  # to be loaded where there is no GPU
            torch.save(saved, content := io.BytesIO())
            written.result()  # of the one before; raises what went wrong with it
            written = writer.submit(lambda: [write_beside(path, content.getbuffer()) for path in paths])
        kept, saved_at = step, time.monotonic()

    log_at, pending, kept, saved_at = step + 1, [], step, time.monotonic()
    with stop_signals() as asked, ThreadPoolExecutor(1) as writer, contextlib.closing(batches):
        written = writer.submit(int)  # nothing yet
        for epoch in range(len(history), s.epochs):
            raw.train()
            loader, end = batches.epoch(epoch, step - epoch * steps), (epoch + 1) * steps
            since, waited = time.perf_counter(), 0.0
            try:
                while step < end:
                    waited -= time.perf_counter()
                    images, targets = next(loader)
                    waited += time.perf_counter()
                    pending.append(trainer.step(images, targets, step, steps, sets.flip))
                    step += 1
                    if step < min(log_at, end) and not (world() == 1 and asked()):
                        continue

                    # The log line: the one place where the device and other processes are waited for.
                    losses, now = torch.stack(pending).tolist(), time.perf_counter()
                    due = rank() == 0 and time.monotonic() - saved_at > 60 * s.save_minutes
                    mine = [asked(), due, (now - since) / world(), waited / world()]
                    stop, due, seconds, waited = map(sum, zip(*from_processes(mine)))
                    for at, loss in enumerate(losses, step - len(losses)):
                        sums[0] += loss  # if it is not finite, the handler below saves nothing
                        if not math.isfinite(loss):
                            raise agreed(f"the loss is {loss} at step {at}; try a lower --lr or --clip 1", 1)
                    sums[1:] = sums[1] + seconds, sums[2] + waited
                    rate, loss = len(losses) / seconds, sum(losses) / len(losses)  # rate: of steps
                    say(
                        f"epoch {epoch + 1}/{s.epochs}  step {step}/{total}  loss {loss:.4f}  "
                        f"lr {lr_at(step - 1, s, steps):.2e}  {rate * s.batch_size:.0f} images/s  "
                        f"data {waited / seconds:.0%}  left {timedelta(seconds=int((total - step) / rate))}"
                    )
                    log_at = step + max(1, min(10 * len(losses), int(LOG_SECONDS * rate)))
                    pending, since, waited = [], now, 0.0
                    if step == end or due or stop:
                        save(last)
                    if stop:
                        written.result()
                        code = 128 + (asked() or signal.SIGTERM)
                        raise agreed(f"stopped after step {step}: the same command goes on from there", code)
            except Exception:  # a worker is gone, say, or, as Gloo tells, another process: keep what is done
                sums[0] = sum((loss.item() for loss in pending), sums[0])
                if step > kept and math.isfinite(sums[0]):
                    save(last)
                raise

            top1, top5 = evaluate(weights, batches, s)
            say(f"epoch {epoch + 1}/{s.epochs}  val top-1 {top1:.2f} %  top-5 {top5:.2f} %")
            bad = set().union(*(part for both in from_processes(batches.bad) for part in both.values()))
            entry = {"epoch": epoch + 1, "step": step, "train_loss": round(sums[0] / steps, 5)}
            entry |= {"val_top1": top1, "val_top5": top5, "lr": lr_at(step - 1, s, steps)}
            entry |= {"images_per_s": round(steps * s.batch_size / sums[1], 1)}
            entry |= {"data_wait": round(sums[2] / sums[1], 4), "undecodable": len(bad)}
            history, improved, best, sums = [*history, entry], top1 > best, max(top1, best), [0.0] * 3
            if rank() == 0:
                write_beside(out / "metrics.jsonl", "\n".join([*map(json.dumps, history), ""]).encode())
            save(*[out / "best.pt"] * improved, last)
        written.result()
    say(f"finished: top-1 {top1:.2f} %, best {best:.2f} %; {out}/ holds the weights and the metrics")
    say(f"to see the aligned labels: python experiments/picture.py {out}/best.pt")


def run(argv):
    s, gpus = parse(argv), torch.cuda.device_count()
    cuda, joined = s.device == "cuda", {"RANK", "LOCAL_RANK", "WORLD_SIZE"} & os.environ.keys()
    if cuda and not gpus:
        raise Ended("--device cuda can't be used here: torch sees no GPU; --device cpu always works")
    if joined:
        try:
            if cuda:
                torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)) % gpus)
            dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
        except (ValueError, RuntimeError) as e:
            line = f"{', '.join(sorted(joined))}: {textwrap.shorten(str(e), 120)}"
            raise Ended(f"can't join a group of processes by {line}; use torchrun, or unset these") from e
    processes = gpus if cuda and not joined else world()
    for first in (True, False):  # the first process of a node may have to download the set
        error = ""
        if first == (os.environ.get("LOCAL_RANK", "0") == "0"):
            try:
                sets = data.open_sets(s.data, s.root, s.seed)
                recipe(s, data.native_size(sets.train), len(sets.train))
                if not s.eval:
                    check(s, len(sets.train), processes)
            except Ended as e:
                error = e.args[0]
        if errors := [*filter(None, from_processes(error))]:
            raise agreed(errors[0])
    if processes > 1 and not joined:  # become torch's launcher of a process for each GPU
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, CPUS // processes)))
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        os.execv(sys.executable, [*launcher, f"--nproc-per-node={processes}", __file__, *argv])
    say("settings: " + "  ".join(f"{k} {v}" for k, v in vars(s).items() if v is not None))
    if not s.eval:
        return train(s, sets, Path(s.out))
    model = build(s, len(sets.classes))
    load_weights(model, read_checkpoint(s.eval), s.eval, sets.classes)
    batches = data.batches(sets, s, slice(None), slice(rank(), None, world()))
    top1, top5 = evaluate(model.to(s.device), batches, s)
    say(f"{s.eval}: top-1 {top1:.2f} %, top-5 {top5:.2f} % of {len(sets.val)} images")


def main(argv=None):
    """Run. Where it does not get to its end, say in one line why."""
    line, status = "", 0
    try:
        run(sys.argv[1:] if argv is None else [str(word) for word in argv])
    except Ended as e:
        line, status = (*e.args, 2)[:2]
    except KeyboardInterrupt:
        line, status = "stopped", 130
    except torch.OutOfMemoryError:
        line, status = "the GPU's memory is too small; --micro-batch 128 takes the same step in parts", 1
    except RuntimeError as e:
        status, reason = 1, textwrap.shorten(str(e), 200)
        if type(e).__module__.startswith(("torch._dynamo", "torch._inductor")):
            line = f"torch.compile failed, --no-compile does without: {reason}"
        elif dist.is_initialized() and ("gloo/" in str(e) or isinstance(e, dist.DistBackendError)):
            line = f"process {rank()} lost another, which may say why: {reason}"
        else:
            raise
    if line:
        data.tell(line if status > 128 else f"error: {line}", "stderr")
    if dist.is_initialized():
        if status:  # to take leave would be to wait for the others, who may wait for this one
            os._exit(status)
        dist.destroy_process_group()
    sys.exit(status)


if __name__ == "__main__":
    main()
