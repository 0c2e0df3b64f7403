"""What is a backbone trained with aligned targets worth for segmentation? (the paper's Table 3)

    python experiments/segmentation.py                          # built-in scenes, minutes on a CPU
    torchrun --nproc-per-node 8 experiments/segmentation.py --data /ade20k --workers 4 \\
        --checkpoints area/best.pt tl_align/best.pt             # the first is the baseline

By default models are trained on five classes of the built-in set, with the area target and with
aligned targets, and then fine-tuned on scenes with objects of the other five; one from scratch
stands beside them. With --data ROOT and --checkpoints the same is done with what is given, by the
recipe of the paper's baseline: UperNet, 160,000 steps of 16 crops of 512 px (but without its
auxiliary head). ROOT is laid out as VOC (ImageSets/Segmentation, JPEGImages, SegmentationClass), as
ADE20K (images/training, annotations/training and validation; 0 is not labelled), or plainly
(train/images, train/masks, val/images, val/masks). Masks are PNGs of class numbers from 0, which a
file classes.txt may name; 255 is not labelled.
"""

import functools
import io
import random
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF
from torchvision.tv_tensors import Image as Picture
from torchvision.tv_tensors import Mask
from torchvision.utils import draw_segmentation_masks, save_image

import annotated
import dense
import runs
from annotated import IGNORED
from runs import data, script

SMALL = {"size": 64, "steps": 150, "batch_size": 16, "lr": 1e-3, "weight_decay": 0.05, "warmup": 20}
SMALL |= {"drops": [], "zoom": 1.25, "width": 64, "slide": False}
LARGE = {
    "size": 512,
    "steps": 160_000,
    "batch_size": 16,
    "lr": 6e-5,
    "weight_decay": 0.01,
    "warmup": 1500,
}
LARGE |= {"drops": [], "zoom": 2, "width": 512, "slide": False}


class Sum(torch.autograd.Function):
    """The sum of a tensor over all processes, and of its gradient."""

    forward = backward = staticmethod(lambda ctx, x: dense.total(x.clone()))


class BatchNorm(nn.BatchNorm2d):
    """Batch norm over the images of all processes, on any device, and of a single value too."""

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        count = dense.total(torch.tensor(float(x.numel() // x.shape[1]), device=x.device))
        x = x.float()
        mean = Sum.apply(x.sum((0, 2, 3))) / count
        x = x - mean.view(1, -1, 1, 1)
        var = Sum.apply(x.square().sum((0, 2, 3))) / count
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * count / (count - 1).clamp(min=1), self.momentum)
        x = x * (self.weight * (var + self.eps).rsqrt()).view(1, -1, 1, 1)
        return x + self.bias.view(1, -1, 1, 1)


def conv(inside, outside, size=1):
    layers = {"conv": nn.Conv2d(inside, outside, size, padding=size // 2, bias=False)}
    layers |= {"batch_norm": BatchNorm(outside), "activation": nn.ReLU()}
    return nn.Sequential(OrderedDict(layers))


def resize(x, size):
    return F.interpolate(x, size, mode="bilinear", align_corners=False)


class UperNet(nn.Module):
    """Classes of pixels from maps of several strides (Xiao et al. 2018, arXiv 1807.10221): the last
    is pooled at four scales, each is added to the one above it, and all are read together. Names as
    in transformers."""

    def __init__(self, channels, classes, width=512):
        super().__init__()
        *above, last = channels
        pools = [nn.Sequential(nn.AdaptiveAvgPool2d(n), conv(last, width)) for n in (1, 2, 3, 6)]
        self.psp_modules = nn.ModuleList(pools)
        self.bottleneck = conv(last + len(pools) * width, width, 3)
        self.lateral_convs = nn.ModuleList(conv(c, width) for c in above)
        self.fpn_convs = nn.ModuleList(conv(width, width, 3) for _ in above)
        self.fpn_bottleneck = conv(len(channels) * width, width, 3)
        self.classifier = nn.Conv2d(width, classes, 1)

    def forward(self, maps):
        """maps: as `dense.Levels` gives them. Returns logits, (B, classes, H, W) of the first map's
        size."""
        *above, last = maps
        pooled = [resize(pool(last), last.shape[2:]) for pool in self.psp_modules]
        rows = [self.bottleneck(torch.cat([last, *pooled], dim=1))]
        for x, lateral in zip(reversed(above), reversed(self.lateral_convs), strict=False):
            rows.insert(0, lateral(x) + resize(rows[0], x.shape[2:]))
        rows = [*map(lambda f, x: f(x), self.fpn_convs, rows), rows[-1]]
        rows = [resize(x, maps[0].shape[2:]) for x in rows]
        return self.classifier(self.fpn_bottleneck(torch.cat(rows, dim=1)))


class Segmenter(nn.Module):
    """Levels and what reads them: logits of images, or, given masks, the loss as its sum and
    pixels."""

    def __init__(self, s, classes):
        super().__init__()
        torch.manual_seed(s.seed)
        self.levels = dense.Levels(s)
        self.head = UperNet(self.levels.channels, classes, s.width)
        if s.size % (patch := self.levels.backbone.patch_size):
            raise data.UserError(
                f"--size must be a multiple of the {patch} px of a patch, got {s.size}"
            )

    def forward(self, images, known=None, names=()):
        images = torch.stack([*images])
        logits = resize(self.head(self.levels(data.normalize(images), names)), images.shape[2:])
        if known is None:
            return logits
        masks = torch.stack([k["mask"] for k in known]).long()
        loss = F.cross_entropy(logits, masks, ignore_index=IGNORED, reduction="sum")
        return [(loss, (masks != IGNORED).sum())]


def crops(s):
    """What training does to an image and its mask: another size, a crop, a flip, other colours."""
    resized = v2.RandomResize(int(s.size / s.zoom), int(s.size * s.zoom) + 1)
    crop = v2.RandomCrop(s.size, pad_if_needed=True, fill={Picture: 0, Mask: IGNORED})
    transform = v2.Compose(
        [resized, crop, v2.RandomHorizontalFlip(), v2.RandomPhotometricDistort()]
    )
    return functools.partial(change, transform)


def change(transform, image, known):
    image, mask = transform(Picture(image), Mask(known["mask"]))
    return image.as_subclass(torch.Tensor), {"mask": mask.as_subclass(torch.Tensor)}


def predict(model, image, s):
    """The class of each pixel, (H, W), of an image (3, H, W) of any size. Its shorter side becomes
    s.size for the model, which sees it whole, or, with s.slide, by crops of s.size that overlap by
    a third."""
    patch, sides = model.levels.backbone.patch_size, image.shape[1:]
    scaled = [max(1, round(n * s.size / min(sides) / patch)) * patch for n in sides]
    image = TF.resize(image.to(s.device), scaled)
    size = min(scaled) if s.slide else max(scaled)
    rows, cols = (
        sorted({*range(0, max(1, n - size), size * 2 // 3), max(0, n - size)}) for n in scaled
    )
    logits = torch.zeros(1 + model.head.classifier.out_channels, *scaled, device=s.device)
    for place in ((slice(y, y + size), slice(x, x + size)) for y in rows for x in cols):
        part = (slice(None), *place)
        logits[part] += torch.cat([torch.ones_like(logits[:1][part]), model(image[part][None])[0]])
    return resize(logits[None, 1:] / logits[0], sides)[0].argmax(
        0
    )  # the first tells how often it was seen


def confusion(predicted, truth, classes):
    """How many pixels of each class (row) are taken for each (column), of those that are
    labelled."""
    known = truth != IGNORED
    pairs = truth[known].long() * classes + predicted[known]
    return pairs.bincount(minlength=classes**2).view(classes, classes)


def scores(matrix):
    """Mean intersection over union, of the classes that occur in truth or prediction, and the share
    of pixels that are right, in percent, from a matrix as `confusion` gives."""
    hit, union = matrix.diag().double(), (matrix.sum(0) + matrix.sum(1) - matrix.diag()).double()
    miou = (100 * hit / union)[union > 0].mean().item()
    return {"miou": miou, "accuracy": (100 * hit.sum() / matrix.sum()).item()}


def score(model, sets, s):
    matrix = torch.zeros(2 * [len(sets.classes)], dtype=torch.long, device=s.device)
    for i in range(script.get_rank(), len(sets.val), script.get_world_size()):
        image, known = sets.val[i]
        matrix += confusion(predict(model, image, s), known["mask"].to(s.device), len(matrix))
    return scores(dense.total(matrix))


def tune(s, sets):
    with runs.logged(s.out):
        dense.fit(s, Segmenter(s, len(sets.classes)), crops(s), sets, score)


COLOURS = [tuple(random.Random(i).choices(range(40, 256), k=3)) for i in range(256)]


@torch.no_grad()
def draw(tuned, sets, rows=4, side=128):
    """A PNG's bytes: images, what is true, and what the first seed's models of some starts say."""
    cells, columns = [], [lambda image, known: known["mask"]]
    for s in tuned:
        model = Segmenter(s, len(sets.classes)).to(s.device).eval()
        model.load_state_dict(script.load_checkpoint(f"{s.out}/last.pt")["model"])
        columns.append(lambda image, known, model=model, s=s: predict(model, image, s).cpu())
    for image, known in (sets.val[i] for i in range(min(rows, len(sets.val)))):
        cells.append(image)
        for column in columns:
            mask = column(image, known)[None] == torch.arange(1, len(sets.classes))[:, None, None]
            cells.append(draw_segmentation_masks(image, mask, 0.7, COLOURS[: len(mask)]))
    cells = [TF.resize(cell, [side, side], TF.InterpolationMode.NEAREST) / 255 for cell in cells]
    save_image(cells, file := io.BytesIO(), "png", nrow=1 + len(columns), padding=4, pad_value=1)
    return file.getvalue()


def main():
    parser = dense.arguments(__doc__)
    help = "look at crops of --size that overlap by a third, and not at an image whole"
    parser.add_argument("--slide", dest="tune_slide", action="store_true", default=None, help=help)
    args = dense.parsed(parser)
    recipe, measures = LARGE, {"miou": "mean IoU %", "accuracy": "pixels %"}
    if args.data == "shapes":
        sets = functools.cache(lambda seed: annotated.as_masks(annotated.scene_sets(args, seed)))
        recipe = SMALL
    else:
        opened = annotated.once(annotated.open_masks, args.data)

        def sets(seed):
            return opened

    compared = dense.compare(args, "segmentation", tune, sets, recipe, measures)
    dense.write(args, "segmentation", compared, sets, draw)


if __name__ == "__main__":
    runs.run(main)
