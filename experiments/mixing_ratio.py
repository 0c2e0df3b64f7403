"""Whose image does the head really read? The shares that methods assign, and the truth (the
paper's mixing ratio and token fluctuation).

    python experiments/mixing_ratio.py                           # built-in images, minutes on a CPU
    python experiments/mixing_ratio.py --data cifar10 --images 100 --batch-size 50

Validation images are mixed by CutMix and shown to models that compare.py trains with the area
target and with aligned ones. Area, TransMix (ViT only) and TL-Align, after every layer as the head
would read it there, each say what share of a mix is the pasted image's. Two truths:

    influence   its share of what the logits owe to both images. An image is taken away by putting
                the mean patch in the place of its patches; its worth is its Shapley value, a vector
                of logits,
                    phi_2 = (v(2) - v() + v(1, 2) - v(1)) / 2,    likewise phi_1,
                and the share is |phi_2| / (|phi_1| + |phi_2|), with the Euclidean norm
    objects     for the built-in images: its share of the object pixels that the mix shows

Error is the mean absolute difference from the truth. Beyond the area, let a be a method's share
minus the area's, and b the influence minus the area's: r is the correlation of a and b, and the
factor is sum(ab) / sum(a^2), which is 1 if a has the right size and more if it is too small.
Fluctuation is how far a token's label is from the share of its own pixels, on average. ± is half of
a 95 % interval over seeds.
"""

import itertools
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange

import common
import compare
import data
import oracle
import tl_align
import train
import transmix

NUM_MIXES = 1000  # on which errors are measured


def influence(model, mixed, mask, blanks):
    """The pasted image's share in what the logits owe to both images, (B,).

    mixed: (B, 3, S, S). mask: (B, 1, S, S), 1 where a pixel is the pasted image's. blanks: images
    (1 or B, 3, S, S) that stand for what is taken away; logits are averaged over them.
    """

    def value(shown):
        return sum(model(torch.lerp(blank, mixed, shown)) for blank in blanks) / len(blanks)

    nothing, both = value(torch.zeros_like(mask)), value(torch.ones_like(mask))
    own, pasted = value(1 - mask), value(mask)
    phi_1 = ((own - nothing + both - pasted) / 2).norm(dim=1)
    phi_2 = ((pasted - nothing + both - own) / 2).norm(dim=1)
    return phi_2 / (phi_1 + phi_2)


def mean_patch(images, patch_size):
    """An image (1, 3, S, S) whose every patch is the mean patch of images (B, 3, S, S)."""
    patches = rearrange(images, "b c (h p) (w q) -> (b h w) c p q", p=patch_size, q=patch_size)
    num_patches = images.shape[-1] // patch_size
    return patches.mean(0, keepdim=True).repeat(1, 1, num_patches, num_patches)


class Mixes(NamedTuple):
    """Mixes of validation images, on the device."""

    images: torch.Tensor  # (n, 3, S, S), normalized; neighbours are partners
    mask: torch.Tensor  # (n, 1, S, S)
    mixed: torch.Tensor  # (n, 3, S, S)
    blank: torch.Tensor  # (1, 3, S, S), see `mean_patch`
    objects: torch.Tensor  # (n,), the share of the objects; None if they are not known


def make_mixes(dataset, num_mixes, settings, name):
    """Mixes of the first images of --val-images, by a random generator of that name."""
    n = min(num_mixes, len(dataset)) // 2 * 2
    if n == 0:
        raise data.UserError("there must be two validation images to mix")
    crops = common.center_crops(dataset, range(n), settings.img_size).to(settings.device)
    images = data.normalize(crops)
    rand = data.uniform((n, 3), name).to(settings.device)
    mask = tl_align.cutmix_mask(rand, images.shape[-2:], settings.patch_size)
    objects = None
    if settings.data == "shapes":
        masks = data.shapes(data.SHAPES_VAL, "val")[2][dataset.indices[:n]]
        objects = oracle.object_share(masks[:, None].to(mask), mask)[:, 0]
    blank = mean_patch(images, settings.patch_size)
    return Mixes(images, mask, tl_align.mix(images, mask), blank, objects)


@torch.no_grad()
def measure_shares(model, mixed, mask, blank):
    """What methods say of mixed images (n, 3, S, S), mask (n, 1, S, S), and what is measured beside
    them: a dict of (n,), by (method or quantity, layer). blank: see `influence`."""
    labels = tl_align.token_labels(mask, model.patch_size)
    shares = {("area", ""): labels.mean((1, 2))}
    if hasattr(model, "cls_token"):
        with transmix.record_class_attention(model) as attention:
            model(mixed)
        shares["TransMix", ""] = transmix.transmix(labels, attention[0])[:, 0]
    layers = model.intermediate_labels(mixed, labels)
    for layer, (tokens, read) in enumerate(layers[1:], 1):
        shares["TL-Align", layer] = read[:, 0]
        pixels = F.adaptive_avg_pool2d(mask, tokens.shape[1:3])[:, 0]  # (n, H, W)
        shares["fluctuation", layer] = (tokens[..., 0] - pixels).abs().mean((1, 2))
    shares["influence", ""] = influence(model, mixed, mask, [blank])
    return shares


def measure_runs(runs):
    """`measure_shares` of the same mixes with the models of some runs: a dict of (seeds, n). With
    the share of objects, for the built-in images."""
    datasets = compare.open_datasets(runs[0])
    mixes = make_mixes(datasets.val, NUM_MIXES, runs[0], "mixing ratio")
    batches = list(zip(mixes.mixed.split(200), mixes.mask.split(200), strict=True))
    seeds = []
    for settings in runs:
        model = common.load_model(settings, train.build_model(settings, len(datasets.classes)))
        parts = [measure_shares(model, mixed, mask, mixes.blank) for mixed, mask in batches]
        seeds.append({key: torch.cat([part[key] for part in parts]) for key in parts[0]})
    shares = {key: torch.stack([seed[key] for seed in seeds]) for key in seeds[0]}
    if mixes.objects is not None:
        shares["objects", ""] = mixes.objects[None]
    return shares


def errors(shares, truth):
    """The mean absolute error of each seed. shares: (seeds, n). truth: (seeds or 1, n), nan where
    there is none."""
    return (shares - truth).abs().nanmean(1).tolist()


def beyond_area(shares, key):
    """The correlation and the factor, see the top; means over seeds."""
    a = shares[key] - shares["area", ""]
    b = shares["influence", ""] - shares["area", ""]
    pairs = [torch.stack(pair) for pair in zip(a, b, strict=True)]  # (2, n) for each seed
    r = torch.stack([torch.corrcoef(pair)[0, 1] for pair in pairs])
    factor = (a * b).sum(1) / a.square().sum(1)
    return [f"{r.mean():.2f}", f"{factor.mean():.2f}"]


def make_row(shares, key, truths):
    """The scores of a method and a layer."""
    method, layer = key
    row = [method, layer]
    row += [common.show(errors(shares[key], shares[truth, ""]), digits=3) for truth in truths]
    row += ["", ""] if method == "area" else beyond_area(shares, key)
    row += [f"{shares['fluctuation', layer].mean():.2f}" if method == "TL-Align" else ""]
    return row


def draw(path, shares, title):
    """A chart of the error of the influence after each layer, where matplotlib is installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print(f"{path} is not drawn: matplotlib is not installed")
        return
    figure = Figure(figsize=(5, 3.5), layout="constrained")
    axes = figure.subplots()
    layers = [layer for method, layer in shares if method == "TL-Align"]
    for method in ("area", "TransMix", "TL-Align"):
        own = [shares[key] for key in shares if key[0] == method]
        scores = [common.interval(errors(x, shares["influence", ""])) for x in own]
        if len(scores) == 1:  # of a method that knows no layers
            scores = scores * len(layers)
        if scores:
            means, halves = zip(*scores, strict=True)
            axes.errorbar(layers, means, halves, marker="o", markersize=4, capsize=3, label=method)
    axes.set_xticks(layers)
    axes.set(xlabel="layer", ylabel="error of the share", title=title)
    axes.legend()
    figure.savefig(path)


def main():
    args = compare.make_parser(__doc__).parse_args()
    truths = ["influence", "objects"] if args.data == "shapes" else ["influence"]
    runs = compare.make_runs(args, compare.PAIR)
    common.run_all(compare.train_run, runs.values(), args.jobs)

    rows = []
    for model, trained in itertools.product(args.models, compare.PAIR):
        seeds = [runs[model, trained, seed] for seed in range(args.seeds)]
        shares = measure_runs(seeds)
        for key in shares:
            if key[0] in ("area", "TransMix", "TL-Align"):
                rows.append([model, trained, *make_row(shares, key, truths)])
        path = Path(args.runs, f"mixing_ratio-{model}-{trained}.png")
        draw(path, shares, f"{model} trained with {trained}")
    header = ["model", "trained with", "method", "layer", *[f"error: {name}" for name in truths]]
    text = common.markdown_table([*header, "beyond the area: r", "factor", "fluctuation"], rows)
    num_mixes = shares["influence", ""].shape[1]
    text += f"\n{num_mixes} mixes. {common.describe(args)}\n"
    common.write_results("mixing_ratio", text, args.runs)


if __name__ == "__main__":
    common.main(main)
