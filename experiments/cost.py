"""How fast a training step is, and what alignment costs in it.

    python experiments/cost.py             # DeiT-S and Swin-T at 224 px, some minutes on a CPU
    python experiments/cost.py --models deit_tiny deit_small deit_base swin_tiny --img-size 384

Other flags are those of train.py, such as --batch-size, --device and --no-compile. A step is timed
with three targets, by explicit attention (the attention matrix is formed, and labels reuse it) and
by fused attention (a second call for the labels):

    area      the pasted area: the model has no labels
    aligned   TL-Align as this project computes it, one share for each token
    dense     TL-Align with 1000 class labels for each token, as the authors' code has it

and with timm's model of that name, where timm is installed, with the area target. Times are ratios
to the area's with the same attention; timm's, to the area's with explicit attention. Steps are
timed in turn, and ratios taken within a round, so that a busy machine slows all of them alike; ± is
half of a 95 % interval over rounds. Memory, on CUDA, is the peak of a step with weights and
optimizer.
"""

import copy
import statistics
import time
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import nn

import common
import tl_align
import train

NUM_CLASSES = 1000
NUM_IMAGES = 1_281_167  # ImageNet's, for the recipe


def dense_loss(model, images, targets, mask, rand, args):
    """`train.mixed_loss` with class labels at every token and a soft target."""
    one_hot = F.one_hot(targets, NUM_CLASSES).float()[:, None]
    share = tl_align.token_labels(mask, args.patch_size)
    labels = torch.lerp(one_hot, tl_align.partner(one_hot), share)  # (B, N, 1000)
    logits, aligned = model(tl_align.mix(images, mask), labels, rand=rand)
    return F.cross_entropy(logits.float(), aligned, label_smoothing=args.smoothing)


# The loss and --targets of each.
TARGETS = {
    "area": (train.mixed_loss, "area"),
    "aligned": (train.mixed_loss, "tl_align"),
    "dense": (dense_loss, "tl_align"),
}


class Timm(nn.Module):
    """timm's model of a name of ours, called as ours are."""

    depth = 1  # of the random numbers for drop path, which timm draws itself

    def __init__(self, settings):
        super().__init__()
        import timm

        options = {"img_size": settings.img_size, "drop_path_rate": settings.drop_path}
        name = f"{settings.model}_patch16_224"
        if settings.model.startswith("swin"):
            name = f"{settings.model}_patch4_window7_224"
            window_size = train.swin_window_size(settings.img_size, settings.patch_size)
            options["window_size"] = window_size
        self.model = timm.create_model(name, num_classes=NUM_CLASSES, **options)

    def forward(self, images, rand=None):
        return self.model(images)


def make_model(settings, form):
    """The model with "explicit" or "fused" attention, or timm's."""
    if form == "timm":
        return Timm(settings)
    model = train.build_model(settings, NUM_CLASSES)
    for module in model.modules():
        if hasattr(module, "fused"):
            module.fused = form == "fused"
    return model


class Step:
    """A training step that can be repeated."""

    def __init__(self, settings, form, target):
        loss, targets = TARGETS[target]
        settings = copy.copy(settings)
        settings.targets = targets
        self.trainer = train.Trainer(settings, make_model(settings, form), loss)
        shape = (settings.batch_size, 3, settings.img_size, settings.img_size)
        self.images = torch.randint(256, shape, dtype=torch.uint8, device=settings.device)
        self.targets = torch.randint(NUM_CLASSES, shape[:1], device=settings.device)
        self.on_cuda = settings.device == "cuda"

    def run(self, repeats=1):
        for _ in range(repeats):
            self.trainer.train_step(self.images, self.targets, step=0, lr=1e-4)
        if self.on_cuda:
            torch.cuda.synchronize()

    def seconds(self):
        """The mean duration of a step, after one that is not timed."""
        self.run()
        repeats = 10 if self.on_cuda else 1
        start = time.perf_counter()
        self.run(repeats)
        return (time.perf_counter() - start) / repeats

    def peak_memory(self):
        """The most bytes that are allocated during a step, on CUDA, with its weights and the
        optimizer's state, but without those of the other steps that are compared."""
        self.run()  # allocates the optimizer's state
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        self.run()
        own = 3 * sum(4 * p.numel() for p in self.trainer.raw_model.parameters())
        return torch.cuda.max_memory_allocated() - before + own


def make_settings(model, argv):
    """train.py's settings, with ImageNet's recipe but without RandAugment and erasing."""
    argv = ["--data=noise", "--augment=light", "--img-size=224", *argv]  # --data is only a name
    settings = train.parse_args([*argv, f"--model={model}", "--mix=cutmix"])
    train.set_default(settings, "batch_size", 256 if settings.device == "cuda" else 8)
    train.fill_defaults(settings, settings.img_size, NUM_IMAGES)
    train.check_args(settings, NUM_IMAGES)
    return settings


def measure(settings, rounds):
    """The table's rows of a model."""
    torch._dynamo.reset()
    keys = [(form, target) for form in ("explicit", "fused") for target in TARGETS]
    if find_spec("timm") and not settings.model.endswith("micro"):
        keys.append(("timm", "area"))
    steps = {key: Step(settings, *key) for key in keys}
    on_cuda = settings.device == "cuda"
    memory = {key: step.peak_memory() for key, step in steps.items()} if on_cuda else {}
    seconds = {key: [] for key in keys}
    for _ in range(rounds):
        for key, step in steps.items():
            seconds[key].append(step.seconds())

    rows = []
    for form, target in keys:
        own = seconds[form, target]
        area = ("explicit" if form == "timm" else form, "area")
        rate = settings.batch_size / statistics.median(own)
        ratio = common.show([a / b for a, b in zip(own, seconds[area], strict=True)], digits=3)
        row = [settings.model, settings.img_size, form, target, f"{rate:.1f}", ratio]
        if on_cuda:
            own_memory = memory[form, target]
            row += [f"{own_memory / 2**30:.2f}", f"{own_memory / memory[area]:.3f}"]
        rows.append(row)
    return rows


def main():
    parser = train.Parser(description=__doc__.split("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--models", nargs="+", default=["deit_small", "swin_tiny"], choices=train.MODELS)
    add("--rounds", type=train.number(int, 1), default=5, help="[%(default)s]")
    args, argv = parser.parse_known_args()
    torch._dynamo.config.cache_size_limit = 64  # a graph for each step of `measure`

    rows = []
    for model in args.models:
        settings = make_settings(model, argv)
        rows += measure(settings, args.rounds)
    header = ["model", "px", "attention", "target", "images/s", "time / area"]
    if settings.device == "cuda":
        header += ["peak GiB", "memory / area"]
    text = common.markdown_table(header, rows)
    text += f"\nBatch {settings.batch_size}, {args.rounds} rounds, {settings.device}, "
    text += f"torch {torch.__version__}.\n"
    common.write_results("cost", text, "runs/experiments")


if __name__ == "__main__":
    common.main(main)
