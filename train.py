"""Train a vision transformer with token-label alignment.

    python train.py                                          # a micro model on built-in images, a minute
    python train.py --data cifar10                           # a set that torchvision knows
    python train.py --data /imagenet --model deit_small      # the paper's recipe, nothing else to say
    python train.py --data /imagenet --model swin_tiny --targets area      # the CutMix baseline
    python train.py --eval runs/shapes-vit_micro-cutmix-tl_align/best.pt

Settings that are not given fit the data and the model, and are printed at the start. A run's folder
holds last.pt, best.pt, metrics.jsonl, config.json and alignment.png; the same command continues a run
that was stopped, from its last epoch. `python train.py --help` lists all settings.
"""

import argparse
import dataclasses
import difflib
import json
import math
import os
import pickle
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torchvision.utils import draw_bounding_boxes, save_image

import data
import swin
import tl_align
import vit
from data import InputError, uniform

MODELS = {
    make.__name__: make
    for make in (
        vit.vit_micro,
        vit.deit_tiny,
        vit.deit_small,
        vit.deit_base,
        swin.swin_micro,
        swin.swin_tiny,
        swin.swin_small,
        swin.swin_base,
    )
}

# ---------------------------------------------------------------------------------------------------
# Settings: the command line is made from them. None stands for what `recipe` finds fitting.


def option(default, help, choices=None, low=None, below=math.inf):
    """A setting with its line of help, and what it may be: one of choices, or from low to below."""
    limits = {"help": help, "choices": choices, "low": low, "below": below}
    return dataclasses.field(default=default, metadata=limits)


@dataclass
class Settings:
    data: str = option("shapes", "shapes, a torchvision set (cifar10, ...), or a folder with train/ and val/")
    root: str = option("data", "folder that torchvision's sets are downloaded to")
    model: str = option("vit_micro", "which model", [*MODELS])
    mix: str = option("cutmix", "how two images are mixed", ["cutmix", "mixup", "none"])
    targets: str = option("tl_align", "how the label of a mix is set", ["tl_align", "area", "transmix"])
    img_size: int = option(None, "side of the images in pixels", low=1)
    patch_size: int = option(None, "side of a patch in pixels", low=1)
    epochs: int = option(None, "passes over the training set", low=1)
    batch_size: int = option(None, "images a step, whatever the number of processes", low=1)
    lr: float = option(None, "learning rate at its peak", low=1e-12)
    warmup: float = option(None, "epochs in which the learning rate rises", low=0)
    weight_decay: float = option(0.05, "AdamW's decay of weight matrices", low=0)
    clip: float = option(None, "largest norm of the gradient, 0 for any", low=0)
    smoothing: float = option(0.1, "label smoothing", low=0, below=1)
    drop_path: float = option(None, "rate of stochastic depth in the last block", low=0, below=1)
    augment: str = option(None, "light: crop and flip; full: RandAugment and erasing too", ["light", "full"])
    repeats: int = option(None, "crops of an image in a batch (repeated augmentation)", low=1)
    seed: int = option(0, "all randomness is a function of it", low=0, below=2**63)
    workers: int = option(None, "processes that decode images", low=0)
    device: str = option(None, "cpu, cuda or cuda:N; the first GPU if there is one")
    bf16: bool = option(None, "compute in bfloat16 (autocast); the default on CUDA")
    compile: bool = option(None, "use torch.compile; the default on CUDA")
    log_every: int = option(50, "steps between two lines of the log", low=1)
    out: str = option(None, "folder of the run")
    resume: bool = option(True, "continue the run in that folder; --no-resume starts it over")
    init: str = option(None, "checkpoint to start from: ours, DeiT's, timm's ViT or Microsoft's Swin")
    eval: str = option(None, "checkpoint to evaluate instead of training; its settings are the defaults")


# A run that is continued may differ in these alone.
FREE = ("root", "workers", "device", "compile", "log_every", "out", "resume", "eval")


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
        value, choices, low, below = (
            given.get(f.name),
            *(f.metadata[k] for k in ("choices", "low", "below")),
        )
        if value is not None and choices and value not in choices:
            hint = did_you_mean(value, choices)
            raise InputError(f"{flag} knows no {value!r}{hint}; it is one of {', '.join(choices)}")
        if value is not None and low is not None and not low <= value < below:
            upper = "finite" if below == math.inf else f"below {below}"
            raise InputError(f"{flag} must be at least {low} and {upper}, got {value}")
    if "eval" in given:
        saved = read_checkpoint(given["eval"]).get("settings", {})
        given = {k: v for k, v in saved.items() if k not in FREE} | given
    return Settings(**given)


def did_you_mean(word, words):
    near = difflib.get_close_matches(word, words)
    return f", did you mean {' or '.join(near)}?" if near else ""


def recipe(s, sets):
    """Fill in what was not given. Large images get the paper's recipe, or Swin's own with Swin; small
    ones what trains small models well. Returns the complete Settings."""
    swin_like, micro = s.model.startswith("swin"), s.model.endswith("micro")
    size = s.img_size or data.native_size(sets.train)
    large = size > data.SMALL
    epochs = s.epochs or (4 if s.data == "shapes" else 300 if large else 100)
    batch_size = s.batch_size or (64 if s.data == "shapes" else 1024 if large else 128)
    batch_size = s.batch_size or min(batch_size, len(sets.train) // 2 * 2)
    rate = {"swin_tiny": 0.2, "swin_small": 0.3, "swin_base": 0.5}.get(s.model, 0.0 if micro else 0.1)
    cuda = torch.cuda.is_available() if s.device is None else s.device.startswith("cuda")
    fitting = {
        "img_size": size,
        "patch_size": (4 if swin_like else 16) if large else (2 if swin_like else 4),
        "epochs": epochs,
        "batch_size": batch_size,
        "lr": 5e-4 * batch_size / 512 if large else 3e-3 if micro else 1e-3 * batch_size / 128,
        "warmup": min(20 if swin_like else 5, epochs / 10),
        "clip": 5.0 if swin_like else 0.0,
        "drop_path": rate,
        "augment": "full" if large else "light",
        "repeats": 3 if large and not swin_like else 1,
        "workers": min(os.cpu_count() or 1, 16),
        "device": "cuda" if cuda else "cpu",
        "bf16": cuda,
        "compile": cuda,
        "out": f"runs/{Path(s.data).name}-{s.model}-{s.mix}-{s.targets}",
    }
    return dataclasses.replace(s, **{k: v for k, v in fitting.items() if getattr(s, k) is None})


def check(s, sets):
    """What only shows when settings and data are known. Raises InputError."""
    try:
        device = torch.device(s.device)
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError("it is neither cpu nor cuda")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as e:
        raise InputError(
            f"--device {s.device} can't be used here: {str(e).splitlines()[0]}; --device cpu always works"
        ) from e
    if s.eval:
        return
    if len(sets.train) < 2:
        raise InputError(f"{s.data} has {len(sets.train)} training image; at least two are needed")
    if s.repeats > 1 and s.img_size <= data.SMALL:
        raise InputError(f"--repeats is for images above {data.SMALL} px, not for sets held in memory")
    if s.mix != "none" and s.batch_size % 2:
        raise InputError(f"--batch-size must be even, for images are mixed two by two; got {s.batch_size}")
    if s.batch_size > len(sets.train):
        raise InputError(f"--batch-size {s.batch_size} is more than the {len(sets.train)} training images")
    if s.targets == "transmix" and s.model.startswith("swin"):
        raise InputError(
            "--targets transmix needs a class token and Swin has none; "
            "take a ViT (vit_micro, deit_tiny, ...) or --targets tl_align"
        )


def build(s, classes):
    small = {"window": 4} if s.model.startswith("swin") and s.img_size <= data.SMALL else {}
    try:
        return MODELS[s.model](
            img_size=s.img_size, patch_size=s.patch_size, num_classes=classes, drop_path=s.drop_path, **small
        )
    except ValueError as e:
        raise InputError(f"--img-size does not fit {s.model}: {e}") from e


# ---------------------------------------------------------------------------------------------------
# Checkpoints.


def read_checkpoint(path):
    """A checkpoint as a dict with "model", the raw state dict. Nothing in the file is run. Raises
    InputError where the file is missing, damaged or no checkpoint."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as e:
        raise InputError(f"there is no checkpoint {path}") from e
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, ValueError, KeyError) as e:
        reason = str(e).split("\n")[0][:100] or "it ends too early"
        raise InputError(f"{path} is no checkpoint, or a damaged one: {reason}") from e
    if isinstance(saved, dict) and "model" not in saved and all(torch.is_tensor(v) for v in saved.values()):
        saved = {"model": saved}  # timm's files are the state dict itself
    if not isinstance(saved, dict) or not isinstance(saved.get("model"), dict):
        raise InputError(f"{path} holds no model: expected a state dict, or a dict with one as 'model'")
    return saved


def write_beside(path, write):
    """A file is whole or it is not there: written under another name and renamed over."""
    beside = path.with_name(path.name + ".tmp")
    write(beside)
    os.replace(beside, path)


def load_weights(model, path, new_head=False):
    """Load a checkpoint into a model of the same kind. new_head: keep the model's own head where the
    file's is for another number of classes. Raises InputError where anything else differs."""
    state = model.adapt(read_checkpoint(path)["model"])
    own = model.state_dict()
    if new_head and "head.weight" in state and state["head.weight"].shape != own["head.weight"].shape:
        print(f"{path}: the head is for {len(state['head.weight'])} classes, a new one is trained")
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
    if step < warmup:
        return (start := min(1e-6, s.lr)) + (s.lr - start) * step / warmup
    final = min(1e-5, s.lr)
    return final + (s.lr - final) * (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) / 2


def optimizer(model, s):
    """AdamW. Only matrices decay: not biases, norms, tokens, position embeddings or bias tables."""
    decay, rest = [], []
    for name, p in model.named_parameters():
        spared = p.dim() < 2 or name.endswith(("_token", "pos_embed", "bias_table"))
        (rest if spared else decay).append(p)
    groups = [{"params": decay}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=s.lr, weight_decay=s.weight_decay)


def loss_of(model, images, targets, s, step, depth):
    """Mix a batch, run the model, and take the loss for the target that `--targets` names.

    images: (B, 3, S, S), normalised. targets: (B,). Returns a scalar.
    """
    n, size, device = len(images), images.shape[-2:], images.device
    rand = uniform((n, depth, 2), s.seed, "drop", step, device=device) if s.drop_path else None
    if s.mix == "none":
        return F.cross_entropy(model(images, rand=rand), targets, label_smoothing=s.smoothing)
    at = uniform((n, 3), s.seed, "mix", step, device=device)
    cutmix = s.mix == "cutmix"
    mask = tl_align.cutmix_mask(at, size, s.patch_size) if cutmix else tl_align.mixup_mask(at, size)
    mixed = tl_align.mix(images, mask)
    if s.targets == "area":
        logits, share = model(mixed, rand=rand), mask.mean((2, 3))
    else:
        transmix = {"transmix": True} if s.targets == "transmix" else {}
        labels = tl_align.token_labels(mask, s.patch_size)
        logits, share = model(mixed, labels, rand=rand, **transmix)
    return tl_align.mixed_cross_entropy(logits, targets, share, s.smoothing)


@torch.no_grad()
def evaluate(model, batches, s):
    """Top-1 and top-5 accuracy in percent."""
    model.eval()
    hits, total = 0, 0
    for images, targets in batches.whole():
        with torch.autocast(images.device.type, torch.bfloat16, enabled=s.bf16):
            logits = model(data.normalize(images))
        top = logits.topk(min(5, logits.shape[1])).indices == targets[:, None]  # (B, 5)
        hits = hits + torch.stack([top[:, 0].sum(), top.sum()])  # stays on the device
        total += len(targets)
    return [round(100 * h / total, 3) for h in hits.tolist()]


class Meter:
    """The losses and times of an epoch. Losses stay on the device until a log line reads them, so
    that nothing waits for the device between two lines."""

    def __init__(self, step, batch_size):
        self.step, self.batch_size = step, batch_size
        self.pending, self.losses = [], []
        self.waited, self.began = 0.0, time.perf_counter()
        self.last = (self.began, 0.0)  # when the last line was written, and the wait until then

    def waiting(self, batches):
        """The batches, and how long each was waited for."""
        batches = iter(batches)
        while True:
            asked = time.perf_counter()
            batch = next(batches, None)
            self.waited += time.perf_counter() - asked
            if batch is None:
                return
            yield batch

    def read(self):
        """Mean loss, images/s and the share of time that waited for data, since the last call. A loss
        that is not finite ends the run."""
        losses = torch.stack(self.pending).tolist()
        for i, loss in enumerate(losses):
            if not math.isfinite(loss):
                raise SystemExit(
                    f"the loss is {loss} at step {self.step + i}: the run ends here, its last "
                    "checkpoint is as it was; a lower --lr or --clip 1 may help"
                )
        self.losses += losses
        self.step += len(losses)
        self.pending = []
        now, (then, waited) = time.perf_counter(), self.last
        self.last = (now, self.waited)
        rate = len(losses) * self.batch_size / (now - then)
        return sum(losses) / len(losses), rate, (self.waited - waited) / (now - then)

    def epoch(self):
        """The same three of the whole epoch."""
        seconds = self.last[0] - self.began
        rate = len(self.losses) * self.batch_size / seconds
        return sum(self.losses) / len(self.losses), rate, self.waited / seconds


def train(s, sets, out):
    device = torch.device(s.device)
    torch.manual_seed(s.seed)
    raw = build(s, len(sets.classes))
    raw.to(device)
    opt = optimizer(raw, s)

    # Everything random is a function of the seed and the step, so weights, optimizer and the number
    # of epochs are all that it takes to go on.
    first, best, history = 0, -1.0, []
    if s.resume and (out / "last.pt").exists():
        saved = read_checkpoint(out / "last.pt")
        if "settings" not in saved:
            raise InputError(f"{out}/last.pt is not of a run of this script; give another --out")
        check_same_run(s, saved["settings"], out)
        first, best, history = saved["epoch"], saved["best"], saved["history"]
        if first == s.epochs:
            print(
                f"{out} is finished: {first} epochs, top-1 {history[-1]['val_top1']:.2f} %, best {best:.2f} %"
            )
            return
        raw.load_state_dict(saved["model"])
        opt.load_state_dict(saved["optimizer"])
        print(f"{out}: going on after epoch {first} of {s.epochs}")
    elif s.init:
        load_weights(raw, s.init, new_head=True)
    try:
        out.mkdir(parents=True, exist_ok=True)
        if not s.resume:
            (out / "last.pt").unlink(missing_ok=True)
        config = json.dumps(dataclasses.asdict(s), indent=2) + "\n"
        write_beside(out / "config.json", lambda path: path.write_text(config))
    except OSError as e:
        raise InputError(f"--out {out} cannot be written: {e.strerror}") from e

    batches, val = (
        data.load(part, s.img_size, s.batch_size, s.seed, device, s.workers, repeats)
        for part, repeats in ((sets.train, s.repeats), (sets.val, 1))
    )
    model = torch.compile(raw) if s.compile else raw  # raw keeps the official parameter names
    steps, parameters = batches.steps, sum(p.numel() for p in raw.parameters())
    print(
        f"{len(sets.train)} training images, {len(sets.val)} to validate, {len(sets.classes)} classes; "
        f"{parameters / 1e6:.1f} M parameters; {steps} steps an epoch",
        flush=True,
    )

    step, total = first * steps, s.epochs * steps
    for epoch in range(first, s.epochs):
        raw.train()
        meter = Meter(step, s.batch_size)
        for images, targets in meter.waiting(batches.epoch(epoch)):
            lr = lr_at(step, s, steps)
            for group in opt.param_groups:
                group["lr"] = lr
            rand = uniform((s.batch_size, 16), s.seed, "augment", step)
            images = data.augment(images, rand, sets.flip, s.augment == "full")
            with torch.autocast(device.type, torch.bfloat16, enabled=s.bf16):
                loss = loss_of(model, images, targets, s, step, raw.depth)
            opt.zero_grad()
            loss.backward()
            if s.clip:
                torch.nn.utils.clip_grad_norm_(raw.parameters(), s.clip)
            opt.step()
            step += 1
            meter.pending.append(loss.detach())
            if step % s.log_every == 0 or step % steps == 0:
                mean, rate, wait = meter.read()
                left = (total - step) * s.batch_size / rate
                print(
                    f"epoch {epoch + 1}/{s.epochs}  step {step}/{total}  loss {mean:.4f}  lr {lr:.2e}  "
                    f"{rate:.0f} images/s  data {wait:.0%}  left {clock(left)}",
                    flush=True,
                )

        top1, top5 = evaluate(raw, val, s)
        mean, rate, wait = meter.epoch()
        print(f"epoch {epoch + 1}/{s.epochs}  val top-1 {top1:.2f} %  top-5 {top5:.2f} %", flush=True)
        history.append(
            {
                "epoch": epoch + 1,
                "step": step,
                "train_loss": round(mean, 5),
                "val_top1": top1,
                "val_top5": top5,
                "lr": lr,
                "images_per_s": round(rate, 1),
                "data_wait": round(wait, 4),
                "undecodable": len(batches.bad | val.bad),
            }
        )
        improved, best = top1 > best, max(top1, best)
        saved = {
            "model": raw.state_dict(),
            "optimizer": opt.state_dict(),
            "epoch": epoch + 1,
            "best": best,
            "history": history,
            "settings": dataclasses.asdict(s),
        }
        lines = "".join(json.dumps(line) + "\n" for line in history)
        write_beside(out / "metrics.jsonl", lambda path: path.write_text(lines))
        if improved:
            write_beside(out / "best.pt", lambda path: torch.save(saved, path))
        if epoch + 1 == s.epochs:
            draw(raw, sets.val, s, out / "alignment.png")
        write_beside(out / "last.pt", lambda path: torch.save(saved, path))  # last: it says what is done

    print(
        f"finished: top-1 {top1:.2f} %, best {best:.2f} %; {out}/ holds the weights, the metrics and a "
        "picture of the aligned labels"
    )


def check_same_run(s, saved, out):
    for k, v in saved.items():
        if k not in FREE and getattr(s, k) != v:
            raise InputError(
                f"{out} holds a run with --{k.replace('_', '-')} {v}, not {getattr(s, k)}; give "
                "another --out, or --no-resume to start over"
            )


def clock(seconds):
    return f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02}:{int(seconds) % 60:02}"


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
    images = torch.cat([crops[i, ()][0] for i in chosen]).float()
    at = uniform((len(images), 3), "picture") * 0.5 + 0.25  # boxes of middling size, not at the border
    mask = tl_align.cutmix_mask(at, images.shape[-2:], s.patch_size)
    mixed = tl_align.mix(images, mask)
    device = next(model.parameters()).device
    labels = tl_align.token_labels(mask, s.patch_size)
    layers = model.layer_labels(data.normalize(mixed).to(device), labels.to(device))

    colours = torch.tensor([OWN, PARTNER])[:, :, None, None] * 255

    def paint(share):  # (B, 1, H, W) in [0, 1]
        return torch.lerp(colours[0], colours[1], share.cpu())

    columns = [("mixed image", mixed, None), ("pasted area", paint(mask), mask.mean((1, 2, 3)))]
    for depth in torch.linspace(1, len(layers) - 1, min(most, len(layers) - 1)).long().tolist():
        share, read = layers[depth]
        title = f"layer {depth}" if depth < len(layers) - 1 else "aligned"
        columns.append((title, paint(rearrange(share, "b h w 1 -> b 1 h w")), read[:, 0]))
    height, width = CELL + CAPTION, CELL + GAP
    canvas = torch.full((3, rows * (height + GAP), len(columns) * width), 255, dtype=torch.uint8)
    boxes, captions = [], []
    for row in range(rows):
        for column, (title, pictures, read) in enumerate(columns):
            top, left = row * (height + GAP), column * width
            mode = "nearest" if pictures.shape[-1] <= CELL else "area"
            cell = F.interpolate(pictures[2 * row, None], (CELL, CELL), mode=mode)[0]
            canvas[:, top + CAPTION : top + height, left : left + CELL] = cell.to(torch.uint8)
            boxes.append([left, top, left + CELL - 1, top + height - 1])
            captions.append(title if read is None else f"{title}: {read[2 * row].item():.2f}")
    canvas = draw_bounding_boxes(canvas, torch.tensor(boxes), captions, "black")
    write_beside(path, lambda beside: save_image(canvas / 255, beside, format="png"))


def main(argv=None):
    try:
        s = parse(sys.argv[1:] if argv is None else argv)
        sets = data.open_sets(s.data, s.root, s.seed)
        s = recipe(s, sets)
        check(s, sets)
        given = "  ".join(f"{k} {v}" for k, v in dataclasses.asdict(s).items() if v is not None)
        print(f"settings: {given}")
        if s.eval:
            model = build(s, len(sets.classes))
            load_weights(model, s.eval)
            val = data.load(sets.val, s.img_size, s.batch_size, s.seed, s.device, s.workers)
            top1, top5 = evaluate(model.to(s.device), val, s)
            print(f"{s.eval}: top-1 {top1:.2f} %, top-5 {top5:.2f} % of {len(sets.val)} images")
        else:
            train(s, sets, Path(s.out))
    except InputError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
