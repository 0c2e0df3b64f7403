"""Other rules for labels: are they nearer to the truth, and are they better targets?

    python experiments/beyond/rules.py                   # built-in images, 20 minutes on a core
    python experiments/beyond/rules.py --targets area TL-Align --seeds 24
    python experiments/beyond/rules.py --targets area --data cifar10 --images 10000 --passes 20 \\
        --batch-size 128

The paper's rule, Y = (Y + A @ Y) / 2, assumes that a layer's branch and its skip connection weigh
the same, and that an attention weight tells how much a token contributes. Two rules measure it:

    norm    Y = (1 - w) Y + w A @ Y    with w = |branch| / (|branch| + |x|)
    parts   Y = (1 - w) Y + w P        with P_k = |part_k| / (|part_1| + |part_2|)

The branch is what the layer adds to a token x, and part_k is what the layer makes of the values
times the share Y_k: W A (V * Y_k) in an attention. The activations of other layers are held fixed,
so that all are linear, and biases belong to no source. Where tokens are merged or pooled there is
no skip connection, and Y = P. Neither rule is part of the published method.

ViT, Swin, Mixer and ConvNeXt are trained with the area target and with the rules as targets: first
table. Second table: the mean absolute error of the share that each rule assigns to the pasted image
in models trained with the area. There are several truths: the influence of `mixing_ratio.py`, which
depends on what stands in for a source that is taken away, the mean patch or other images; and the
known objects of the built-in images. ± is half of a 95 % interval over seeds.
"""

import itertools
import sys
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange

sys.path.append(str(Path(__file__).resolve().parent.parent))
import common
import compare
import convnext
import data
import mixer
import mixing_ratio
import swin
import tl_align
import train
import vit

# The models, each with the one of train.py whose settings it is trained with.
MODELS = {
    "vit_micro": (vit.vit_micro, "vit_micro"),
    "swin_micro": (swin.swin_micro, "swin_micro"),
    "mixer_micro": (mixer.mixer_micro, "vit_micro"),
    "convnext_micro": (convnext.convnext_micro, "swin_micro"),
}
NUM_MIXES = 600  # on which errors are measured
NUM_OTHERS = 4  # images that stand in for a source

# ------------------------------------------------------------------------------------------------
# What the layers move between tokens. Labels have a column for each source, (B, ..., K), and rows
# that sum to one.


class Moved(NamedTuple):
    branch: torch.Tensor  # (B, ..., C), added to the tokens; None without a skip connection
    labels: torch.Tensor  # (B, ..., K), A @ Y
    parts: torch.Tensor  # (B, ..., K, C)


def attention_parts(attn, x, labels, bias=0.0):
    """Attention within windows. x: (B, windows, n, C). Returns (B, windows, n, K, C)."""
    q, k, v = rearrange(
        attn.qkv(x), "b w n (three h d) -> three b w h n d", three=3, h=attn.num_heads
    )
    matrix = (q * q.shape[-1] ** -0.5 @ k.mT + bias).softmax(-1)
    parts = torch.einsum("bwhmd,bwmk,bwhnm->bwnkhd", v, labels, matrix)
    return F.linear(parts.flatten(-2), attn.proj.weight)


def convolution_parts(conv, x, labels):
    """A convolution of maps. x: (B, H, W, C). Returns (B, H, W, K, C)."""
    x = rearrange(torch.einsum("bhwc,bhwk->bkchw", x, labels), "b k c h w -> (b k) c h w")
    x = F.conv2d(x, conv.weight, None, conv.stride, conv.padding, groups=conv.groups)
    return rearrange(x, "(b k) c h w -> b h w k c", k=labels.shape[-1])


def move_vit(block, x, labels):
    x = block.norm1(x)
    branch, attended = block.attn(x, labels)
    return Moved(branch, attended, attention_parts(block.attn, x[:, None], labels[:, None])[:, 0])


def move_swin(block, x, labels):
    size = x.shape[1:3]
    window_size, shift = block.window_size, block.shift(size)
    mask = swin.window_mask(size, window_size, shift, x.device)
    x = swin.window_partition(block.norm1(x), window_size, shift)
    labels = swin.window_partition(labels, window_size, shift)
    branch, attended = block.attn(x, labels, mask)
    parts = attention_parts(block.attn, x, labels, block.attn.attention_bias(mask))
    branch = swin.window_reverse(branch, window_size, shift, size)
    attended = swin.window_reverse(attended, window_size, shift, size)
    parts = swin.window_reverse(parts.flatten(-2), window_size, shift, size)
    return Moved(branch, attended, parts.unflatten(-1, (labels.shape[-1], -1)))


def move_mixer(block, x, labels):
    x, mlp = block.norm1(x).mT, block.mlp_tokens  # (B, C, N)
    gate = torch.special.ndtr(mlp.fc1(x))  # (B, C, hidden): gelu(h) = h * ndtr(h)
    parts = F.linear(torch.einsum("bcn,bnk->bkcn", x, labels), mlp.fc1.weight)
    parts = F.linear(parts * gate[:, None], mlp.fc2.weight)  # (B, K, C, N)
    matrix = block.mixing_matrix().expand(len(labels), 1, -1, -1)
    mixed = tl_align.attend(labels, matrix)
    return Moved(mlp(x).mT, mixed, rearrange(parts, "b k c n -> b n k c"))


def move_convnext(block, x, labels):
    mixed = convnext.attend(labels, block.dwconv.weight)
    return Moved(block.branch(x), mixed, convolution_parts(block.dwconv, x, labels))


def move_downsample(layer, x, labels):
    norm, conv = layer
    return Moved(None, layer(x, labels)[1], convolution_parts(conv, norm(x), labels))


def move_merging(layer, x, labels):
    tokens = layer.norm(swin.merge_tokens(x)).unflatten(-1, (4, -1))  # (B, H / 2, W / 2, 4, C)
    shares = swin.merge_tokens(labels).unflatten(-1, (4, -1))  # (B, H / 2, W / 2, 4, K)
    parts = torch.einsum("bhwic,bhwik->bhwkic", tokens, shares).flatten(-2)
    return Moved(None, layer(x, labels)[1], layer.reduction(parts))


def pool(model, x, labels):
    """The average of all tokens that the head reads."""
    is_convnext = isinstance(model, convnext.ConvNeXt)  # its norm comes after the average
    x = (x if is_convnext else model.norm(x)).flatten(1, -2)  # (B, N, C)
    labels = labels.flatten(1, -2)
    parts = torch.einsum("bnc,bnk->bkc", x, labels) / x.shape[1]
    if is_convnext:
        parts = (parts - parts.mean(-1, keepdim=True)) * model.norm.weight
    return Moved(None, labels.mean(1), F.linear(parts, model.head.weight))


MOVE = {
    vit.Block: move_vit,
    swin.Block: move_swin,
    swin.PatchMerging: move_merging,
    mixer.Block: move_mixer,
    convnext.Block: move_convnext,
    convnext.Downsample: move_downsample,
}


# ------------------------------------------------------------------------------------------------
# The rules: functions of a layer's tokens, their labels, and what the layer moves.


def paper_rule(x, labels, moved):
    return moved.labels if moved.branch is None else tl_align.residual(labels, moved.labels)


def norm_rule(x, labels, moved):
    return weigh_skip(x, labels, moved.branch, moved.labels)


def parts_rule(x, labels, moved):
    sizes = moved.parts.norm(dim=-1)  # (B, ..., K)
    total = sizes.sum(-1, keepdim=True)
    shares = torch.where(total > 1e-12, sizes / total, moved.labels)
    return weigh_skip(x, labels, moved.branch, shares)


def weigh_skip(x, labels, branch, arrived):
    if branch is None:
        return arrived
    branch_size = branch.norm(dim=-1, keepdim=True)
    weight = branch_size / (branch_size + x.norm(dim=-1, keepdim=True)).clamp(min=1e-12)
    return torch.lerp(labels, arrived, weight)


RULES = {"TL-Align": paper_rule, "norm": norm_rule, "parts": parts_rule}


def layers(model):
    """The layers that move information between tokens, in their order."""
    if isinstance(model, convnext.ConvNeXt):
        return model.layers()
    return [module for module in model.modules() if type(module) in MOVE]


@torch.no_grad()
def align(model, images, labels, rule):
    """The label of what the head reads, (B, 1), by a rule. The model must have no drop path.

    images, labels: as for the model; labels have one column, the partner's share.
    """
    with torch.autocast(images.device.type, enabled=False):
        x, labels = model.embed(images, torch.cat([1 - labels, labels], dim=-1))
        for layer in layers(model):
            moved = MOVE[type(layer)](layer, x, labels)
            labels = rule(x, labels, moved)
            x, _ = layer(x)
        if isinstance(model, vit.ViT):
            return labels[:, 0, 1:]  # the class token's
        return rule(x, labels, pool(model, x, labels))[:, 1:]


def rule_loss(model, images, targets, mask, rand, args):
    """A loss for `train.train` with the label of the rule args.rule as the target. Arguments as for
    `train.mixed_loss`; the model must not be compiled."""
    mixed = tl_align.mix(images, mask)
    labels = tl_align.token_labels(mask, args.patch_size)
    share = align(model, mixed, labels, RULES[args.rule])
    logits = model(mixed, rand=rand)
    return tl_align.mixed_cross_entropy(logits.float(), targets, share, args.smoothing)


# ------------------------------------------------------------------------------------------------
# Training.

# What differs in the settings, for each target.
TARGETS = {
    "area": {"targets": "area"},
    "TL-Align": {"targets": "tl_align"},
    "norm": {"rule": "norm"},
    "parts": {"rule": "parts"},
}


def make_runs(args):
    """{(model, target, seed): settings}."""
    runs = {}
    for seed, model, target in itertools.product(range(args.seeds), args.models, args.targets):
        own = {"architecture": model, "model": MODELS[model][1], "seed": seed, "clutter": 0.0}
        own |= TARGETS[target]
        label = f"{model}-{target}"
        runs[model, target, seed] = common.make_run(args, compare.open_datasets, label, **own)
    return runs


def make_model(settings, num_classes):
    torch.manual_seed(settings.seed)
    model_class, _ = MODELS[settings.architecture]
    sizes = {"img_size": settings.img_size, "patch_size": settings.patch_size}
    return model_class(num_classes=num_classes, **sizes)


def train_run(settings):
    datasets = compare.open_datasets(settings)
    model = make_model(settings, len(datasets.classes))
    loss = rule_loss if hasattr(settings, "rule") else train.mixed_loss
    common.train_run(settings, datasets, model, loss=loss)


# ------------------------------------------------------------------------------------------------
# The shares that rules assign to the pasted image, and the truths.


def predict_shares(model, mixed, mask):
    """{rule: (n,)}."""
    labels = tl_align.token_labels(mask, model.patch_size)
    shares = {"area": labels.mean((1, 2))}
    for name, rule in RULES.items():
        shares[name] = align(model, mixed, labels, rule)[:, 0]
    return shares


@torch.no_grad()
def measure_run(settings):
    """The shares and the truths of a run's model, {rule: (n,)} and {truth: (n,)}. Every run is
    shown the same mixes."""
    datasets = compare.open_datasets(settings)
    model = common.load_model(settings, make_model(settings, len(datasets.classes)))
    mixes = mixing_ratio.make_mixes(datasets.val, NUM_MIXES, settings, "rules")
    others = choose_others(mixes.images)
    truths = {
        "mean patch": mixing_ratio.influence(model, mixes.mixed, mixes.mask, [mixes.blank]),
        "other images": mixing_ratio.influence(model, mixes.mixed, mixes.mask, others),
    }
    if mixes.objects is not None:
        truths["objects"] = mixes.objects
    return predict_shares(model, mixes.mixed, mixes.mask), truths


def choose_others(images):
    """For each image several of the others, none of which is its partner."""
    distance = len(images) // (NUM_OTHERS + 1)
    if distance < 2:
        raise data.UserError(f"there must be {2 * NUM_OTHERS + 2} validation images to mix")
    return [images.roll(distance * i, 0) for i in range(1, NUM_OTHERS + 1)]


def make_error_rows(measured):
    """A row per rule: the mean absolute error from each truth. measured: what `measure_run` gives,
    of each seed."""
    rows = []
    for rule in measured[0][0]:
        shares = torch.stack([shares[rule] for shares, _ in measured])
        errors = []
        for truth in measured[0][1]:
            truths = torch.stack([truths[truth] for _, truths in measured])
            errors.append(common.show(mixing_ratio.errors(shares, truths), digits=3))
        rows.append([rule, *errors])
    return rows


def main():
    parser = common.make_image_parser(__doc__, MODELS, MODELS)
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=TARGETS)
    args = parser.parse_args()
    args.targets = list(dict.fromkeys(["area", *args.targets]))
    runs = make_runs(args)
    common.run_all(train_run, runs.values(), args.jobs)

    accuracy, errors = [], []
    for model in args.models:
        top1 = common.read_results(runs, model, args.targets, args.seeds)
        accuracy += [[model, *row] for row in common.make_rows(top1, "area")]
        measured = [measure_run(runs[model, "area", seed]) for seed in range(args.seeds)]
        errors += [[model, *row] for row in make_error_rows(measured)]
    text = common.markdown_table(["model", "target", "top-1 %", "difference to area"], accuracy)
    header = ["model", "rule", *(f"error: {truth}" for truth in measured[0][1])]
    text += "\n" + common.markdown_table(header, errors)
    num_mixes = len(measured[0][0]["area"])
    text += f"\n{num_mixes} mixes. {common.describe(args)}\n"
    common.write_results("rules", text, args.runs)


if __name__ == "__main__":
    common.main(main)
