"""What aligned targets do for a model's robustness and calibration (the paper's Table 5).

    python experiments/robustness.py                     # trains what is needed, minutes on a CPU
    python experiments/robustness.py --data cifar10 --images 100 --batch-size 50    # of compare.py
    python experiments/robustness.py --data /imagenet --checkpoints area/best.pt tl_align/best.pt \\
        --folders /imagenet-a /imagenet-r /imagenet-c                   # the first is the baseline

On validation images: top-1 accuracy, the expected calibration error over 15 bins of confidence, and
top-1 under FGSM and ten steps of PGD, whose radius (1 and 4 of 255 levels) bounds the change of
each channel; with a quarter, a half and three quarters of the patches blanked by chance; and under
the fifteen corruptions of Hendrycks and Dietterich (arXiv 1903.12261), each the mean over five
severities. Those are made here, in the manner of theirs and with strengths that grow evenly and
scale with the image, so they compare two models and not with published numbers; for these there is
--folders: images in folders named by class, as in ImageNet-A and -R, or somewhere below, as in
ImageNet-C. Where a folder has only some of the classes, the answer is the best one among them.
"""

import itertools
import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.data import Subset
from torchvision.datasets import ImageFolder
from torchvision.transforms.v2 import functional as TF

import runs
from runs import data, script

TRAINED = ("area", "TL-Align")
RADII, STEPS = (1, 4), 10  # of 255 levels; steps of PGD
BLANKED, BINS = (0.25, 0.5, 0.75), 15


# --------------------------------------------------------------------------------------------------
# The fifteen corruptions. x: (B, 3, S, S) in [0, 1]. t: severity, 0.2 to 1. g: a generator of
# numbers.


def blur(x, weight):
    """Convolve with weight(rows, cols) of the distance to the centre in pixels."""
    half = x.shape[-1] // 6
    at = torch.arange(-half, half + 1.0)
    kernel = weight(at[:, None], at[None, :]).clamp(0, 1).to(x)
    kernel = (kernel / kernel.sum()).expand(3, 1, -1, -1)
    return F.conv2d(F.pad(x, (half,) * 4, mode="reflect"), kernel, groups=3)


def defocus(x, t, g):
    radius = 0.5 + t * x.shape[-1] / 16
    return blur(x, lambda dy, dx: radius + 0.5 - (dy**2 + dx**2).sqrt())


def motion(x, t, g):
    angle, length = math.pi * torch.rand((), generator=g), t * x.shape[-1] / 8
    c, s = angle.cos(), angle.sin()
    return blur(
        x, lambda dy, dx: (1 - (c * dy - s * dx).abs()) * ((c * dx + s * dy).abs() <= length)
    )


def glass(x, t, g):
    side, reach = x.shape[-1], max(1, round(t * x.shape[-1] / 20))
    jump = torch.randint(-reach, reach + 1, (2, side, side), generator=g)
    at = torch.arange(side)
    rows, cols = ((at[:, None], at[None, :])[i] + jump[i] for i in (0, 1))
    return TF.gaussian_blur(x[..., rows.clamp(0, side - 1), cols.clamp(0, side - 1)], [3, 3])


def zoom(x, t, g):
    side = x.shape[-1]
    sizes = [round(side * (1 + 0.5 * t * k / 5)) for k in range(6)]
    return torch.stack(
        [TF.center_crop(TF.resize(x, [size] * 2), [side] * 2) for size in sizes]
    ).mean(0)


def plasma(x, g):
    """Fractal noise (B, 1, S, S) in [0, 1]: octaves, each of half the strength."""
    total, size, strength = 0, 2, 1.0
    while size <= x.shape[-1]:
        noise = torch.rand(len(x), 1, size, size, generator=g).to(x)
        total = total + strength * F.interpolate(noise, x.shape[-2:], mode="bicubic")
        size, strength = 2 * size, strength / 2
    low, high = total.amin((2, 3), keepdim=True), total.amax((2, 3), keepdim=True)
    return (total - low) / (high - low)


def snow(x, t, g):
    flakes = (torch.rand(len(x), 1, *x.shape[-2:], generator=g).to(x) < 0.02 + 0.05 * t).to(x)
    flakes = blur(flakes.expand_as(x), lambda dy, dx: (1 - (dy - dx).abs() / 2) * (dy.abs() <= 1))
    return torch.lerp(x, x.mean(1, keepdim=True).clamp(min=0.5), 0.4 * t) + 2 * flakes * t


def frost(x, t, g):
    ridges = 1 - (2 * plasma(x, g) - 1).abs()  # bright along the veins of the noise
    return (1 - 0.5 * t) * x + 0.8 * t * ridges**3


def elastic(x, t, g):
    side = x.shape[-1]
    field = torch.randn(1, 2, max(3, side // 8), max(3, side // 8), generator=g) * 0.06 * t
    field = F.interpolate(field, (side, side), mode="bicubic").permute(0, 2, 3, 1)
    return TF.elastic(x, field.to(x))


def noise(draw):
    return lambda x, t, g: draw(x, t, torch.rand(x.shape, generator=g).to(x), g)


def pixelate(x, t, g):
    return F.interpolate(F.interpolate(x, scale_factor=1 - 0.7 * t, mode="area"), x.shape[-2:])


def jpeg(x, t, g):
    return torch.stack([TF.jpeg(i, round(40 - 35 * t)) for i in (x * 255).byte().cpu()]).to(x) / 255


CORRUPTIONS = {
    "gaussian noise": noise(
        lambda x, t, r, g: x + 0.2 * t * torch.erfinv(1.999 * r - 0.9995) * 2**0.5
    ),
    "shot noise": noise(
        lambda x, t, r, g: torch.poisson(x.cpu() * 12 / t, generator=g).to(x) * t / 12
    ),
    "impulse noise": noise(lambda x, t, r, g: torch.where(r < 0.2 * t, (r < 0.1 * t).to(x), x)),
    "defocus blur": defocus,
    "glass blur": glass,
    "motion blur": motion,
    "zoom blur": zoom,
    "snow": snow,
    "frost": frost,
    "fog": lambda x, t, g: torch.lerp(x, 0.4 + 0.6 * plasma(x, g), 0.7 * t),
    "brightness": lambda x, t, g: x + 0.4 * t,
    "contrast": lambda x, t, g: TF.adjust_contrast(x, 1 - 0.85 * t),
    "elastic": elastic,
    "pixelate": pixelate,
    "jpeg": jpeg,
}


# --------------------------------------------------------------------------------------------------
# What is measured. Images are (B, 3, S, S) in [0, 1].


def answer(model, images):
    return model(data.normalize(images * 255))


def attack(model, images, targets, radius, steps):
    """PGD from a random start (Madry et al. 2018); with one step from the image, FGSM (Goodfellow
    et al. 2015). radius: of 255 levels."""
    radius, start = radius / 255, images
    if steps > 1:
        start = images + radius * (2 * data.uniform(images.shape, "attack").to(images) - 1)
    at = start.clamp(0, 1)
    for _ in range(steps):
        at.requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(answer(model, at), targets), at)
        at = at.detach() + gradient.sign() * radius * (1 if steps == 1 else 2.5 / steps)
        at = at.clamp(images - radius, images + radius).clamp(0, 1)
    return at


def blank(images, share, patch_size):
    grid = data.uniform(
        (len(images), 1, *(side // patch_size for side in images.shape[-2:])), "blank", share
    )
    gone = grid.flatten(1).argsort(1).argsort(1).view(grid.shape) < share * grid[0].numel()
    gone = F.interpolate(gone.float(), images.shape[-2:]).to(images)
    return torch.lerp(images, data.channel_statistics(images.device)[0].expand_as(images), gone)


def calibration_error(logits, targets):
    confidence, top = logits.softmax(1).max(1)
    bins = (confidence * BINS).long().clamp(max=BINS - 1)
    gap = torch.zeros(BINS).index_add(0, bins.cpu(), ((top == targets).float() - confidence).cpu())
    return 100 * gap.abs().sum().item() / len(targets)


def batches(part, s):
    """Batches of 48 evaluation crops, (b, 3, S, S) in [0, 1]."""
    loader = data.make_data_loader(data.ValCrops(part, s.img_size), s, 48)
    for images, targets in data.batches_on_device(loader, s.device):
        yield images / 255, targets


def sets_below(folder, classes):
    """The folder itself, or those below it, that hold folders named by classes. Raises
    UserError."""
    found = sorted({path.parent for path in Path(folder).rglob("*/") if path.name in classes})
    if not found:
        raise data.UserError(
            f"{folder} has no folders named by the classes, such as {classes[0]!r}"
        )
    return found


def top1_of_folder(model, folder, classes, s):
    """Mean top-1 of the sets in a folder; of each, the answer is the best among the classes it
    has."""
    total, found = 0, sets_below(folder, classes)
    for part in (ImageFolder(at, loader=data.decode, allow_empty=True) for at in found):
        wanted = [name for name in part.classes if name in classes]
        number = torch.tensor([classes.index(name) for name in wanted], device=s.device)
        kept = [i for i, (_, target) in enumerate(part.samples) if part.classes[target] in wanted]
        hits = 0
        for images, targets in batches(Subset(part, kept), s):
            named = [wanted.index(part.classes[target]) for target in targets.tolist()]
            top = answer(model, images)[:, number].argmax(1)
            hits += (top.cpu() == torch.tensor(named)).sum().item()
        total += 100 * hits / len(kept)
    return total / len(found)


def record(s):
    """Where what was measured of a run's model, or of a checkpoint's, is kept."""
    path = Path(s.eval or f"{s.out}/last.pt")
    return path.with_name(f"{path.stem}-robustness.json")


def measure(s, sets, folders):
    """Everything about one model, in percent; kept in a file beside its checkpoint."""
    model = runs.model_of(s, sets)
    hits, n, answers = {}, 0, []

    def count(name, images, targets):
        with torch.no_grad():
            logits = answer(model, images.clamp(0, 1))
        hits[name] = hits.get(name, 0) + (logits.argmax(1) == targets).sum().item()
        return logits

    for number, (images, targets) in enumerate(batches(sets.val, s)):
        n += len(targets)
        answers.append((count("clean", images, targets), targets))
        for radius in RADII:
            count(f"FGSM {radius}/255", attack(model, images, targets, radius, 1), targets)
            count(f"PGD {radius}/255", attack(model, images, targets, radius, STEPS), targets)
        for share in BLANKED:
            count(f"{share:.0%} blanked", blank(images, share, s.patch_size), targets)
        for (name, corrupt), severity in itertools.product(CORRUPTIONS.items(), range(1, 6)):
            g = data.generator("corruption", name, severity, number)
            count((name, severity), corrupt(images, severity / 5, g), targets)
    found = {name: 100 * hit / n for name, hit in hits.items()}
    corrupted = {
        name: sum(found.pop((name, level)) for level in range(1, 6)) / 5 for name in CORRUPTIONS
    }
    found |= corrupted | {"mean of corruptions": sum(corrupted.values()) / len(corrupted)}
    found["calibration error"] = calibration_error(
        *(torch.cat(parts) for parts in zip(*answers, strict=False))
    )
    with torch.no_grad():
        found |= {
            Path(folder).name: top1_of_folder(model, folder, sets.classes, s) for folder in folders
        }
    script.write_text(record(s), json.dumps({"of": [s.data, n, folders], "found": found}))


def measured(s, sets, folders):
    """What is kept, if it is of these images; else None."""
    kept = json.loads(record(s).read_text()) if record(s).exists() else {}
    return kept["found"] if kept.get("of") == [s.data, len(sets.val), folders] else None


def main():
    parser = runs.arguments(__doc__)
    parser.add_argument(
        "--checkpoints", nargs="+", default=[], help="models to compare instead; a baseline first"
    )
    parser.add_argument(
        "--folders", nargs="+", default=[], help="further images, in folders named by class"
    )
    parser.add_argument(
        "--few", type=int, default=500, help="validation images to try; 0 for all [500]"
    )
    args = runs.parsed(parser, few=0)
    sets = runs.open_part(args)
    for folder in args.folders:
        sets_below(folder, sets.classes)
    if args.checkpoints:
        side, models = data.median_size(sets.train), {"checkpoints": {}}
        for path in args.checkpoints:
            s = script.parse_args(["--eval", path, "--device", args.device, "--data", args.data])
            models["checkpoints"][path] = [script.fill_defaults(s, side, len(sets.train))]
    else:
        models = {
            model: {
                way: [runs.settings(args, sets, model, way, seed) for seed in range(args.seeds)]
                for way in TRAINED
            }
            for model in args.models
        }
    everything = [s for ways in models.values() for seeds in ways.values() for s in seeds]
    if not args.checkpoints:
        runs.train_all([(s, sets) for s in everything], args)
    few = runs.Part(sets.val, range(min(args.few or len(sets.val), len(sets.val))), 0)
    sets = sets._replace(val=few)
    todo = [(s, sets, args.folders) for s in everything if not measured(s, sets, args.folders)]

    def result(s):
        return f"mean of corruptions {measured(s, sets, args.folders)['mean of corruptions']:.2f} %"

    runs.side_by_side(measure, todo, args, len(everything), result)

    rows, panels, head = {}, [], ["percent"]
    for model, ways in models.items():
        found = {
            way: [measured(s, sets, args.folders) for s in seeds] for way, seeds in ways.items()
        }
        first, *others = found
        head += [f"{model}: {way}" for way in found] + [f"{way} - {first}" for way in others]
        points = {way: [] for way in others}
        for name in found[first][0]:
            values = {way: [seed[name] for seed in seeds] for way, seeds in found.items()}
            row = rows.setdefault(name, [name])
            row += [f"{sum(v) / len(v):.2f}" for v in values.values()]
            for way in others:
                gains = [a - b for a, b in zip(values[way], values[first], strict=False)]
                row.append(runs.signed(gains))
                mean, half = runs.interval(gains)
                points[way].append((mean, mean - half, mean + half))
        panels.append((model, [*rows], {f"{way} - {first}": p for way, p in points.items()}))
    text = runs.table(head, rows.values()) + (
        f"\n{len(sets.val)} validation images of {args.data}; top-1 accuracy, and the calibration "
        f"error, of which less is better.{runs.made_of(args, sets) * (not args.checkpoints)}\n"
    )
    runs.write(
        args, "robustness", text, runs.chart(panels, "percentage points", joined=False, width=560)
    )


if __name__ == "__main__":
    runs.run(main)
