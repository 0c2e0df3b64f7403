"""Clips: a ViT of tubelets, CutMix in space and time, and labels that move with the tubelets.

    python experiments/video.py                       # clips that it draws itself, minutes on a CPU
    python experiments/video.py --clips FOLDER        # of train/CLASS/*.pt and val/CLASS/*.pt

Only the embedding differs from an image's: a token is a tubelet of two frames and 8 x 8 pixels
(Arnab et al. 2021, arXiv 2103.15691). A box of space and time is pasted from one clip into another,
on the grid of tubelets (Yun et al. 2020, arXiv 2012.03457), each tubelet starts with the share of
its pixels that is pasted, and the blocks of `vit.py` move the labels as they are.

A built-in clip shows an object that moves over a cluttered ground, both of the built-in images; its
class is the direction, one of eight, so that no frame alone tells it. A file of --clips holds a
uint8 tensor (T, 3, H, W) of any length and sides; eight frames, spread over it, are scaled and
cropped to 32 px.

First table: accuracy beside the area target's, paired by seeds. Second: how far the shares that
rules assign to the pasted clip are from its influence (see `mixing_ratio.py`), in models trained
with the area target.
"""

import contextlib
import io
import json
from collections import OrderedDict
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from einops.layers.torch import Rearrange
from torch import nn
from torch.utils.data import TensorDataset
from torchvision.datasets import DatasetFolder

import mixing_ratio
import picture
import rules
import runs
import tl_align  # on the path that `models` has set
import vit
from runs import data, script

FRAMES, SIDE, TUBELET = 8, 32, 2
DIRECTIONS = ["up", "up right", "right", "down right", "down", "down left", "left", "up left"]
TRAINED = ("no mixing", "area", "TL-Align")
BARS = "mean and its 95 % interval"


class VideoViT(vit.ViT):
    """A ViT of clips (B, frames, 3, img_size, img_size); labels are (B, N, K), of each tubelet,
    times first. tubelet: the frames in one. Other settings, methods and errors are a ViT's."""

    def __init__(self, img_size=SIDE, patch_size=8, frames=FRAMES, tubelet=TUBELET, **kwargs):
        super().__init__(img_size, patch_size, **kwargs)
        self.frames, self.times = frames, frames // tubelet
        size = (tubelet, patch_size, patch_size)
        conv = nn.Conv3d(3, self.pos_embed.shape[-1], size, size)
        layers = {
            "clip": Rearrange("b t c h w -> b c t h w"),
            "proj": conv,
            "flat": nn.Flatten(2, 3),
        }
        self.patch_embed = nn.Sequential(OrderedDict(layers))  # (B, dim, times * rows, columns)
        token, grid = self.pos_embed.detach().tensor_split([1], dim=1)
        place = grid + 0.02 * torch.randn(self.times, 1, grid.shape[-1])  # of every time and place
        self.pos_embed = nn.Parameter(
            torch.cat([token, place.reshape(1, -1, grid.shape[-1])], dim=1)
        )

    def intermediate_labels(self, clips, labels):
        """As a ViT's, the tubelets' labels (B, times, H, W, K)."""
        x, labels = self.embed(clips, labels)
        layers = [labels]
        for block in self.blocks:
            x, labels = block(x, labels)
            layers.append(labels)
        side = self.grid_size
        return [
            (rearrange(y[:, 1:], "b (t h w) k -> b t h w k", h=side, w=side), y[:, 0])
            for y in layers
        ]

    def check_shapes(self, clips, labels):
        size = (self.frames, 3, self.img_size, self.img_size)
        if clips.shape[1:] != size:
            raise ValueError(
                f"clips must be (B, {', '.join(map(str, size))}), got {tuple(clips.shape)}"
            )
        batch, tokens = len(clips), self.times * self.grid_size**2
        if labels is not None and (labels.dim() != 3 or labels.shape[:2] != (batch, tokens)):
            expected = f"({batch}, {tokens}, K), one row for each tubelet"
            raise ValueError(f"labels must be {expected}, got {tuple(labels.shape)}")

    def convert_state_dict(self, state):
        """A checkpoint fits as it is."""
        return dict(state)


def video_micro(**kwargs):
    """Small enough to train on a laptop's CPU."""
    return VideoViT(**{"embed_dim": 64, "depth": 4, "num_heads": 2, "init_std": None, **kwargs})


script.MODELS["video_micro"] = video_micro
script.DROP_PATH["video_micro"] = 0.0


def cutmix_mask(rand, size, patch_size):
    """A box of 1 - lambda of a clip, its sides the same share of each of the clip's, on the grid of
    tubelets. rand: (B, 4), lambda and the centre's row, column and time. size: (T, H, W). Returns
    (B, T, 1, H, W)."""
    side = 1 - (1 - rand[:, :1]) ** (2 / 3)  # what makes a box of two dimensions have such sides
    box = tl_align.cutmix_mask(torch.cat([side, rand[:, 1:3]], dim=1), size[1:], patch_size)
    span = torch.cat([side, rand[:, 3:], rand[:, 3:]], dim=1)
    span = tl_align.cutmix_mask(span, (size[0], size[0]), TUBELET).amax(-1)  # (B, 1, T)
    return box[:, None] * span.mT[..., None, None]


def token_labels(mask, patch_size):
    """The share of each tubelet that is pasted: (B, N, 1). mask: (B, T, 1, H, W)."""
    return F.avg_pool3d(mask[:, :, 0], (TUBELET, patch_size, patch_size)).flatten(1)[..., None]


def loss(model, clips, targets, mask, rand, args):
    """`train.mixed_loss` of clips. mask: (B, T, 1, H, W), or None without mixing."""
    if mask is None:
        logits = model(clips, rand=rand)
        return F.cross_entropy(logits.float(), targets, label_smoothing=args.smoothing)
    mixed, labels = tl_align.mix(clips, mask), token_labels(mask, args.patch_size)
    if args.targets == "area":
        logits, share = model(mixed, rand=rand), labels.mean(1)
    else:
        logits, share = model(mixed, labels, rand=rand)
    return tl_align.mixed_cross_entropy(logits.float(), targets, share, args.smoothing)


# --- Clips, (n, T, 3, S, S) uint8, and their classes.


def drawn(n, seed):
    """Built-in clips: an object of one image moves over another, two pixels a frame, round the
    border."""
    (ground, _, _), (objects, _, masks) = (
        data.shapes(n, (seed, "ground")),
        data.shapes(n, (seed, "object")),
    )
    targets = torch.randint(8, (n,), generator=data.generator(seed, "direction"))
    steps = torch.tensor([(-2, 0), (-2, 2), (0, 2), (2, 2), (2, 0), (2, -2), (0, -2), (-2, -2)])
    starts = torch.randint(SIDE, (n, 2), generator=data.generator(seed, "start"))
    clips = ground[:, None].repeat(1, FRAMES, 1, 1, 1)
    for clip, image, mask, target, start in zip(
        clips, objects, masks, targets, starts, strict=False
    ):
        for t, frame in enumerate(clip):
            shift = (start + t * steps[target]).tolist()
            there = mask.roll(shift, (0, 1))
            frame[:, there] = image.roll(shift, (1, 2))[:, there]
    return clips, targets


def read(path):
    """A file's clip, (FRAMES, 3, SIDE, SIDE). Raises UserError where it is none."""
    with contextlib.suppress(Exception):  # whatever a file of something else makes of torch
        clip = torch.load(path, weights_only=True)
        if clip.dtype == torch.uint8 and clip.shape[1:2] == (3,):
            frames = clip[torch.linspace(0, len(clip) - 1, FRAMES).long()]
            return torch.stack([data.center_crop(frame, SIDE) for frame in frames])
    raise data.UserError(f"{path} holds no clip, a uint8 tensor (T, 3, H, W)")


def made(args, seed):
    """The sets of a seed."""
    parts = drawn(args.images, seed), drawn(args.val_images, "val")
    return data.Datasets(*(TensorDataset(*part) for part in parts), DIRECTIONS, hflip=False)


def opened(folder):
    """The sets of a folder of clips. Raises UserError."""
    try:
        found = [DatasetFolder(Path(folder, part), read, (".pt",)) for part in ("train", "val")]
    except OSError as e:  # no such folder, none in it, or one without clips
        reason = str(e).split("] ")[-1]
        raise data.UserError(
            f"{reason}; --clips takes a folder of train/CLASS/*.pt and val/CLASS/*.pt"
        ) from e
    if min(map(len, found)) < 2:
        raise data.UserError(f"{folder}/train and val must hold two clips or more")
    if found[0].classes != found[1].classes:
        raise data.UserError(f"the classes of {folder}/train and val differ")
    parts = []
    for part in found:
        order = torch.randperm(
            len(part), generator=data.generator("chosen")
        ).tolist()  # it has them by class
        clips, targets = zip(*(part[i] for i in order), strict=False)
        parts.append(TensorDataset(torch.stack(clips), torch.tensor(targets)))
    return data.Datasets(*parts, found[0].classes, hflip=False)


def settings(args, sets, method, seed):
    """The complete settings of one run."""
    n, s = len(sets.train), script.parse_args(["--seed", str(seed), "--device", args.device])
    vars(s).update(model="video_micro", patch_size=8, workers=0, **runs.METHODS[method])
    vars(s).update(epochs=args.epochs, passes=args.passes, batch_size=args.batch_size)
    folder = f"{Path(args.clips or 'built-in').name}-video-{n}x{args.passes}x{args.epochs}"
    folder += f"-b{args.batch_size}-val{len(sets.val)}"
    s.out = f"{args.runs}/{folder}/{method.lower().replace(' ', '-')}-{seed}"
    script.fill_defaults(s, SIDE, n * args.passes, sets.hflip)
    script.check_args(s, n * args.passes)
    return s


def train_step(model, optimizer, clips, targets, step, lr, s):
    """One step on a batch, (B, T, 3, S, S) uint8 and (B,). Returns the loss."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    rand = data.uniform((s.batch_size, 19 + 2 * model.depth), s.seed, "step", step)
    rand = data.to_device(rand[:, 16:], s.device)
    drop_path_rand = rand[:, 3:].unflatten(1, (model.depth, 2))
    clips, mask = data.normalize(clips), None
    if s.mix != "none":
        # Time takes a number of the first block's, which drop path, rising from a rate of 0, never
        # drops.
        mask = cutmix_mask(rand[:, :4], (FRAMES, SIDE, SIDE), s.patch_size)
    with torch.autocast(s.device, torch.bfloat16, enabled=s.bf16):
        value = loss(model, clips, targets, mask, drop_path_rand, s)
    value.backward()
    optimizer.step()
    optimizer.zero_grad()
    return value.item()


@torch.no_grad()
def evaluate(model, clips, targets, s):
    """Top-1 accuracy in percent."""
    model.eval()
    correct = 0
    for some, wanted in zip(clips.split(500), targets.split(500), strict=True):
        with torch.autocast(s.device, torch.bfloat16, enabled=s.bf16):
            logits = model(data.normalize(some))
        correct += (logits.argmax(1) == wanted).sum().item()
    return round(100 * correct / len(targets), 3)


def train(s, sets):
    """One run: last.pt and metrics.jsonl as train.py leaves them."""
    with runs.logged(s.out):
        model = script.build_model(s, len(sets.classes)).to(s.device)
        optimizer = script.make_optimizer(model, s)
        n, history = len(sets.train), []
        steps = n * s.passes // s.batch_size
        (clips, targets), val = (
            [t.to(s.device) for t in part.tensors] for part in (sets.train, sets.val)
        )
        for epoch in range(s.epochs):
            model.train()
            order = data.epoch_order(n * s.passes, s.seed, epoch).to(s.device) % n
            for step in range(steps):
                i = order[step * s.batch_size : (step + 1) * s.batch_size]
                at = epoch * steps + step
                lr = script.lr_at(at, s, steps)
                value = train_step(model, optimizer, clips[i], targets[i], at, lr, s)
            top1 = evaluate(model, *val, s)
            script.print0(f"epoch {epoch + 1}/{s.epochs}  loss {value:.4f}  val top-1 {top1:.2f} %")
            history.append(json.dumps({"epoch": epoch + 1, "val_top1": top1}))
        torch.save({"model": model.state_dict(), "args": vars(s)}, content := io.BytesIO())
        runs.write_bytes(Path(s.out, "last.pt"), content.getbuffer())
        script.write_text(Path(s.out, "metrics.jsonl"), "\n".join([*history, ""]))


def mixes(sets, s, n):
    """Mixes of n clips to validate on, (n, T, 3, S, S), their masks, (n, T, 1, S, S), and the mean
    patch."""
    clips = data.normalize(sets.val.tensors[0][:n])
    mask = cutmix_mask(data.uniform((n, 4), "video"), (FRAMES, SIDE, SIDE), s.patch_size)
    mean = mixing_ratio.mean_patch(clips.flatten(0, 1), s)
    return [t.to(s.device) for t in (tl_align.mix(clips, mask), mask, mean)]


def look(model, mixed, mask, mean, s):
    """What each rule says of each mix, {rule: (n,)}, and the influence, (n,)."""
    labels = token_labels(mask, s.patch_size)
    said = {"area": labels.mean(1)[:, 0]}
    for name in ("TL-Align", "norm", "parts"):
        with rules.RULES[name](model, mean):
            said[name] = model(mixed, labels)[1][:, 0]
    true = mixing_ratio.influence(model, mixed, torch.stack([1 - mask, mask], dim=1), [mean])[:, 1]
    return {name: share.cpu() for name, share in said.items()}, true.cpu()


def draw(model, mixed, mask, s):
    """Three mixes as a PNG's bytes: a frame of each tubelet, what is pasted there, and what
    arrives."""
    tokens, read = model.intermediate_labels(mixed, token_labels(mask, s.patch_size))[-1]
    mean, std = data.channel_statistics(mixed.device)
    frames, cells = ((mixed * std + mean) * 255).clamp(0, 255), []
    for k in range(0, min(6, len(mask)), 2):
        area, aligned = mask[k].mean().item(), read[k].item()
        strips = {
            "mixed": frames[k, ::TUBELET],
            f"pasted: {area:.2f}": picture.paint(mask[k, ::TUBELET]),
            f"aligned: {aligned:.2f}": picture.paint(tokens[k].movedim(-1, 1)),
        }
        cells += [(caption, cell) for caption, strip in strips.items() for cell in strip]
    return picture.grid(cells, len(strips) * FRAMES // TUBELET)


def main():
    without = ("data", "root", "models", "full", "images", "val_images")
    parser = runs.arguments(__doc__, without, passes=10, epochs=6, batch_size=50)
    add = parser.add_argument
    add(
        "--images",
        type=script.number(int, 2),
        default=500,
        help="clips to train on, drawn by each seed [500]",
    )
    add(
        "--val-images", type=script.number(int, 2), default=1000, help="clips to validate on [1000]"
    )
    add("--mixes", type=script.number(int, 2), default=500, help="mixed clips to look at [500]")
    add("--clips", help="folder of clips to take instead")
    args = runs.parsed(parser)
    seeds = range(args.seeds)
    sets = [opened(args.clips)] * args.seeds if args.clips else [made(args, seed) for seed in seeds]
    trained = {
        method: [settings(args, sets[seed], method, seed) for seed in seeds] for method in TRAINED
    }
    runs.train_all([(s, sets[s.seed]) for those in trained.values() for s in those], args, train)

    def top1(s):
        return runs.done(s)[-1]["val_top1"]

    rows, points = runs.beside({method: [*map(top1, those)] for method, those in trained.items()})
    text = runs.table(["trained with", "top-1 %", "difference to area"], rows)
    panels = [("top-1 %", [*trained], {BARS: points})]

    n, first = min(args.mixes, len(sets[0].val)) // 2 * 2, trained["area"][0]
    found = mixes(sets[0], first, n)
    looks = [look(runs.model_of(s, sets[s.seed]), *found, s) for s in trained["area"]]
    true = torch.stack([true for _, true in looks])
    both = {
        rule: [*mixing_ratio.scores(torch.stack([said[rule] for said, _ in looks]), true)]
        for rule in looks[0][0]
    }
    rows = [
        [rule, *(mixing_ratio.cell(*score) for score in scores)] for rule, scores in both.items()
    ]
    text += "\n" + runs.table(["rule", "error of the share", "rank correlation"], rows)
    passes, last = args.epochs * args.passes, args.seeds - 1
    text += f"\nModels of {passes} passes over {len(sets[0].train)} clips, seeds 0 to {last}; "
    text += f"{len(sets[0].val)} clips to validate on, {n} mixes of them; "
    text += "± is half the 95 % interval over seeds, brackets hold it over mixes.\n"
    panels.append(("error of the share", [*both], {BARS: [error for error, _ in both.values()]}))
    runs.write(args, "video", text, runs.chart(panels, "", joined=False))
    model = runs.model_of(trained["TL-Align"][0], sets[0])
    runs.write_bytes(Path(args.runs, "video.png"), draw(model, *found[:2], first))
    print(f"three mixes and their labels: {args.runs}/video.png")


if __name__ == "__main__":
    runs.run(main)
