"""What alignment costs in a training step, beside the area target and beside dense class labels.

    python experiments/cost.py                    # DeiT-S and Swin-T at 224 px, some minutes on a CPU
    python experiments/cost.py --full             # all models, 224 and 384 px: for a GPU
    python experiments/cost.py --models deit_base --sizes 384 --forms fused --bf16

Four targets in each form of attention are timed in turn, round after round: the area, aligned labels as
this project moves them, one share a token, the same with residuals weighed by norm (`--residual norm`),
and dense labels, (B, N, 1000), as the authors' code does. Of each the fastest round counts, for whatever
else a machine does only adds. "area" is the step with the area target beside that of the first form;
"aligned", "norm" and "dense" are beside the area of their own form. Forms:

    explicit   the attention matrix is made, and labels reuse it
    fused      scaled_dot_product_attention, and a second call without gradient for the labels
    channels   labels as eight further channels of the values, in the one call (ViT only)
    compiled   explicit, under torch.compile

What theory gives stands beside: the labels' own arithmetic as a share of the model's (three times its
forward pass). With N tokens, h heads of d channels and K numbers a label, a layer and image takes

    explicit   h N² + 2 N² K          the mean over heads, and A @ Y
    fused      2 h N² (d + max(d, K))  the scores again, and values as wide as the heads

and no more memory than a few N x N matrices, for nothing of it is kept for the backward pass.
"""

import argparse
import dataclasses
import json
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent.parent))
import tl_align  # noqa: E402
import train as script  # noqa: E402
import vit  # noqa: E402

CLASSES = 1000


def dense_loss(model, images, targets, rand, s):
    """`train.loss_of` with class labels at every token and a soft target."""
    drop = rearrange(rand[:, 3:], "b (depth two) -> b depth two", two=2)
    mask = tl_align.cutmix_mask(rand[:, :3], images.shape[-2:], s.patch_size)
    one_hot = F.one_hot(targets, CLASSES).float()[:, None]
    labels = torch.lerp(one_hot, tl_align.partner(one_hot), tl_align.token_labels(mask, s.patch_size))
    logits, aligned = model(tl_align.mix(images, mask), labels, rand=drop)
    return F.cross_entropy(logits, aligned, label_smoothing=s.smoothing)


def channels(self, x, labels=None):
    """`vit.Attention.forward` with labels as further channels of the values."""
    q, k, v = rearrange(self.qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.heads)
    scale, d = q.shape[-1] ** -0.5, q.shape[-1]
    if labels is not None:
        wide = -(-labels.shape[-1] // 8) * 8
        y = F.pad(labels, (0, wide - labels.shape[-1]))[:, None].expand(-1, self.heads, -1, -1)
        v, q, k = torch.cat([v, y.to(v.dtype)], -1), F.pad(q, (0, wide)), F.pad(k, (0, wide))
    x = F.scaled_dot_product_attention(q, k, v, scale=scale)
    if labels is not None:
        moved = x[..., d : d + labels.shape[-1]].detach().mean(1, dtype=labels.dtype)
        labels = (labels + moved) / 2
    return self.proj(rearrange(x[..., :d], "b h n d -> b n (h d)")), labels


def theory(s, k, fused):
    """Arithmetic of labels of k numbers as a share of the model's, forward and backward."""
    total = 0

    def count(module, args):
        nonlocal total
        *_, windows, n, dim = (1, *args[0].shape[1:])
        pairs, width = windows * n**2, dim // module.heads
        one = 2 * module.heads * pairs * (width + max(width, k))
        total += one if fused else pairs * (module.heads + 2 * k)

    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        model = script.build(s, CLASSES)
        for module in model.modules():
            if hasattr(module, "fused"):
                module.register_forward_pre_hook(count)
        model(torch.empty(1, 3, s.img_size, s.img_size))
    return total / (3 * counter.get_total_flops())


def peak_memory(step, trainer):
    """Bytes that are allocated at most during a step, weights and moments included."""
    if trainer.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
        step()
    with tempfile.TemporaryDirectory() as folder:
        run.export_chrome_trace(f"{folder}/trace.json")
        events = json.loads(Path(f"{folder}/trace.json").read_text())["traceEvents"]
    held = max(e["args"]["Total Allocated"] for e in events if e["name"] == "[memory]")
    return held + 3 * sum(4 * p.numel() for p in trainer.raw.parameters())


# How the target is found: the loss, and what weighs the labels' residual.
WAYS = {
    "area": (script.loss_of, "half"),
    "tl_align": (script.loss_of, "half"),
    "norm": (script.loss_of, "norm"),
    "dense": (dense_loss, "half"),
}


def trainer_of(s, form):
    trainer = script.Trainer(dataclasses.replace(s, compile=form == "compiled"), CLASSES)
    trainer.raw.train()
    for module in trainer.raw.modules():
        if hasattr(module, "fused"):
            module.fused = form == "fused"
        if form == "channels" and isinstance(module, vit.Attention):
            module.forward = channels.__get__(module)
    return trainer


def measure(name, size, forms, args):
    """The rows of the table for one model and size."""
    s = script.Settings(model=name, img_size=size, batch_size=args.batch_size, device=args.device)
    s = dataclasses.replace(s, data="noise", bf16=args.bf16, augment="light")
    s = script.recipe(s, 224, 1_281_167)
    images = torch.randint(256, (s.batch_size, 3, size, size), dtype=torch.uint8, device=s.device)
    labels = torch.randint(CLASSES, (s.batch_size,), device=s.device)
    trainers = {form: trainer_of(s, form) for form in forms}

    def step(form, way):
        trainer, (loss, residual) = trainers[form], WAYS[way]
        targets = "area" if way == "area" else "tl_align"
        trainer.loss, trainer.s = loss, dataclasses.replace(trainer.s, targets=targets)
        for block in trainer.raw.modules():
            if hasattr(block, "residual"):
                block.residual = residual
        trainer.step(images, labels, 0, 1000)

    def seconds(form, way):
        step(form, way)  # not timed: finds memory as the way before it left it
        if s.device == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(args.steps):
            step(form, way)
        if s.device == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - began) / args.steps

    times = {(form, way): [] for form in forms for way in WAYS}
    for _ in range(args.rounds):
        for which, taken in times.items():
            taken.append(seconds(*which))

    def ratio(form, way, than):
        return min(times[form, way]) / min(times[than, "area"])

    for form in forms:
        memory = {way: peak_memory(lambda: step(form, way), trainers[form]) for way in WAYS}
        rate = s.batch_size / min(times[form, "area"])
        cells = [name, size, form, f"{rate:.1f}", f"{ratio(form, 'area', forms[0]):.3f}"]
        cells += [f"{ratio(form, way, form):.3f}" for way in [*WAYS][1:]]
        cells += [f"{memory['area'] / 2**30:.2f}"]
        cells += [f"{memory[way] / memory['area']:.3f}" for way in [*WAYS][1:]]
        for k in (1, CLASSES):
            cells.append("" if form == "channels" else f"{100 * theory(s, k, form == 'fused'):.2f} %")
        yield "| " + " | ".join(map(str, cells)) + " |"


HEAD = """\
| model | px | attention | area: images/s | time: area | aligned | norm | dense | area: peak GiB \
| memory: aligned | norm | dense | arithmetic: aligned | dense |
|---|---|---|---|---|---|---|---|---|---|---|---|---|---|"""


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--full", action="store_true", help="all models, sizes and forms")
    parser.add_argument("--models", nargs="+", default=["deit_small", "swin_tiny"])
    parser.add_argument("--sizes", nargs="+", type=int, default=[224])
    parser.add_argument("--forms", nargs="+", default=["explicit", "fused"])
    parser.add_argument("--batch-size", type=int, help="images a step [8 on the CPU, 256 on CUDA]")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, help="steps timed together [1 on the CPU, 10 on CUDA]")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, help="[on CUDA]")
    parser.add_argument("--out", type=Path, default=Path("runs/cost"))
    args = parser.parse_args()
    cuda = args.device == "cuda"
    args.batch_size = args.batch_size or (256 if cuda else 8)
    args.steps = args.steps or (10 if cuda else 1)
    args.bf16 = cuda if args.bf16 is None else args.bf16
    if args.full:
        args.models = ["deit_tiny", "deit_small", "deit_base", "swin_tiny", "swin_small"]
        args.sizes, args.forms = [224, 384], ["explicit", "fused", "channels", "compiled"]

    rows = [HEAD]
    print(HEAD, flush=True)
    for name in args.models:
        for size in args.sizes:
            forms = [f for f in args.forms if f != "channels" or name.startswith("deit")]
            for row in measure(name, size, forms, args):
                rows.append(row)
                print(row, flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "cost.md").write_text("\n".join(rows) + "\n")
    print(f"\nthe same in {args.out}/cost.md; batch {args.batch_size}, torch {torch.__version__}")


if __name__ == "__main__":
    main()
