"""What segmentation.py and detection.py share: a backbone's features as levels, a loop that fine-tunes, and
the comparison of starts that both are.
"""

import argparse
import contextlib
import functools
import hashlib
import io
import json
import math
import os
import signal
import statistics
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils._pytree import tree_map_only
from torch.utils.data import DataLoader, Dataset

import runs
import transfer
from runs import data, script

SCRATCH = "from scratch"
STRIDES = (4, 8, 16, 32)  # in pixels, of the levels on a ViT's map
MINUTES = 15  # between checkpoints


# --- A backbone's features, by levels.


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of a map (B, C, H, W)."""

    def forward(self, x):
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class Levels(nn.Module):
    """A backbone's features as a list of maps of growing strides, (B, channels[i], H / strides[i], W / ...).

    Of a Swin its stages, normed as its authors' detectors have them. Of a ViT its one map at four strides, by
    transposed convolutions and pooling: the simple pyramid of ViTDet (Li et al. 2022, arXiv 2203.16527).

    s.init: the checkpoint of the backbone, whose head goes, as nothing would reach it. s.load: whether its
    weights are taken or only its kind. s.backbone: what it is where the file does not tell. Raises Ended.
    """

    def __init__(self, s):
        super().__init__()
        saved = script.read_checkpoint(s.init)
        if not (s.backbone or saved.get("settings", {}).get("model") in script.MODELS):
            raise data.Ended(f"{s.init} does not tell what model it is; give --model, such as deit_small")
        kind = script.parse(["--eval", s.init, *(["--model", s.backbone] if s.backbone else [])])
        script.recipe(kind, 224, 10**6)
        head = next((v for k, v in saved["model"].items() if k in ("head.weight", "head.fc.weight")), [0])
        classes = saved["classes"] if "sums" in saved else [*range(len(head))]
        self.backbone = script.build(kind, len(classes))
        if s.load:
            script.load_weights(self.backbone, saved, s.init, classes, new_head=True)
        self.backbone.head = nn.Identity()
        side = 32 * self.backbone.patch_size
        with torch.no_grad():
            maps = self.backbone.features(torch.zeros(1, 3, side, side))
            if torch.is_tensor(maps):
                scales = [math.log2(self.backbone.patch_size / stride) for stride in STRIDES]
                if scales[0] % 1:
                    raise data.Ended(
                        f"{s.init} has patches of {self.backbone.patch_size} px, no power of two"
                    )
                self.fit = nn.ModuleList(rescale(maps.shape[1], int(steps)) for steps in scales)
            else:
                norms = [ChannelNorm(m.shape[1]) for m in maps[:-1]]
                self.fit = nn.ModuleList([*norms, nn.Identity()])  # the last is normed
            maps = self(torch.zeros(1, 3, side, side))
        self.channels, self.strides = [m.shape[1] for m in maps], [side // m.shape[2] for m in maps]

    def forward(self, images, names=()):
        """names: of each image's random numbers, in training, for stochastic depth."""
        depth = self.backbone.depth
        rand = [data.uniform((depth, 2), *name, "drop path") for name in names]
        maps = self.backbone.features(images, rand=torch.stack(rand).to(images.device) if rand else None)
        maps = [maps] * len(self.fit) if torch.is_tensor(maps) else maps
        return [fit(m) for fit, m in zip(self.fit, maps, strict=True)]


def rescale(dim, steps):
    """A layer that doubles the sides of a map of dim channels so many times, or halves them if negative."""
    layers = [nn.MaxPool2d(2**-steps)] if steps < 0 else []
    for i in range(steps):
        layers += [ChannelNorm(dim >> i), nn.GELU()] if i else []
        layers += [nn.ConvTranspose2d(dim >> i, dim >> i + 1, 2, 2)]
    return nn.Sequential(*layers)


# --- Fine-tuning.


class Drawn(Dataset):
    """What a worker runs. A key is an image's number and a name, which seeds the generator that torchvision's
    transforms draw from. An item is what the transform gives, and the name; or an Ended that was raised."""

    def __init__(self, dataset, transform):
        self.dataset, self.transform = dataset, transform

    def __getitem__(self, key):
        index, name = key
        with torch.random.fork_rng([]):
            torch.manual_seed(data.generator(*name).initial_seed())
            try:
                return *self.transform(*self.dataset[index]), name
            except data.Ended as e:  # which a worker would not raise in one line
                return e


def total(counts):
    """The sum of a tensor over all processes."""
    if script.world() > 1:
        dist.all_reduce(counts)
    return counts


def rate(step, s):
    """The learning rate at a step: up in s.warmup steps; then a tenth at each of s.drops, or a line to 0."""
    left = 0.1 ** sum(step >= at * s.steps for at in s.drops) if s.drops else 1 - step / s.steps
    return s.lr * min(1, (step + 1) / s.warmup) * left


def fit(s, model, transform, sets, score):
    """Train a model, and leave last.pt and result.json, what score(model, sets, s) gives, in s.out. A run
    that was stopped goes on. transform(image, known) makes the two ready to be trained on; model(images,
    known, names), lists with an entry an image, gives (sum, count) of each loss, so that the mean is that of
    all processes. Everything random is a function of the names."""
    out, n, (rank, world) = Path(s.out), len(sets.train), (script.rank(), script.world())
    last, ddp = out / "last.pt", model.to(s.device)
    if world > 1:
        ddp = DDP(model, broadcast_buffers=False)
    optimizer, step = script.optimizer(model, s), 0
    if s.batch_size < world:
        raise script.agreed(f"--tune-batch-size must be at least the {world} processes, got {s.batch_size}")
    if last.exists():
        saved = script.read_checkpoint(last)
        same(saved, s)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        step = saved["step"]
    order = functools.lru_cache(2)(lambda epoch: data.epoch_order(n, s.seed, epoch).tolist())

    def keys(first):
        for at in range(first, s.steps):
            places = range(at * s.batch_size, (at + 1) * s.batch_size)[rank::world]
            yield [(order(place // n)[place % n], (s.seed, "item", place)) for place in places]

    options = {"num_workers": s.workers, "worker_init_fn": data.begin_worker, "collate_fn": list}
    loader = DataLoader(Drawn(sets.train, transform), batch_sampler=keys(step), **options)
    to_device = lambda t: t.to(s.device, non_blocking=True)
    autocast = functools.partial(torch.autocast, s.device, torch.bfloat16, enabled=s.device == "cuda")
    pending, log_at, since, saved_at = [], step + 1, time.perf_counter(), time.monotonic()
    model.train()
    batches = (items for items in loader)  # closed, it ends the workers
    with script.stop_signals() as asked, contextlib.closing(batches):
        for items in batches:
            if errors := [item for item in items if isinstance(item, data.Ended)]:
                raise errors[0]
            images, known, names = zip(*items)
            for group in optimizer.param_groups:
                group["lr"] = rate(step, s)
            with autocast():
                losses = ddp(*tree_map_only(torch.Tensor, to_device, (images, known)), names)
            counts = total(torch.tensor([float(count) for _, count in losses], device=s.device))
            loss = sum(part / count for (part, _), count in zip(losses, counts.clamp(min=1)))
            (loss * world).backward()
            optimizer.step()
            optimizer.zero_grad()
            pending.append(loss.detach())
            step += 1
            if step < min(log_at, s.steps) and not (world == 1 and asked()):
                continue
            mean, now = total(torch.stack(pending)).mean().item(), time.perf_counter()
            due = rank == 0 and time.monotonic() - saved_at > 60 * MINUTES
            mine = [asked(), due, (now - since) / world]
            stop, due, seconds = map(sum, zip(*script.from_processes(mine)))
            if not math.isfinite(mean):
                raise script.agreed(f"the loss is {mean} at step {step}; a lower --lr may help", 1)
            speed, images_per_s = len(pending) / seconds, len(pending) / seconds * s.batch_size
            left = timedelta(seconds=int((s.steps - step) / speed))
            script.say(f"step {step}/{s.steps}  loss {mean:.4f}  {images_per_s:.1f} images/s  left {left}")
            log_at = step + max(1, min(10 * len(pending), int(script.LOG_SECONDS * speed)))
            pending, since = [], now
            if stop or due or step == s.steps:
                saved_at = time.monotonic()
                if rank == 0:
                    states = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
                    torch.save(states | {"settings": vars(s)}, content := io.BytesIO())
                    script.write_beside(last, content.getbuffer())
            if stop:
                line = f"{out}: stopped after step {step}; the same command goes on from there"
                raise script.agreed(line, 128 + (asked() or signal.SIGTERM))
    with torch.no_grad(), autocast():
        found = score(model.eval(), sets, s)
    if rank == 0:
        found = json.dumps({"settings": vars(s), "found": found})
        script.write_beside(out / "result.json", found.encode())


def same(saved, s):
    """Raise Ended where what is kept in s.out is of another run than s."""
    flags = ({k: v for k, v in of.items() if k not in script.FREE} for of in (saved["settings"], vars(s)))
    if odd := script.differ(*flags):
        raise script.agreed(f"{s.out} holds another run: {odd}; give another --runs")


def result(s):
    """What a run that is finished came to, else None."""
    with contextlib.suppress(FileNotFoundError):
        saved = json.loads((Path(s.out) / "result.json").read_bytes())
        same(saved, s)
        return saved["found"]


# --- The experiment that both are.


def arguments(doc):
    """A parser of what both take. What has no default follows from the size, see `compare`."""
    parser, count = runs.arguments(doc, images=2000, passes=5, seeds=None), lambda t: script.number(t, int, 1)
    add = parser.add_argument
    add("--checkpoints", nargs="+", default=[], help="of train.py, to start from; the first is the baseline")
    add("--model", help="what they are where a file does not tell, such as deit_small for DeiT's")
    add("--scenes", type=count, default=300, help="built-in scenes to train on [300]")
    add("--size", dest="tune_size", type=count, help="images' shorter side in pixels, for fine-tuning")
    add("--tune-steps", type=count, help="steps of fine-tuning")
    add("--tune-batch-size", type=count, help="images a step of fine-tuning, of all processes")
    add("--tune-lr", type=float, help="learning rate of fine-tuning")
    add("--workers", type=int, help="processes that read a folder's images, for each one that trains")
    return parser


def parsed(parser):
    """The arguments, after this process has joined torchrun's, if it started this one."""
    args = runs.parsed(parser)
    if any(name.startswith("mixer") for name in args.models):
        raise data.Ended("a Mixer takes images of one size: --models takes a ViT, a Swin or a ConvNeXt here")
    if args.data != "shapes":
        if not args.checkpoints:
            raise data.Ended(f"--data {args.data} asks for --checkpoints FILE ..., backbones to start from")
        args.seeds, args.jobs = args.seeds or 1, 0
    args.seeds = args.seeds or 3
    cores = min(16, script.CPUS // int(os.environ.get("LOCAL_WORLD_SIZE", 1))) * (args.data != "shapes")
    args.workers = cores if args.workers is None else args.workers
    if "RANK" in os.environ:
        if args.device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
        dist.init_process_group("cpu:gloo,cuda:nccl" if args.device == "cuda" else "gloo")
        args.jobs = 0
    return args


@functools.cache
def digest(path):
    """What a checkpoint holds, in a few letters."""
    try:
        return hashlib.blake2b(Path(path).read_bytes(), digest_size=8).hexdigest()
    except OSError as e:
        raise data.Ended(f"{path} can't be read: {e.strerror}; --checkpoints takes files of train.py") from e


def compare(args, name, tune, sets, recipe, measures):
    """Fine-tune from each start with each seed, tune(s, sets(seed)) being one run. Returns what `runs.write`
    wants and the settings of all runs, {(model, start, seed): s}. recipe: settings that are not given.
    measures: what to show of results, {key: title}; the first is held against the baseline, seed by seed."""
    if args.checkpoints:
        ways, models, base = args.checkpoints, [""], args.checkpoints[0]
        starts = {("", path, seed): path for path in ways for seed in range(args.seeds)}
    else:
        ways, models, base = (SCRATCH, *transfer.TRAINED), args.models, transfer.TRAINED[0]
        starts = {key: f"{s.out}/last.pt" for key, s in transfer.pretrain(args)[0].items()}
        starts |= {(model, SCRATCH, seed): path for (model, _, seed), path in starts.items()}
    given = {k[5:]: v for k, v in vars(args).items() if k.startswith("tune_") and v is not None}
    about = "".join(f"-{k}{v}" for k, v in given.items())
    folder = f"{args.runs}/{Path(args.data).absolute().name}-{name}-{len(sets(0).train)}{about}"
    tuned = {}
    for (model, start, seed), path in starts.items():
        s = argparse.Namespace(**(recipe | given), init=path, load=start != SCRATCH, backbone=args.model)
        run = f"{model}-{start}-{seed}".strip("-").replace("/", "-").replace(" ", "-")
        vars(s).update(seed=seed, device=args.device, workers=args.workers, out=f"{folder}/{run}", eval=None)
        s.digest, s.classes = digest(path), sets(0).classes
        s.images = [len(sets(seed).train), len(sets(seed).val)]
        tuned[model, start, seed] = s
    todo = [(s, sets(s.seed)) for s in tuned.values() if not result(s)]
    first, sets = next(iter(measures)), sets(0)
    runs.side_by_side(tune, todo, args, len(tuned), lambda s: f"{measures[first]} {result(s)[first]:.2f}")

    head = ["model", "start", *measures.values(), f"difference to {base}", "of seed 0 alone"]
    rows, panels = [], []
    for model in models:
        found = {way: [result(tuned[model, way, seed]) for seed in range(args.seeds)] for way in ways}
        points = []
        for way, results in found.items():
            means = [f"{statistics.fmean(r[key] for r in results):.2f}" for key in measures]
            gains = [a[first] - b[first] for a, b in zip(results, found[base])]
            told = ["", ""] if way == base else [runs.signed(gains), f"{gains[0]:+.2f}"]
            rows.append([model, way, *means, *told])
            mean, half = runs.interval([r[first] for r in results])
            points.append((mean, mean - half, mean + half))
        panels.append((model, [*ways], {"mean over seeds and its 95 % interval": points}))
    text = f"\n{s.steps} steps of {s.batch_size} of {len(sets.train)} images; {len(sets.val)} to validate; "
    text += f"seeds 0 to {args.seeds - 1}, ± is half the 95 % interval over them.\n"
    text = runs.table(head, rows) + text
    return text, runs.chart(panels, measures[first], joined=False), tuned


def write(args, name, compared, sets, draw):
    """Print and leave the table and the chart, and NAME.png of the first seed's models of the first kind, of
    which draw(settings, sets) gives the bytes. compared: as `compare` returns it."""
    text, chart, tuned = compared
    if script.rank() == 0:
        runs.write(args, name, text, chart)
        kind = next(iter(tuned))[0]
        first = {start: s for (model, start, seed), s in tuned.items() if (model, seed) == (kind, 0)}
        script.write_beside(Path(args.runs) / f"{name}.png", draw(first.values(), sets(0)))
        print(f"some images, what is true, and what is found: {', '.join(first)}: {args.runs}/{name}.png")
    if script.world() > 1:
        dist.destroy_process_group()  # left to the end of the process, its threads may abort it
