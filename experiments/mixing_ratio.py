"""Whose image does the head really read? The shares that methods assign, held against the truth
(the paper's Figure 4 and its token fluctuation).

    python experiments/mixing_ratio.py                           # built-in images, minutes on a CPU
    python experiments/mixing_ratio.py --data cifar10 --images 100 --batch-size 50  # of compare.py

Validation images are mixed by CutMix and shown to models trained with the area target and with
aligned ones: ViT, Swin, MLP-Mixer and ConvNeXt. Area, TransMix (ViT only), TL-Align and TL-Align
with residuals weighed by norm each say what share of the mix is the pasted image's, TL-Align after
every layer, as the head would read it there. Two truths:

    influence   The share of the pasted image in what the head's answer owes to both. Either source
                is taken away by putting the mean patch in the place of its patches; a source's
                worth is its Shapley value over the four combinations, a vector of logits,
                    phi_2 = (v(2) - v() + v(1, 2) - v(1)) / 2,    likewise phi_1,
                and the share is |phi_2| / (|phi_1| + |phi_2|), with the Euclidean norm.
    objects     For the built-in images, whose objects are known: the pasted object's visible
                pixels, as a share of those of both objects. Mixes that show neither are left out.

For each: mean absolute error, and Spearman's rank correlation over the mixes, as the mean over
seeds, with 95 % intervals by bootstrap over pairs of images. Beyond the area: the correlation of
what a method adds to the area's share with what the influence adds, and the factor on the former
that fits the latter best: below one, a method leaves the area in the right direction but too far.
Fluctuation is how far a token's label is, on average, from the share of its own pixels.
"""

import contextlib
import itertools
import math

import torch
import torch.nn.functional as F
from einops import rearrange

import runs
import tl_align  # on the path that `models` has set
import transmix
import weighing
from runs import data

MODELS = ["vit_micro", "swin_micro", "mixer_micro", "convnext_micro"]
TRAINED = ("area", "TL-Align")
SPREAD = "in brackets 95 % intervals by bootstrap over pairs of images"
RULES = {
    "TL-Align": contextlib.nullcontext,
    "TL-Align, norm": lambda model: weighing.by(model, "norm"),
}


def validation(sets, s, n):
    """The first n validation images, (n, 3, S, S) normalised."""
    return data.normalize(runs.crops_of(sets.val, s.img_size, range(n)))


def influence(model, mixed, owners, instead):
    """The first truth, for K sources: (B, K), rows summing to one. mixed: (B, 3, S, S). owners: one
    where a pixel is the source's, else zero, (B, K, 1, S, S). instead: what stands for a source
    that is taken away, images (1 or B, 3, S, S), over which the logits are averaged."""
    sources = range(owners.shape[1])
    subsets = [s for size in range(len(sources) + 1) for s in itertools.combinations(sources, size)]
    value, worth = {}, []
    for s in subsets:
        kept = owners[:, list(s)].sum(1)
        value[s] = sum(model(torch.lerp(image, mixed, kept)) for image in instead) / len(instead)
    for k in sources:
        gains = [
            (value[tuple(sorted((*s, k)))] - value[s]) / math.comb(len(sources) - 1, len(s))
            for s in subsets
            if k not in s
        ]
        worth.append(sum(gains).norm(dim=1))
    return F.normalize(torch.stack(worth, dim=1), p=1)


def mean_patch(images, s):
    """The mean patch of images, all over one: (1, 3, S, S)."""
    mean = rearrange(
        images, "b c (h p) (w q) -> c p q (b h w)", p=s.patch_size, q=s.patch_size
    ).mean(-1)
    return mean.repeat(1, 1, s.img_size // s.patch_size, s.img_size // s.patch_size)


def shown(images, owners):
    """What a mix of K neighbours shows of each, its own part first: (B, K, C, S, S). images: (B, C,
    S, S). owners: (B, K, 1, S, S)."""
    of = images.unflatten(0, (-1, owners.shape[1]))
    return (
        torch.stack([of.roll(-k, dims=1).flatten(0, 1) for k in range(of.shape[1])], dim=1) * owners
    )


def objects(masks, owners):
    """The second truth: (B,), nan where no object is seen. masks: of the objects, (B, 1, S, S)."""
    seen = shown(masks, owners).sum((2, 3, 4))
    return seen[:, 1] / seen.sum(1)


def look(model, images, mask, s):
    """What each method says of each mix, {(method, layer): (n,)}, the influence, (n,), and how far
    labels have moved, {(method, layer): mean}."""
    said, true, moved = {}, [], {}
    mean = mean_patch(images, s)
    for x, m in zip(tl_align.mix(images, mask).split(200), mask.split(200), strict=False):
        x, m, mean = (t.to(s.device) for t in (x, m, mean))
        labels = tl_align.token_labels(m, s.patch_size)
        found = {("area", ""): labels.mean((1, 2))}
        if runs.has_class_token(s.model):
            with transmix.record_class_attention(model) as attention:
                model(x)
            found["TransMix", ""] = transmix.transmix(labels, attention[0])[:, 0]
        for method, rule in RULES.items():
            with rule(model):
                layers = model.intermediate_labels(x, labels)
            for layer, (tokens, read) in enumerate(layers[1:], 1):
                found[method, layer] = read[:, 0]
                pixels = F.adaptive_avg_pool2d(m, tokens.shape[1:3])[:, 0]
                moved.setdefault((method, layer), []).append(
                    (tokens[..., 0] - pixels).abs().mean().item()
                )
        for key, share in found.items():
            said.setdefault(key, []).append(share.cpu())
        true.append(influence(model, x, torch.stack([1 - m, m], dim=1), [mean])[:, 1].cpu())
    moved = {key: sum(values) / len(values) for key, values in moved.items()}
    return {key: torch.cat(shares) for key, shares in said.items()}, torch.cat(true), moved


def ranks(x):
    """The rank of each number along the last axis; equal ones share theirs."""
    return (x[..., :, None] > x[..., None, :]).sum(-1) + (x[..., :, None] == x[..., None, :]).sum(
        -1
    ) / 2


def scores(said, true, group=2, resamples=1000):
    """Error and rank correlation, each as (value, low, high), of shares (seeds, n) against the
    truth. group: how many neighbours are mixes of the same images, and are drawn together."""
    n = true.shape[1]
    drawn = torch.randint(
        n // group, (resamples, n // group), generator=data.generator("bootstrap")
    )
    times = torch.zeros(resamples, n // group).scatter_add(1, drawn, torch.ones(drawn.shape))
    weight = torch.cat(
        [torch.ones(1, n), times.repeat_interleave(group, dim=1)]
    )  # as it is, then drawn
    seen = ~(said + true).isnan().any(0)
    weight = (weight[:, seen] / weight[:, seen].sum(1, keepdim=True)).double()

    def mean(x):  # (seeds, n) to (1 + resamples, seeds)
        return weight @ x.double().T

    said, true = said[:, seen], true[:, seen]
    a, b = (r - r.mean(1, keepdim=True) for r in (ranks(said), ranks(true)))
    covariance = mean(a * b) - mean(a) * mean(b)
    correlation = covariance / ((mean(a * a) - mean(a) ** 2) * (mean(b * b) - mean(b) ** 2)).sqrt()
    for values in (mean((said - true).abs()).mean(1), correlation.mean(1)):
        yield values[0].item(), *values[1:].quantile(torch.tensor([0.025, 0.975]).double()).tolist()


def cell(value, low, high):
    """A score and its interval as text."""
    return f"{value:.3f} ({low:.3f} to {high:.3f})"


def beyond(said, true, area):
    """Correlation of said - area with true - area, and the factor that fits, of shares (seeds,
    n)."""
    a, b = said - area, true - area
    r = torch.stack([torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(a, b, strict=False)])
    return r.mean().item(), ((a * b).mean(1) / (a * a).mean(1)).mean().item()


def main():
    parser = runs.arguments(__doc__, models=MODELS)
    parser.add_argument("--mixes", type=int, default=1000, help="mixed images to look at [1000]")
    args = runs.parsed(parser)
    sets = runs.open_part(args)
    n = min(args.mixes, len(sets.val)) // 2 * 2
    trained_by = {
        (model, trained): [
            runs.settings(args, sets, model, trained, seed) for seed in range(args.seeds)
        ]
        for model in args.models
        for trained in TRAINED
    }
    runs.train_all([(s, sets) for seeds in trained_by.values() for s in seeds], args)

    last, layers, panels = [], [], []
    for (model, trained), seeds in trained_by.items():
        images, rand = validation(sets, seeds[0], n), data.uniform((n, 3), "mixing ratio")
        mask = tl_align.cutmix_mask(rand, images.shape[-2:], seeds[0].patch_size)
        looks = [look(runs.model_of(s, sets), images, mask, s) for s in seeds]
        truths = {"influence": torch.stack([true for _, true, _ in looks])}
        if args.data == "shapes":
            masks = data.shapes(data.SHAPES_VAL, "val")[2][sets.val.indices[:n], None].float()
            truths["objects"] = objects(masks, torch.stack([1 - mask, mask], dim=1)).expand(
                args.seeds, -1
            )
        depth = max(layer for _, layer in looks[0][2])
        area, found = torch.stack([said["area", ""] for said, _, _ in looks]), {}
        for key in looks[0][0]:
            said = torch.stack([said[key] for said, _, _ in looks])
            found[key] = {name: [*scores(said, true)] for name, true in truths.items()}
            moved = [m[key] for _, _, m in looks if key in m]
            both = [score for truth in found[key].values() for score in truth]
            cells = [cell(*score) for score in both]
            more = [*beyond(said, truths["influence"], area)]
            more.append(sum(moved) / len(moved) if moved else math.nan)
            row = [
                model,
                trained,
                *key,
                *cells,
                *("" if math.isnan(v) else f"{v:.2f}" for v in more),
            ]
            layers.append(row)
            last += [row[:3] + row[4:]] * (key[1] in ("", depth))
        print(f"{model} trained with {trained}: looked at {n} mixes", flush=True)
        for truth in truths:
            series = {
                method: [
                    found.get((method, at), found.get((method, "")))[truth][0]
                    for at in range(1, depth + 1)
                ]
                for method in dict.fromkeys(method for method, _ in found)
            }
            title = f"{model} trained with {trained}: {truth}"
            panels.append((title, [str(at) for at in range(1, depth + 1)], series))
    head = ["model", "trained with", "method", "layer"]
    head += [f"{truth}: {what}" for truth in truths for what in ("error", "rank correlation")]
    head += ["beyond the area: r", "factor", "fluctuation"]
    text = runs.table(head[:3] + head[4:], last)
    text += f"\n{n} mixes of validation images of {args.data}.{runs.made_of(args, sets, SPREAD)}\n"
    label = "error of the share, after each layer; less is better"
    more = "\nAfter each layer:\n\n" + runs.table(head, layers)
    chart = runs.chart(panels, label, columns=len(truths) * len(TRAINED))
    runs.write(args, "mixing_ratio", text, chart, more)


if __name__ == "__main__":
    runs.run(main)
