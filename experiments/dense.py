"""What segmentation.py and detection.py share: a backbone's features as levels, a loop that
fine-tunes, and the comparison of starts that both are.
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
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from einops import rearrange
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils._pytree import tree_map_only
from torch.utils.data import DataLoader, Dataset

import runs
import swin
import transfer
import vit
from runs import data, script

SCRATCH = "from scratch"
STRIDES = (4, 8, 16, 32)  # in pixels, of the levels on a ViT's map
MINUTES = 15  # between checkpoints
LOG_INTERVAL = 20  # steps between two lines of the log


# --- A backbone's features.


def features(model, images, rand=None):
    """A model's tokens as maps (B, C, H, W), for dense prediction.

    Of a ViT the last map, with the final norm. Of a Swin and a ConvNeXt a list, the map at the end
    of each stage, of which the last has the final norm.

    images: (B, 3, H, W), of any sides that patches tile. rand: (B, depth, 2), for drop path, or
    None. Raises ValueError if patches do not tile the images.
    """
    rand = [(None, None)] * model.depth if rand is None else rand.permute(1, 2, 0)  # (depth, 2, B)
    if isinstance(model, vit.ViT):
        return vit_features(model, images, rand)
    if isinstance(model, swin.Swin):
        return swin_features(model, images, rand)
    return convnext_features(model, images, rand)


def vit_features(model, images, rand):
    """Position embeddings are resized to the images. Returns (B, dim, H / patch, W / patch)."""
    p = model.patch_size
    if images.dim() != 4 or images.shape[1] != 3 or images.shape[2] % p or images.shape[3] % p:
        expected = f"(B, 3, H, W) with sides that are multiples of {p}"
        raise ValueError(f"images must be {expected}, got {tuple(images.shape)}")
    height, width = images.shape[2] // p, images.shape[3] // p
    x = rearrange(model.patch_embed(images), "b d h w -> b (h w) d")
    x = torch.cat([model.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
    x = x + vit.interpolate_pos_embed(model.pos_embed, (height, width))
    for block, block_rand in zip(model.blocks, rand, strict=True):
        x, _ = block(x, None, block_rand)
    return rearrange(model.norm(x)[:, 1:], "b (h w) d -> b d h w", h=height)


def swin_features(model, images, rand):
    x, _ = model.embed(images)
    maps, block_rand = [], iter(rand)
    for stage in model.layers:
        for block in stage.blocks:
            x, _ = block(x, None, next(block_rand))
        maps.append(x)
        if stage.downsample is not None:
            x, _ = stage.downsample(x)
    maps[-1] = model.norm(x)
    return [rearrange(m, "b h w c -> b c h w") for m in maps]


def convnext_features(model, images, rand):
    x, _ = model.embed(images)
    maps, block_rand = [], iter(rand)
    for i, stage in enumerate(model.stages):
        if i > 0:
            x, _ = model.downsample_layers[i](x)
        for block in stage:
            x, _ = block(x, None, next(block_rand)[0])
        maps.append(x)
    maps[-1] = model.norm(x)
    return [rearrange(m, "b h w c -> b c h w") for m in maps]


# --- The features, by levels.


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of a map (B, C, H, W)."""

    def forward(self, x):
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class Levels(nn.Module):
    """A backbone's features as a list of maps of growing strides, (B, channels[i], H / strides[i],
    W / ...).

    Of a Swin its stages, normed as its authors' detectors have them. Of a ViT its one map at four
    strides, by transposed convolutions and pooling: the simple pyramid of ViTDet (Li et al. 2022,
    arXiv 2203.16527).

    s.init: the checkpoint of the backbone, whose head goes, as nothing would reach it. s.load:
    whether its weights are taken or only its kind. s.backbone: what it is where the file does not
    tell. Raises UserError.
    """

    def __init__(self, s):
        super().__init__()
        saved = script.load_checkpoint(s.init)
        if not (s.backbone or runs.args_of(saved).get("model") in script.MODELS):
            raise data.UserError(
                f"{s.init} does not tell what model it is; give --model, such as deit_small"
            )
        flags = ["--eval", s.init, "--seed", str(s.seed)]
        kind = script.parse_args([*flags, *(["--model", s.backbone] if s.backbone else [])])
        script.fill_defaults(kind, 224, 10**6)
        head = next(
            (v for k, v in saved["model"].items() if k in ("head.weight", "head.fc.weight")), [0]
        )
        classes = saved["classes"] if saved.get("format") == script.FORMAT else [*range(len(head))]
        self.backbone = script.build_model(kind, len(classes))
        if s.load:
            script.load_weights(self.backbone, s.init, classes, new_head=True)
        self.backbone.head = nn.Identity()
        side = 32 * self.backbone.patch_size
        with torch.no_grad():
            maps = features(self.backbone, torch.zeros(1, 3, side, side))
            if torch.is_tensor(maps):
                scales = [math.log2(self.backbone.patch_size / stride) for stride in STRIDES]
                if scales[0] % 1:
                    raise data.UserError(
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
        maps = features(
            self.backbone, images, torch.stack(rand).to(images.device) if rand else None
        )
        maps = [maps] * len(self.fit) if torch.is_tensor(maps) else maps
        return [fit(m) for fit, m in zip(self.fit, maps, strict=True)]


def rescale(dim, steps):
    """A layer that doubles the sides of a map of dim channels so many times, or halves them if
    negative."""
    layers = [nn.MaxPool2d(2**-steps)] if steps < 0 else []
    for i in range(steps):
        layers += [ChannelNorm(dim >> i), nn.GELU()] if i else []
        layers += [nn.ConvTranspose2d(dim >> i, dim >> i + 1, 2, 2)]
    return nn.Sequential(*layers)


# --- Fine-tuning.


class Drawn(Dataset):
    """What a worker runs. A key is an image's number and a name, which seeds the generator that
    torchvision's transforms draw from. An item is what the transform gives, and the name; or a
    UserError that was raised."""

    def __init__(self, dataset, transform):
        self.dataset, self.transform = dataset, transform

    def __getitem__(self, key):
        index, name = key
        with torch.random.fork_rng([]):
            torch.manual_seed(data.generator(*name).initial_seed())
            try:
                return *self.transform(*self.dataset[index]), name
            except data.UserError as e:  # which a worker would not raise in one line
                return e


def total(counts):
    """The sum of a tensor over all processes."""
    if script.get_world_size() > 1:
        dist.all_reduce(counts)
    return counts


def gather(thing):
    """What each process gives, as a list."""
    things = [thing] * script.get_world_size()
    if script.get_world_size() > 1:
        dist.all_gather_object(things, thing)
    return things


def rate(step, s):
    """The learning rate at a step: up in s.warmup steps; then a tenth at each of s.drops, or a line
    to 0."""
    left = 0.1 ** sum(step >= at * s.steps for at in s.drops) if s.drops else 1 - step / s.steps
    return s.lr * min(1, (step + 1) / s.warmup) * left


def fit(s, model, transform, sets, score):
    """Train a model, and leave last.pt and result.json, what score(model, sets, s) gives, in s.out.
    A run that was stopped goes on. transform(image, known) makes the two ready to be trained on;
    model(images, known, names), lists with an entry an image, gives (sum, count) of each loss, so
    that the mean is that of all processes. Everything random is a function of the names."""
    out, n, (rank, world) = (
        Path(s.out),
        len(sets.train),
        (script.get_rank(), script.get_world_size()),
    )
    last, ddp = out / "last.pt", model.to(s.device)
    if world > 1:
        ddp = DDP(model)
    optimizer, step = script.make_optimizer(model, s), 0
    if s.batch_size < world:
        raise data.UserError(
            f"--tune-batch-size must be at least the {world} processes, got {s.batch_size}"
        )
    if last.exists():
        saved = script.load_checkpoint(last)
        same(saved, s)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        step = saved["step"]
    order = functools.lru_cache(2)(lambda epoch: data.epoch_order(n, s.seed, epoch).tolist())

    def keys(first):
        for at in range(first, s.steps):
            places = range(at * s.batch_size, (at + 1) * s.batch_size)[rank::world]
            yield [(order(place // n)[place % n], (s.seed, "item", place)) for place in places]

    options = {"num_workers": s.workers, "worker_init_fn": data.ignore_signals, "collate_fn": list}
    loader = DataLoader(Drawn(sets.train, transform), batch_sampler=keys(step), **options)

    def to_device(t):
        return t.to(s.device, non_blocking=True)

    autocast = functools.partial(
        torch.autocast, s.device, torch.bfloat16, enabled=s.device == "cuda"
    )
    pending, since, saved_at = [], time.perf_counter(), time.monotonic()
    model.train()
    batches = (items for items in loader)  # closed, it ends the workers
    with script.StopRequest() as stop, contextlib.closing(batches):
        for items in batches:
            for item in items:
                if isinstance(item, data.UserError):
                    raise item
            images, known, names = zip(*items, strict=False)
            for group in optimizer.param_groups:
                group["lr"] = rate(step, s)
            with autocast():
                losses = ddp(*tree_map_only(torch.Tensor, to_device, (images, known)), names)
            counts = total(torch.tensor([float(count) for _, count in losses], device=s.device))
            loss = sum(
                part / count for (part, _), count in zip(losses, counts.clamp(min=1), strict=False)
            )
            (loss * world).backward()
            optimizer.step()
            optimizer.zero_grad()
            pending.append(loss.detach())
            step += 1
            stopping = script.any_process(stop.signal != 0)
            if step % LOG_INTERVAL and step < s.steps and not stopping:
                continue
            mean, now = total(torch.stack(pending)).mean().item(), time.perf_counter()
            due = script.any_process(time.monotonic() - saved_at > 60 * MINUTES)
            if not math.isfinite(mean):
                raise data.UserError(f"the loss is {mean} at step {step}; a lower --lr may help")
            speed = len(pending) / (now - since)
            images_per_s = speed * s.batch_size
            left = timedelta(seconds=int((s.steps - step) / speed))
            script.print0(
                f"step {step}/{s.steps}  loss {mean:.4f}  {images_per_s:.1f} images/s  left {left}"
            )
            pending, since = [], now
            if stopping or due or step == s.steps:
                saved_at = time.monotonic()
                if rank == 0:
                    states = {
                        "model": model.state_dict(),
                        "optimizer": optimizer.state_dict(),
                        "step": step,
                    }
                    torch.save(states | {"args": vars(s)}, content := io.BytesIO())
                    runs.write_bytes(last, content.getbuffer())
            if stopping:
                script.print0(
                    f"{out}: stopped after step {step}; the same command goes on from there"
                )
                sys.exit(128 + (stop.signal or signal.SIGTERM))
    with torch.no_grad(), autocast():
        found = score(model.eval(), sets, s)
    if rank == 0:
        script.write_text(out / "result.json", json.dumps({"args": vars(s), "found": found}))


def same(saved, s):
    """Raise UserError where what is kept in s.out is of another run than s."""
    there, here = saved["args"], vars(s)
    odd = [
        f"{name} is {there.get(name, 'missing')} there, {here.get(name, 'missing')} here"
        for name in {**here, **there}
        if name not in script.RESUMABLE_ARGS and there.get(name) != here.get(name)
    ]
    if odd:
        raise data.UserError(f"{s.out} holds another run: {', '.join(odd)}; give another --runs")


def result(s):
    """What a run that is finished came to, else None."""
    with contextlib.suppress(FileNotFoundError):
        saved = json.loads((Path(s.out) / "result.json").read_bytes())
        same(saved, s)
        return saved["found"]


# --- The experiment that both are.


def arguments(doc):
    """A parser of what both take. What has no default follows from the size, see `compare`."""
    parser = runs.arguments(doc, images=2000, passes=5, seeds=None)
    add = parser.add_argument
    add(
        "--checkpoints",
        nargs="+",
        default=[],
        help="of train.py, to start from; the first is the baseline",
    )
    add("--model", help="what they are where a file does not tell, such as deit_small for DeiT's")
    add(
        "--scenes",
        type=script.number(int, 1),
        default=300,
        help="built-in scenes to train on [300]",
    )
    add(
        "--size",
        dest="tune_size",
        type=script.number(int, 1),
        help="images' shorter side in pixels, for fine-tuning",
    )
    add("--tune-steps", type=script.number(int, 1), help="steps of fine-tuning")
    add(
        "--tune-batch-size",
        type=script.number(int, 1),
        help="images a step of fine-tuning, of all processes",
    )
    add("--tune-lr", type=float, help="learning rate of fine-tuning")
    add(
        "--workers",
        type=int,
        help="processes that read a folder's images, for each one that trains",
    )
    return parser


def parsed(parser):
    """The arguments, after this process has joined torchrun's, if it started this one."""
    args = runs.parsed(parser)
    if any(name.startswith("mixer") for name in args.models):
        raise data.UserError(
            "a Mixer takes images of one size: --models takes a ViT, a Swin or a ConvNeXt here"
        )
    if args.data != "shapes":
        if not args.checkpoints:
            raise data.UserError(
                f"--data {args.data} asks for --checkpoints FILE ..., backbones to start from"
            )
        args.seeds, args.jobs = args.seeds or 1, 0
    args.seeds = args.seeds or 3
    cores = min(16, script.NUM_CPUS // int(os.environ.get("LOCAL_WORLD_SIZE", 1))) * (
        args.data != "shapes"
    )
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
        raise data.UserError(
            f"{path} can't be read: {e.strerror}; --checkpoints takes files of train.py"
        ) from e


def compare(args, name, tune, sets, recipe, measures):
    """Fine-tune from each start with each seed, tune(s, sets(seed)) being one run. Returns what
    `runs.write` wants and the settings of all runs, {(model, start, seed): s}. recipe: settings
    that are not given. measures: what to show of results, {key: title}; the first is held against
    the baseline, seed by seed."""
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
        s = argparse.Namespace(
            **(recipe | given), init=path, load=start != SCRATCH, backbone=args.model
        )
        run = f"{model}-{start}-{seed}".strip("-").replace("/", "-").replace(" ", "-")
        vars(s).update(
            seed=seed, device=args.device, workers=args.workers, out=f"{folder}/{run}", eval=None
        )
        s.digest, s.classes = digest(path), sets(0).classes
        s.images = [len(sets(seed).train), len(sets(seed).val)]
        tuned[model, start, seed] = s
    todo = [(s, sets(s.seed)) for s in tuned.values() if not result(s)]
    first, sets = next(iter(measures)), sets(0)
    runs.side_by_side(
        tune, todo, args, len(tuned), lambda s: f"{measures[first]} {result(s)[first]:.2f}"
    )

    head = ["model", "start", *measures.values(), f"difference to {base}", "of seed 0 alone"]
    rows, panels = [], []
    for model in models:
        found = {
            way: [result(tuned[model, way, seed]) for seed in range(args.seeds)] for way in ways
        }
        points = []
        for way, results in found.items():
            means = [f"{statistics.fmean(r[key] for r in results):.2f}" for key in measures]
            gains = [a[first] - b[first] for a, b in zip(results, found[base], strict=False)]
            told = ["", ""] if way == base else [runs.signed(gains), f"{gains[0]:+.2f}"]
            rows.append([model, way, *means, *told])
            mean, half = runs.interval([r[first] for r in results])
            points.append((mean, mean - half, mean + half))
        panels.append((model, [*ways], {"mean over seeds and its 95 % interval": points}))
    text = f"\n{s.steps} steps of {s.batch_size} of {len(sets.train)} images; "
    text += f"{len(sets.val)} to validate; seeds 0 to {args.seeds - 1}, "
    text += "± is half the 95 % interval over them.\n"
    text = runs.table(head, rows) + text
    return text, runs.chart(panels, measures[first], joined=False), tuned


def write(args, name, compared, sets, draw):
    """Print and leave the table and the chart, and NAME.png of the first seed's models of the first
    kind, of which draw(settings, sets) gives the bytes. compared: as `compare` returns it."""
    text, chart, tuned = compared
    if script.get_rank() == 0:
        runs.write(args, name, text, chart)
        kind = next(iter(tuned))[0]
        first = {
            start: s for (model, start, seed), s in tuned.items() if (model, seed) == (kind, 0)
        }
        runs.write_bytes(Path(args.runs) / f"{name}.png", draw(first.values(), sets(0)))
        print(
            f"some images, what is true, and what is found: {', '.join(first)}: "
            f"{args.runs}/{name}.png"
        )
    if script.get_world_size() > 1:
        dist.destroy_process_group()  # left to the end of the process, its threads may abort it
