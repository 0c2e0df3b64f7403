"""Whose image does the head really read? The shares that methods assign, and the truth (the
paper's Figure 4 and its token fluctuation).

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

Error is the mean absolute difference from the truth; rank correlation is Spearman's over the mixes.
Beyond the area: r is the correlation of what a method adds to the area's share with what the
influence adds, and factor the number that fits the latter best when multiplied by the former.
Fluctuation is how far a token's label is from the share of its own pixels, on average. ± is half of
a 95 % interval over seeds.
"""

import itertools
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange

import common
import compare
import data
import oracle
import tl_align
import transmix

TRAINED = ("area", "TL-Align")


def influence(model, mixed, owners, blanks):
    """The share of each of K sources in what the logits owe to all, (B, K), rows summing to one.

    mixed: (B, 3, S, S). owners: (B, K, 1, S, S), 1 where a pixel is the source's, else 0. blanks:
    images (1 or B, 3, S, S) that stand for what is taken away; logits are averaged over them.
    """
    num_sources = owners.shape[1]
    value = {}  # the logits, by the sources that are shown
    for size in range(num_sources + 1):
        for shown in itertools.combinations(range(num_sources), size):
            kept = owners[:, list(shown)].sum(1)
            logits = [model(torch.lerp(blank, mixed, kept)) for blank in blanks]
            value[frozenset(shown)] = torch.stack(logits).mean(0)
    norms = []
    for source in range(num_sources):
        worth = 0
        for shown in value:
            if source not in shown:
                weight = num_sources * math.comb(num_sources - 1, len(shown))
                worth = worth + (value[shown | {source}] - value[shown]) / weight
        norms.append(worth.norm(dim=1))
    return F.normalize(torch.stack(norms, dim=1), p=1)


def mean_patch(images, patch_size):
    """An image (1, 3, S, S) whose every patch is the mean patch of images (B, 3, S, S)."""
    patches = rearrange(images, "b c (h p) (w q) -> (b h w) c p q", p=patch_size, q=patch_size)
    num_patches = images.shape[-1] // patch_size
    return patches.mean(0, keepdim=True).repeat(1, 1, num_patches, num_patches)


@torch.no_grad()
def look(model, mixed, mask, blank):
    """What methods say of mixed images (n, 3, S, S), mask (n, 1, S, S), and the influence: a dict
    of (n,), by (method, layer). blank: see `influence`."""
    labels = tl_align.token_labels(mask, model.patch_size)
    found = {("area", ""): labels.mean((1, 2))}
    if hasattr(model, "cls_token"):
        with transmix.record_class_attention(model) as attention:
            model(mixed)
        found["TransMix", ""] = transmix.transmix(labels, attention[0])[:, 0]
    layers = model.intermediate_labels(mixed, labels)
    for layer, (tokens, read) in enumerate(layers[1:], 1):
        found["TL-Align", layer] = read[:, 0]
        pixels = F.adaptive_avg_pool2d(mask, tokens.shape[1:3])[:, 0]  # (n, H, W)
        found["fluctuation", layer] = (tokens[..., 0] - pixels).abs().mean((1, 2))
    owners = torch.stack([1 - mask, mask], dim=1)
    found["influence", ""] = influence(model, mixed, owners, [blank])[:, 1]
    return found


def look_at_runs(runs, num_mixes):
    """`look` at the same mixes with the models of some runs: a dict of (seeds, n) on the CPU. With
    the share of objects, for the built-in images."""
    settings, val = runs[0].settings, runs[0].open_datasets().val
    n = min(num_mixes, len(val)) // 2 * 2
    images = data.normalize(common.center_crops(val, range(n), settings.img_size))
    rand = data.uniform((n, 3), "mixing ratio")
    mask = tl_align.cutmix_mask(rand, images.shape[-2:], settings.patch_size)
    batches = list(zip(tl_align.mix(images, mask).split(200), mask.split(200), strict=True))
    blank = mean_patch(images, settings.patch_size).to(settings.device)
    looks = []
    for run in runs:
        model = common.load_model(run)
        parts = [
            look(model, x.to(settings.device), m.to(settings.device), blank) for x, m in batches
        ]
        looks.append({key: torch.cat([part[key] for part in parts]).cpu() for key in parts[0]})
    found = {key: torch.stack([own[key] for own in looks]) for key in looks[0]}
    if settings.data == "shapes":
        masks = data.shapes(data.SHAPES_VAL, "val")[2][val.indices[:n]]
        found["objects", ""] = oracle.object_share(masks[:, None].float(), mask).mT
    return found


def errors(said, true):
    """The mean absolute error of each seed. said: (seeds, n). true: (seeds or 1, n), nan where
    there is no truth."""
    return (said - true).abs().nanmean(1).tolist()


def rank_correlations(said, true):
    """Spearman's rank correlation of each seed, arguments as for `errors`."""
    true = true.expand_as(said)
    seen = ~true.isnan().any(0)
    return correlations(ranks(said[:, seen]), ranks(true[:, seen]))


def ranks(x):
    """The rank of each number in its row; equal ones share theirs."""
    below = (x[:, :, None] > x[:, None, :]).sum(-1)
    equal = (x[:, :, None] == x[:, None, :]).sum(-1)
    return below + equal / 2


def correlations(a, b):
    """Pearson's, of each seed."""
    return [torch.corrcoef(torch.stack(pair))[0, 1].item() for pair in zip(a, b, strict=True)]


def beyond_area(found, key):
    """The correlation and the factor, see the top; means over seeds."""
    added = found[key] - found["area", ""]
    wanted = found["influence", ""] - found["area", ""]
    factors = (added * wanted).mean(1) / (added**2).mean(1)
    r = torch.tensor(correlations(added, wanted))
    return [f"{r.mean():.2f}", f"{factors.mean():.2f}"]


def make_row(found, key, truths):
    """The scores of a method and a layer."""
    row = list(key)
    for truth in truths:
        for score in (errors, rank_correlations):
            row.append(common.show(score(found[key], found[truth, ""]), digits=3))
    row += beyond_area(found, key) if key[0] != "area" else ["", ""]
    is_layer = key[0] == "TL-Align"
    return [*row, f"{found['fluctuation', key[1]].mean():.2f}" if is_layer else ""]


def draw(path, found, title):
    """A chart of the error of the influence after each layer."""
    last = max(layer for method, layer in found if method == "TL-Align")
    lines = {}
    for method in ("area", "TransMix", "TL-Align"):
        keys = [(method, layer) for layer in range(1, last + 1)]
        keys = [key if key in found else (method, "") for key in keys]
        if keys[0] in found:
            scores = [common.interval(errors(found[key], found["influence", ""])) for key in keys]
            lines[method] = tuple(zip(*scores, strict=True))
    common.line_chart(path, range(1, last + 1), lines, "layer", "error of the share", title)


def main():
    parser = compare.make_parser(__doc__)
    parser.add_argument("--mixes", type=int, default=1000, help="mixed images to look at [1000]")
    args = parser.parse_args()
    truths = ["influence", "objects"] if args.data == "shapes" else ["influence"]
    runs = compare.make_runs(args, TRAINED)
    common.run_all(runs.values(), args.jobs)

    rows = []
    for model, trained in itertools.product(args.models, TRAINED):
        own = [runs[model, trained, seed] for seed in range(args.seeds)]
        found = look_at_runs(own, args.mixes)
        for key in found:
            if key[0] in ("area", "TransMix", "TL-Align"):
                rows.append([model, trained, *make_row(found, key, truths)])
        path = Path(args.runs, f"mixing_ratio-{model}-{trained}.png")
        draw(path, found, f"{model} trained with {trained}")
    header = ["model", "trained with", "method", "layer"]
    header += [f"{truth}: {score}" for truth in truths for score in ("error", "rank correlation")]
    text = common.markdown_table([*header, "beyond the area: r", "factor", "fluctuation"], rows)
    num_mixes = found["influence", ""].shape[1]
    text += f"\n{num_mixes} mixes; {args.seeds} seeds. {compare.describe(args)}\n"
    common.write_results("mixing_ratio", text, args.runs)


if __name__ == "__main__":
    common.main(main)
