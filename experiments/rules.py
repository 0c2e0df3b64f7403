"""Rules that move labels, held against the truth, and the truth against itself.

    python experiments/rules.py                                  # built-in images, minutes on a CPU
    python experiments/rules.py --data cifar10 --images 10000 --passes 1 --epochs 20 \\
        --batch-size 128
    python experiments/rules.py --sources 3                      # two boxes from two other images

Models trained with the area target are shown mixes of validation images. For the share of the
(first) pasted image each rule has a number: the area, TransMix (ViT only), the paper's half, and
the rules of `weighing.py`: residuals weighed by norm; parts, where tokens mix alone or also where
they are merged and pooled; and parts less a reference, the mean over the batch or a blank image,
the mean patch all over.

The truth is the influence of `mixing_ratio.py`. It takes a source away by putting something in the
place of its patches, and what that should be nobody can say. So there are three:

    mean patch   that image, as there
    blurred      the mix itself, blurred until no object is left
    others       other validation images, four of them, over which the logits are averaged

and the objects of the built-in images, which are known. Table: mean absolute error beside each of
them, with 95 % intervals by bootstrap over groups of images, and last how far the truths are from
one another.
"""

import contextlib

import torch
from torchvision.transforms.v2.functional import gaussian_blur

import mixing_ratio
import runs
import tl_align  # on the path that `models` has set
import transmix
import weighing
from runs import data, script

RULES = {  # of a model and the mean patch
    "TL-Align": lambda model, mean: contextlib.nullcontext(),
    "norm": lambda model, mean: weighing.by(model, "norm"),
    "parts where tokens mix": lambda model, mean: weighing.by(model, "parts", merged=False),
    "parts": lambda model, mean: weighing.by(model, "parts"),
    "parts less the batch": lambda model, mean: weighing.by(model, "parts", "batch"),
    "parts less the mean patch": lambda model, mean: weighing.by(model, "parts", mean),
}
OTHERS = 4


def mixes(images, s, sources):
    """Mixes of so many neighbours each, (n, 3, S, S), whose each pixel is, (n, K, 1, S, S), and
    labels."""
    size, owners = images.shape[-2:], [torch.ones(len(images), 1, *images.shape[-2:])]
    for k in range(1, sources):
        box = tl_align.cutmix_mask(data.uniform((len(images), 3), "rules", k), size, s.patch_size)
        owners = [owner * (1 - box) for owner in owners] + [box]
    labels = torch.cat([tl_align.token_labels(owner, s.patch_size) for owner in owners], dim=-1)
    owners = torch.stack(owners, dim=1)
    return mixing_ratio.shown(images, owners).sum(1), owners, labels


def look(model, images, mixed, owners, labels, s):
    """What each rule says, {rule: (n,)}, and each truth, {truth: (n,)}."""
    group, said, true = owners.shape[1], {}, {}
    blurred = gaussian_blur(mixed, kernel_size=s.img_size // 2 * 2 - 1, sigma=s.img_size / 4)
    far = len(images) // group // (OTHERS + 1) * group  # so that none is an image of the mix
    mean = mixing_ratio.mean_patch(images, s)
    instead = {
        "mean patch": [mean.expand(images.shape)],
        "blurred": [blurred],
        "others": [images.roll(far * k, 0) for k in range(1, OTHERS + 1)],
    }
    for part in torch.arange(len(images)).split(200 // group * group):

        def here(t):
            return t[part].to(s.device)

        x, y, own = here(mixed), here(labels), here(owners)
        found = {"area": y.mean(1)}
        if runs.has_class_token(s.model):
            with transmix.record_class_attention(model) as attention:
                model(x)
            found["TransMix"] = transmix.transmix(y, attention[0])
        for name, rule in RULES.items():
            with rule(model, mean):
                found[name] = model(x, y)[1]
        for name, shares in found.items():
            said.setdefault(name, []).append(shares[:, 1].cpu())
        for name, images_of in instead.items():
            share = mixing_ratio.influence(model, x, own, [here(t) for t in images_of])[:, 1]
            true.setdefault(name, []).append(share.cpu())
    return ({name: torch.cat(shares) for name, shares in found.items()} for found in (said, true))


def main():
    parser = runs.arguments(__doc__, models=mixing_ratio.MODELS)
    parser.add_argument("--mixes", type=int, default=600, help="mixed images to look at [600]")
    parser.add_argument(
        "--sources", type=script.number(int, 2, 5), default=2, help="images in a mix, at most 5 [2]"
    )
    args = runs.parsed(parser)
    sets = runs.open_part(args)
    n = min(args.mixes, len(sets.val)) // args.sources * args.sources
    if n < (least := args.sources * (OTHERS + 1)):
        raise data.UserError(
            f"{n} mixes are too few, of --mixes {args.mixes} and {len(sets.val)} images: {least}"
        )
    trained = {
        model: [runs.settings(args, sets, model, "area", seed) for seed in range(args.seeds)]
        for model in args.models
    }
    runs.train_all([(s, sets) for seeds in trained.values() for s in seeds], args)

    rows, panels = [], []
    for model, seeds in trained.items():
        images = mixing_ratio.validation(sets, seeds[0], n)
        mixed = mixes(images, seeds[0], args.sources)
        looks = [look(runs.model_of(s, sets), images, *mixed, s) for s in seeds]
        said, true = (
            {k: torch.stack([f[k] for f in found]) for k in found[0]}
            for found in zip(*looks, strict=False)
        )
        if args.data == "shapes":
            masks = data.shapes(data.SHAPES_VAL, "val")[2][sets.val.indices[:n], None].float()
            true["objects"] = mixing_ratio.objects(masks, mixed[1]).expand(args.seeds, -1)
        points = {name: [] for name in true}
        for rule, shares in [
            *said.items(),
            *((f"truth: {name}", shares) for name, shares in true.items()),
        ]:
            error = {
                name: next(mixing_ratio.scores(shares, t, args.sources)) for name, t in true.items()
            }
            rows.append([model, rule, *(mixing_ratio.cell(*score) for score in error.values())])
            if rule in said:
                for name in true:
                    points[name].append(error[name])
        panels.append((model, [*said], points))
        print(f"{model}: looked at {n} mixes", flush=True)
    text = runs.table(["model", "rule", *(f"error: {name}" for name in points)], rows)
    spread = "in brackets 95 % intervals by bootstrap over groups of images"
    text += f"\n{n} mixes of validation images of {args.data}.{runs.made_of(args, sets, spread)}\n"
    chart = runs.chart(panels, "error of the share; less is better", columns=2, joined=False)
    runs.write(args, "rules", text, chart)


if __name__ == "__main__":
    runs.run(main)
