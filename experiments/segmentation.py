"""What is a backbone trained with aligned targets worth for segmentation? (the paper: ADE20K)

    python experiments/segmentation.py                          # built-in scenes, minutes on a CPU
    torchrun --nproc-per-node 8 experiments/segmentation.py --data /ade20k --workers 4 \\
        --checkpoints area/best.pt tl_align/best.pt

Without --checkpoints small models are trained on five built-in classes, with the area as the target
and with TL-Align, and fine-tuned with UperNet on scenes with objects of five others. --data is VOC
(a folder with VOCdevkit/VOC2012), ADE20K (images/training, annotations/training, ...), or has
{train,val}/{images,masks} and classes.txt, with a name a line. A mask is a PNG of class numbers
from 0; 255 is unlabelled. With --data, runs follow one another in this process by default. From
256 px on the recipe is that of the paper's baseline on ADE20K, with train.py's learning rate
schedule, and without the auxiliary head.
"""

import functools
import itertools
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.datasets import VOCSegmentation
from torchvision.ops import Conv2dNormActivation
from torchvision.transforms import v2

import common
import data
import dense
import train
from data import UserError

UNLABELLED = 255

# The width is that of the decoder. The rate is not scaled with the batch size. min_scale and
# max_scale: of the images' shorter side, relative to the crop.
SMALL = {"passes": 8, "batch_size": 16, "lr": 1e-4, "weight_decay": 0.05, "warmup_steps": 1500}
SMALL |= {"width": 64, "min_scale": 0.8, "max_scale": 1.25}
LARGE = {"passes": 127, "batch_size": 16, "lr": 6e-5, "weight_decay": 0.01, "warmup_steps": 1500}
LARGE |= {"width": 512, "min_scale": 0.5, "max_scale": 2.0}

# ------------------------------------------------------------------------------------------------
# The model.


def resize(x, size):
    return F.interpolate(x, size, mode="bilinear", align_corners=False)


class UperNet(nn.Module):
    """Class logits of pixels from maps of growing strides (Xiao et al. 2018, arXiv 1807.10221):
    the last map is pooled at four scales (PSP), each map is added to the one before (FPN), and all
    of them are read together. Names as in transformers. channels: of the maps."""

    def __init__(self, channels, num_classes, width):
        super().__init__()
        *first, last = channels
        self.psp_modules = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(n), Conv2dNormActivation(last, width, 1))
            for n in (1, 2, 3, 6)
        )
        self.bottleneck = Conv2dNormActivation(last + 4 * width, width, 3)
        self.lateral_convs = nn.ModuleList(Conv2dNormActivation(c, width, 1) for c in first)
        self.fpn_convs = nn.ModuleList(Conv2dNormActivation(width, width, 3) for _ in first)
        self.fpn_bottleneck = Conv2dNormActivation(len(channels) * width, width, 3)
        self.classifier = nn.Conv2d(width, num_classes, 1)

    def forward(self, maps):
        """maps: a list of (B, channels[i], H_i, W_i). Returns (B, num_classes, H_0, W_0)."""
        *first, last = maps
        pooled = [resize(pool(last), last.shape[2:]) for pool in self.psp_modules]
        top = self.bottleneck(torch.cat([last, *pooled], dim=1))
        outputs = [top]
        for i in reversed(range(len(first))):
            top = self.lateral_convs[i](maps[i]) + resize(top, maps[i].shape[2:])
            outputs.insert(0, self.fpn_convs[i](top))
        outputs = [resize(x, maps[0].shape[2:]) for x in outputs]
        return self.classifier(self.fpn_bottleneck(torch.cat(outputs, dim=1)))


class Segmenter(nn.Module):
    """A backbone and UperNet. Batch norm is over the images of all GPUs; on the CPU, of a
    process."""

    def __init__(self, settings, num_classes):
        super().__init__()
        self.encoder = dense.Backbone(settings)
        self.depth = self.encoder.model.depth  # which train.py asks for
        self.num_classes = num_classes
        self.head = UperNet(self.encoder.channels, num_classes, settings.width)
        if train.get_world_size() > 1 and settings.device == "cuda":
            self.head = nn.SyncBatchNorm.convert_sync_batchnorm(self.head)

    def forward(self, images):
        """images: (B, 3, S, S), normalized. Returns logits (B, num_classes, S, S)."""
        return resize(self.head(self.encoder(images)), images.shape[2:])


def loss(model, images, targets, mix_mask, rand, settings):
    """Cross-entropy, the mean over all pixels, to which unlabelled ones add nothing. targets: dicts
    of mask (S, S) uint8."""
    masks = torch.stack([target["mask"] for target in targets]).long()
    logits = model(images).float()
    return F.cross_entropy(logits, masks, ignore_index=UNLABELLED, reduction="none").mean()


# ------------------------------------------------------------------------------------------------
# The data: images (3, H, W) uint8, and masks (H, W) uint8 of class numbers.


class MaskFiles(Dataset):
    """paths: pairs of an image and its mask, a PNG. Where classes are numbered from 1, as in
    ADE20K, 0 is unlabelled. Raises UserError for a file that cannot be used."""

    def __init__(self, paths, num_classes, first_class=0):
        self.paths = paths
        self.num_classes = num_classes
        self.first_class = first_class

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        image_path, mask_path = self.paths[index]
        image = data.decode(image_path)
        try:
            mask = np.array(Image.open(mask_path))
        except OSError as error:
            raise UserError(f"{mask_path} cannot be read: {error}") from error
        if mask.dtype != np.uint8 or mask.shape != tuple(image.shape[1:]):
            raise UserError(f"{mask_path} must have 8 bits for each pixel of {image_path}")
        mask -= self.first_class  # 0 becomes 255
        largest = mask[mask != UNLABELLED].max(initial=0)
        if largest >= self.num_classes:
            largest, last = largest + self.first_class, self.num_classes - 1 + self.first_class
            raise UserError(f"{mask_path} has class {largest}, but the last one is {last}")
        return tv_tensors.Image(image), {"mask": tv_tensors.Mask(mask)}


def pair_files(images, masks):
    """Paths of the images of a folder, each with that of its mask. Raises UserError."""
    paths = sorted(p for p in images.glob("*") if p.suffix.lower() in data.IMAGE_EXTENSIONS)
    if not paths:
        raise UserError(f"{images} has no images; --help says how a folder may be laid out")
    return [(path, masks / f"{path.stem}.png") for path in paths]


def open_datasets(folder, seed):
    """The datasets of --data, or scenes that the seed draws. Raises UserError."""
    if folder != "scenes":
        return open_folder(folder)
    scenes = [dense.draw_scenes(dense.NUM_SCENES, name) for name in (seed, "val")]
    parts = [[class_mask(*scene) for scene in part] for part in scenes]
    return data.Datasets(*parts, ["background", *data.SHAPES_CLASSES[5:]])


@functools.cache
def open_folder(folder):
    root = Path(folder)
    first_class = 0
    if (root / "VOCdevkit").is_dir():
        classes = list(range(21))
        try:
            voc = [VOCSegmentation(root, image_set=s) for s in ("train", "val")]
        except (OSError, RuntimeError) as error:
            raise UserError(f"{root} is no VOC 2012: {error}") from error
        pairs = [list(zip(part.images, part.masks, strict=True)) for part in voc]
    elif (root / "annotations").is_dir():
        classes = list(range(150))
        first_class = 1
        splits = ("training", "validation")
        pairs = [pair_files(root / "images" / s, root / "annotations" / s) for s in splits]
    else:
        pairs = [pair_files(root / s / "images", root / s / "masks") for s in ("train", "val")]
        try:
            classes = (root / "classes.txt").read_text().splitlines()
        except OSError as error:
            raise UserError(f"{root} needs classes.txt with the name of a class a line") from error
    parts = [MaskFiles(p, len(classes), first_class) for p in pairs]
    digest = dense.files_digest(root, itertools.chain(*pairs[0], *pairs[1]))
    return data.Datasets(*parts, classes, digest=digest)


def class_mask(image, target):
    """A scene with the class of each pixel; 0 is the background."""
    mask = torch.zeros(image.shape[1:], dtype=torch.uint8)
    for label, visible in zip(target["labels"], target["masks"], strict=True):
        mask[visible] = label + 1
    return image, {"mask": tv_tensors.Mask(mask)}


# ------------------------------------------------------------------------------------------------
# The experiment.


def make_transform(settings):
    """Another size, a crop, a flip, and other colours."""
    low, high = int(settings.size * settings.min_scale), int(settings.size * settings.max_scale)
    fill = {tv_tensors.Image: 0, tv_tensors.Mask: UNLABELLED}
    return v2.Compose(
        [
            v2.RandomResize(low, high + 1),
            v2.RandomCrop(settings.size, pad_if_needed=True, fill=fill),
            v2.RandomHorizontalFlip(),
            v2.RandomPhotometricDistort(),
        ]
    )


def predict(model, image, size):
    """The class of each pixel, (H, W), of an image, (3, H, W) uint8 on the device. Its shorter
    side is resized to size; crops that overlap by a third are shown to the model."""
    sides = image.shape[1:]
    scaled = [max(size, round(side * size / min(sides))) for side in sides]
    image = data.normalize(v2.functional.resize(image, scaled)[None])
    logits = torch.zeros(1, model.num_classes, *scaled, device=image.device)
    counts = torch.zeros(scaled, device=image.device)
    for top in crop_starts(scaled[0], size):
        for left in crop_starts(scaled[1], size):
            crop = ..., slice(top, top + size), slice(left, left + size)
            logits[crop] += model(image[crop])
            counts[crop] += 1
    return resize(logits / counts, sides)[0].argmax(0)


def crop_starts(length, size):
    return sorted({*range(0, length - size, size * 2 // 3), length - size})


def confusion(predicted, mask, num_classes):
    """How many pixels of each class (row) are predicted as each class (column), without those that
    are unlabelled."""
    labelled = mask != UNLABELLED
    pairs = mask[labelled].long() * num_classes + predicted[labelled]
    return pairs.bincount(minlength=num_classes**2).view(num_classes, num_classes)


def summarize(matrix):
    """Mean intersection over union, of the classes that occur in masks or predictions, and the
    share of pixels that are right, in percent. matrix: see `confusion`."""
    matrix = matrix.double()
    correct = matrix.diag()
    union = matrix.sum(0) + matrix.sum(1) - correct
    iou = (correct / union)[union > 0]
    return {
        "miou": 100 * iou.mean().item(),
        "accuracy": 100 * (correct.sum() / matrix.sum()).item(),
    }


def score(model, dataset, settings):
    matrix = torch.zeros(model.num_classes, model.num_classes, device=settings.device).long()
    for i in range(train.get_rank(), len(dataset), train.get_world_size()):
        image, target = dataset[i]
        predicted = predict(model, image.to(settings.device), settings.size)
        matrix += confusion(predicted, target["mask"].to(settings.device), model.num_classes)
    if train.get_world_size() > 1:
        dist.all_reduce(matrix)
    return summarize(matrix)


def train_run(settings):
    datasets = open_datasets(settings.data, settings.seed)
    model = Segmenter(settings, len(datasets.classes))
    dense.finetune(settings, datasets, model, loss, make_transform(settings), score)


def main():
    args = dense.parse_args(__doc__)
    measures = {"miou": "mean IoU %", "accuracy": "pixels %"}
    dense.run("segmentation", args, (SMALL, LARGE), open_datasets, train_run, measures)


if __name__ == "__main__":
    common.main(main)
