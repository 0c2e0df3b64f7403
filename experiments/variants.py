"""Two ideas that the main files leave out, held against the truth of `mixing_ratio.py`.

    python experiments/variants.py                                      # built-in images, minutes on a CPU
    python experiments/variants.py --data cifar10 --images 100 --batch-size 50         # runs of compare.py

three images   Two boxes from two other images. Labels carry three shares a token; the rule is the same.
drop path      Where stochastic depth (rate 0.2) drops the attention of a sample, its tokens stay where they
               are, and so should its labels: "seen" moves none there, TL-Align as it is moves them all
               the same. The truth is that of the network with what is dropped.

Error and rank correlation are those of the share of the (first) pasted image, the truth its influence.
"""

import torch

import mixing_ratio
import residual
import runs
import swin  # on the path that `runs` has set
import tl_align
import vit
from runs import data

RATE = 0.2


def three_images(model, images, s):
    """What each method says of the second of three sources, {method: (n,)}, and the truth, (n,)."""
    n = len(images)
    rand = (data.uniform((n, 3), "three", k) for k in (1, 2))
    first, second = (tl_align.cutmix_mask(r, images.shape[-2:], s.patch_size) for r in rand)
    owners = torch.cat([(1 - first) * (1 - second), first * (1 - second), second], dim=1)
    of_three = images.unflatten(0, (-1, 3))
    mixed = sum(of_three.roll(-k, dims=1).flatten(0, 1) * owners[:, k : k + 1] for k in range(3))
    labels = torch.cat([tl_align.token_labels(m[:, None], s.patch_size) for m in owners.unbind(1)], dim=-1)
    mean = mixing_ratio.mean_patch(images, s)
    mixed, owners, labels, mean = (t.to(s.device) for t in (mixed, owners, labels, mean))
    said = {"area": labels.mean(1)}
    if not s.model.startswith("swin"):
        said["TransMix"] = tl_align.transmix(labels, model(mixed, looks=True)[1])
    for method, rule in mixing_ratio.RULES.items():
        with rule(model):
            said[method] = model(mixed, labels)[1]
    true = mixing_ratio.influence(model, mixed, owners, mean)[:, 1]
    return {method: shares[:, 1].cpu() for method, shares in said.items()}, true.cpu()


def stay(block, args, output):
    """A hook on a block: labels stay where the attention is dropped."""
    _, labels, keep, *_ = args
    x, aligned = output  # a ViT's last block gives its first row alone
    return x, torch.where(keep[0] > 0, aligned, labels[:, : aligned.shape[1]])


def drop_path(model, images, s):
    """The same of two sources, under drop path."""
    mask = tl_align.cutmix_mask(data.uniform((len(images), 3), "drop"), images.shape[-2:], s.patch_size)
    rand = data.uniform((len(images), model.depth, 2), "drop path").to(s.device)
    mixed, mask, mean = (
        t.to(s.device) for t in (tl_align.mix(images, mask), mask, mixing_ratio.mean_patch(images, s))
    )
    labels = tl_align.token_labels(mask, s.patch_size)
    before, model.drop_path = model.drop_path, RATE
    model.train()  # drop path is all that training changes in these models
    said = {"area": labels.mean(1)}
    said["TL-Align"] = model(mixed, labels, rand=rand)[1]
    blocks = [m for m in model.modules() if isinstance(m, (vit.Block, swin.Block))]
    hooks = [b.register_forward_hook(stay) for b in blocks]
    said["TL-Align, seen"] = model(mixed, labels, rand=rand)[1]
    for hook in hooks:
        hook.remove()
    with residual.by_norm(model):  # sees by itself: what is dropped adds nothing
        said["TL-Align, norm"] = model(mixed, labels, rand=rand)[1]
    owners = torch.cat([1 - mask, mask], dim=1)
    true = mixing_ratio.influence(lambda x: model(x, rand=rand), mixed, owners, mean)[:, 1]
    model.drop_path = before
    model.eval()
    return {method: shares[:, 0].cpu() for method, shares in said.items()}, true.cpu()


def main():
    parser = runs.arguments(__doc__)
    parser.add_argument("--mixes", type=int, default=600, help="mixed images to look at [600]")
    args = runs.parsed(parser)
    sets = runs.open_part(args)
    n = min(args.mixes, len(sets.val)) // 6 * 6
    trained = {
        (model, way): [runs.settings(args, sets, model, way, seed) for seed in range(args.seeds)]
        for model in args.models
        for way in mixing_ratio.TRAINED
    }
    runs.train_all([(s, sets) for seeds in trained.values() for s in seeds], args)

    rows, panels = [], []
    for (model, way), seeds in trained.items():
        images, _ = mixing_ratio.mixes(sets, seeds[0], n)
        for name, look, group in (("three images", three_images, 3), ("drop path", drop_path, 2)):
            looks = [look(runs.model_of(s, sets), images, s) for s in seeds]
            true, points = torch.stack([true for _, true in looks]), []
            for method in looks[0][0]:
                said = torch.stack([said[method] for said, _ in looks])
                both = [*mixing_ratio.scores(said, true, group)]
                cells = [f"{value:.3f} ({low:.3f} to {high:.3f})" for value, low, high in both]
                rows.append([model, way, name, method, *cells])
                points.append(both[0])
            panels.append((f"{model} trained with {way}: {name}", [*looks[0][0]], {"error": points}))
    text = runs.table(["model", "trained with", "variant", "method", "error", "rank correlation"], rows)
    text += (
        f"\n{n} mixes of validation images of {args.data}.{runs.made_of(args, sets, mixing_ratio.SPREAD)}\n"
    )
    chart = runs.chart(panels, "error of the share; less is better", columns=4, joined=False)
    runs.write(args, "variants", text, chart)


if __name__ == "__main__":
    runs.run(main)
