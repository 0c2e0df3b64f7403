"""How fast a training step is, and what alignment costs in it.

    python experiments/cost.py             # DeiT-S and Swin-T at 224 px, some minutes on a CPU
    python experiments/cost.py --full      # all models, sizes and forms: for a GPU
    python experiments/cost.py --models deit_base --sizes 384 --forms fused \\
        --ways area aligned --rounds 40

Other flags are those of train.py, such as --batch-size, --device and --no-compile.

Four ways to a target are timed in turn, round after round, in each form of attention: the area,
aligned labels as this project moves them, one share a token, the rule by parts of `weighing.py` on
top of that, and dense labels, (B, N, 1000), as the authors' code does. A ratio is taken within a
round, so that a machine that is busy slows both; the table has the median of the rounds and half of
its 95 % interval, by bootstrap. "area" is the step with the area target beside that of the first
form, others are beside the area of their own form. TFLOP/s are those of the area step, three times
its forward pass; in brackets as a share of what a large matrix product reaches, timed in turn as
well. Forms:

    explicit   the attention matrix is made, and labels reuse it
    fused      scaled_dot_product_attention, and a second call without gradient for the labels
    narrow     the same with labels padded to 8 numbers, where `fused` pads them to a head's width
    flex       the same by flex_attention, with labels padded to 16 numbers
    channels   labels as eight further channels of the values, in the one call (ViT only)
    timm       timm's model of that name, if it is installed, with the area target: the rate to beat

Models are compiled on CUDA, or as --compile says, flex attention always. Arithmetic is the labels'
own as a share of the model's, by count: with N tokens, h heads of d channels and K numbers a label,
a layer takes

    explicit   h N² + 2 N² K      the mean over heads, and A @ Y
    others     2 h N² (d + w)     the scores again, and values w wide: K, padded as said above

but for a ViT's last layer, which computes the class token alone: h N + 2 N K in all forms. The
backward pass needs none of it.
"""

import argparse
import contextlib
import itertools
import json
import math
import os
import statistics
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

os.environ.setdefault(
    "KINETO_LOG_LEVEL", "99"
)  # the profiler need not say that it starts and stops
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from torch.nn.attention.flex_attention import flex_attention
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import runs
import swin  # these three on the path that `models` has set
import tl_align
import vit
import weighing
from runs import data, script

CLASSES = 1000
HEAD = """\
| model | px | attention | area: images/s | TFLOP/s (share) | time: area | aligned | parts | dense \
| area: peak GiB | memory: aligned | parts | dense | arithmetic: aligned | dense |
|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|"""


def dense_loss(model, images, targets, mask, rand, args):
    """`train.mixed_loss` with class labels at every token and a soft target."""
    one_hot = F.one_hot(targets, CLASSES).float()[:, None]
    share = tl_align.token_labels(mask, args.patch_size)
    labels = torch.lerp(one_hot, tl_align.partner(one_hot), share)
    logits, aligned = model(tl_align.mix(images, mask), labels, rand=rand)
    return F.cross_entropy(logits, aligned, label_smoothing=args.smoothing)


# How the target is found: the loss and its --targets.
WAYS = {
    "area": (script.mixed_loss, "area"),
    "aligned": (script.mixed_loss, "tl_align"),
    "parts": (script.mixed_loss, "tl_align"),
    "dense": (dense_loss, "tl_align"),
}

# --------------------------------------------------------------------------------------------------
# Forms of attention. WIDTHS: how wide values are that hold labels of k numbers, beside heads of d.

WIDTHS = {
    "explicit": None,
    "fused": lambda d, k: max(d, k),
    "narrow": lambda d, k: -(-k // 8) * 8,
    "flex": lambda d, k: max(16, 2 ** math.ceil(math.log2(k))),
    "channels": lambda d, k: -(-k // 8) * 8,
    "timm": None,
}


def attend_by(attend, width):
    """`tl_align.attend_fused` by another attention, with values of another width."""

    def attend_fused(labels, q, k, bias=None):
        if labels is None:
            return None
        windows, n = labels.shape[1] if labels.dim() == 4 else 1, labels.shape[-1]
        heads, bias = q.shape[1] // windows, bias if bias is None else bias.detach()
        y = F.pad(labels, (0, width(q.shape[-1], n) - n)).to(q.dtype)
        y = y.reshape(len(y), windows, 1, *y.shape[-2:]).repeat(1, 1, heads, 1, 1).flatten(1, 2)
        y = attend(q.detach(), k.detach(), y, bias)[..., :n].unflatten(1, (windows, heads))
        return y.mean(2, dtype=labels.dtype).reshape(labels.shape)

    return attend_fused


@torch.compile(dynamic=False)
def flex(q, k, v, bias):
    """`F.scaled_dot_product_attention` by flex attention."""

    def biased(score, b, h, i, j):
        return score + bias[h, i, j]

    return flex_attention(q, k, v, score_mod=None if bias is None else biased)


ATTEND = {
    "narrow": attend_by(F.scaled_dot_product_attention, WIDTHS["narrow"]),
    "flex": attend_by(flex, WIDTHS["flex"]),
}


def channels(self, x, labels=None, class_only=False):
    """`vit.Attention.forward` with labels as further channels of the values."""
    if class_only:
        return vit.Attention.forward(self, x, labels, class_only)
    q, k, v = rearrange(self.qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.num_heads)
    scale, d = q.shape[-1] ** -0.5, q.shape[-1]
    if labels is not None:
        wide = WIDTHS["channels"](d, labels.shape[-1])
        y = F.pad(labels, (0, wide - labels.shape[-1]))[:, None].expand(-1, self.num_heads, -1, -1)
        v, q, k = torch.cat([v, y.to(v.dtype)], -1), F.pad(q, (0, wide)), F.pad(k, (0, wide))
    x = F.scaled_dot_product_attention(q, k, v, scale=scale)
    if labels is not None:
        labels = x[..., d : d + labels.shape[-1]].detach().mean(1, dtype=labels.dtype)
    return self.proj(rearrange(x[..., :d], "b h n d -> b n (h d)")), labels


class Timm(nn.Module):
    """timm's model of a name of ours, to be called as ours are."""

    depth = 1  # drop path finds its own random numbers

    def __init__(self, s):
        super().__init__()
        import timm

        kwargs = {"img_size": s.img_size, "num_classes": CLASSES, "drop_path_rate": s.drop_path}
        name = f"{s.model}_patch16_224"
        if s.model.startswith("swin"):
            name = f"{s.model}_patch4_window7_224"
            kwargs["window_size"] = script.swin_window_size(s.img_size, s.patch_size)
        self.model = timm.create_model(name, **kwargs)

    def forward(self, images, rand=None):
        return self.model(images)


def trainer_of(s, form):
    model = Timm(s) if form == "timm" else script.build_model(s, CLASSES)
    for module in model.modules():
        if isinstance(module, (vit.Attention, swin.WindowAttention)):
            module.fused = form != "explicit"
        if form == "channels" and isinstance(module, vit.Attention):
            module.forward = channels.__get__(module)
    return script.Trainer(s, model)


# --------------------------------------------------------------------------------------------------
# What is measured.


def arithmetic(s, form, k):
    """Operations for an image: the model's, forward and backward, and the labels', of k numbers."""
    total = 0

    def count(module, args, output):
        nonlocal total
        *_, windows, n, dim = (1, *args[0].shape[1:])
        rows, h = output[0].shape[-2], module.num_heads
        pairs = windows * n * rows
        explicit = WIDTHS[form] is None or rows < n  # the class token's row is always formed
        width = None if explicit else WIDTHS[form](dim // h, k)
        total += 2 * h * pairs * (dim // h + width) if width else pairs * (h + 2 * k)

    model = script.build_model(s, CLASSES).to("meta")
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        for module in model.modules():
            if isinstance(module, (vit.Attention, swin.WindowAttention)):
                module.register_forward_hook(count)
        model(torch.empty(1, 3, s.img_size, s.img_size))
    return 3 * counter.get_total_flops(), total


def peak_memory(step, trainer):
    """Bytes that are allocated at most during a step, weights and moments included."""
    if trainer.args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()  # of all trainers
        step()
        held = torch.cuda.max_memory_allocated() - before
    else:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
            step()
        with tempfile.TemporaryDirectory() as folder:
            run.export_chrome_trace(f"{folder}/trace.json")
            events = json.loads(Path(f"{folder}/trace.json").read_text())["traceEvents"]
        held = max(e["args"]["Total Allocated"] for e in events if e["name"] == "[memory]")
    return held + 3 * sum(4 * p.numel() for p in trainer.raw_model.parameters())


def interval(ratios):
    """Median, and half of its 95 % interval by bootstrap, of which one round has none."""
    n, middle = len(ratios), f"{statistics.median(ratios):.3f}"
    if n < 2:
        return middle
    drawn = torch.randint(n, (2000, n), generator=data.generator("bootstrap"))
    medians = torch.tensor(ratios)[drawn].quantile(0.5, dim=1)
    low, high = medians.quantile(torch.tensor([0.025, 0.975])).tolist()
    return f"{middle} ± {(high - low) / 2:.3f}"


def settings(name, size, more):
    """Those of a model and a size of images. more: flags of train.py."""
    flags = ["--data=noise", f"--model={name}", f"--img-size={size}"]
    s = script.parse_args(["--augment=light", "--mix-prob=1", *more, *flags])
    script.set_default(s, "batch_size", 256 if s.device == "cuda" else 8)
    script.fill_defaults(s, size, 1_281_167)
    script.check_args(s, 1_281_167)
    return s


def measure(s, args):
    """The rows of the table for the model and the size of these settings."""
    forms = [f for f in args.forms if f != "channels" or not s.model.startswith("swin")]
    images = torch.randint(
        256, (s.batch_size, 3, s.img_size, s.img_size), dtype=torch.uint8, device=s.device
    )
    labels = torch.randint(CLASSES, (s.batch_size,), device=s.device)
    torch._dynamo.reset()
    trainers = {form: trainer_of(s, form) for form in forms}
    side, most, wait = (
        (8192, 10, torch.cuda.synchronize) if s.device == "cuda" else (2048, 1, lambda: None)
    )
    repeat = args.steps or most
    matrix = torch.randn(
        side, side, device=s.device, dtype=torch.bfloat16 if s.bf16 else torch.float32
    )

    def step(form, way):
        trainer = trainers[form]
        trainer.loss, s.targets = WAYS[way]
        rule = (
            weighing.by(trainer.raw_model, "parts") if way == "parts" else contextlib.nullcontext()
        )
        attend_fused = ATTEND.get(form, tl_align.attend_fused)
        with rule, mock.patch.object(tl_align, "attend_fused", attend_fused):
            trainer.train_step(images, labels, 0, script.lr_at(0, s, 1000))

    def seconds(action, *which):
        action(*which)  # not timed: finds memory as the way before it left it
        wait()
        began = time.perf_counter()
        for _ in range(repeat):
            action(*which)
        wait()
        return (time.perf_counter() - began) / repeat

    times = {(f, way): [] for f in forms for way in args.ways if f != "timm" or way == "area"}
    memory, products = {}, []
    for form, way in times:
        try:
            step(form, way)  # compiles, and makes the moments
            memory[form, way] = peak_memory(lambda: step(form, way), trainers[form])
        except RuntimeError as e:  # out of memory, or a kernel that is not made for these sizes
            reason = " ".join(str(e).split())[:200]
            print(f"{s.model}, {s.img_size} px, {form}, {way}: {reason}", file=sys.stderr)
            trainers[form].optimizer.zero_grad()
    for round in range(args.rounds):
        for which in list(memory)[:: -1 if round % 2 else 1]:
            times[which].append(seconds(step, *which))
        products.append(2 * side**3 / seconds(lambda: matrix @ matrix))

    def cell(of, *which):
        fits = all(w in memory for w in which)
        return of(*which) if fits else "" if which[0] not in times else "failed"

    def time_of(which, area):
        return interval([a / b for a, b in zip(times[which], times[area], strict=False)])

    def rate_of(area):
        rates = [whole * s.batch_size / t for t in times[area]]
        share = statistics.median(a / b for a, b in zip(rates, products, strict=False))
        return f"{statistics.median(rates) / 1e12:.2f} ({share:.0%})"

    for form in forms:
        area, others = (form, "area"), [(form, way) for way in WAYS if way != "area"]
        (whole, aligned), (_, dense) = (arithmetic(s, form, k) for k in (1, CLASSES))
        cells = [s.model, s.img_size, form]
        cells += [cell(lambda a: f"{s.batch_size / statistics.median(times[a]):.1f}", area)]
        cells += ["" if form == "timm" else cell(rate_of, area)]  # of our model, that is
        cells += [cell(time_of, area, (forms[0], "area"))]
        cells += [cell(time_of, which, area) for which in others]
        cells += [cell(lambda a: f"{memory[a] / 2**30:.2f}", area)]
        cells += [
            cell(lambda w, a: f"{memory[w] / memory[a]:.3f}", which, area) for which in others
        ]
        cells += [
            "" if form == "timm" else f"{100 * part / whole:.2f} %" for part in (aligned, dense)
        ]
        yield "| " + " | ".join(map(str, cells)) + " |"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--full", action="store_true", help="all models, sizes and forms")
    names = [name for name in script.MODELS if name.startswith(("vit", "deit", "swin"))]
    parser.add_argument("--models", nargs="+", default=["deit_small", "swin_tiny"], choices=names)
    parser.add_argument("--sizes", nargs="+", type=int, default=[224])
    parser.add_argument("--forms", nargs="+", default=["explicit", "fused"], choices=WIDTHS)
    parser.add_argument("--ways", nargs="+", default=[*WAYS], choices=WAYS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, help="steps timed together [1 on the CPU, 10 on CUDA]")
    parser.add_argument("--out", type=Path, default=Path("runs/cost"))
    args, more = parser.parse_known_args()
    if args.full:
        args.models = ["deit_tiny", "deit_small", "deit_base", "swin_tiny", "swin_small"]
        args.sizes, args.forms = [224, 384], [f for f in WIDTHS if f != "timm" or find_spec("timm")]
    args.ways = ["area", *(way for way in args.ways if way != "area")]
    torch._dynamo.config.skip_nnmodule_hook_guards = False  # the rule by parts is hooks
    torch._dynamo.config.cache_size_limit = 64  # each form and way is a graph of its own,
    torch._dynamo.config.automatic_dynamic_shapes = False  # with shapes that are known

    every = [
        settings(name, size, more) for name, size in itertools.product(args.models, args.sizes)
    ]
    args.out.mkdir(parents=True, exist_ok=True)
    with (args.out / "cost.md").open("w", buffering=1) as table:
        for row in itertools.chain([HEAD], *(measure(s, args) for s in every)):
            print(row, file=table)
            print(row, flush=True)
    print(
        f"\nthe same in {args.out}/cost.md; batch {every[0].batch_size}, torch {torch.__version__}"
    )


if __name__ == "__main__":
    runs.run(main, "")
