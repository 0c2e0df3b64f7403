"""What is a backbone trained with aligned targets worth for object detection? (the paper: COCO)

    python experiments/detection.py                             # built-in scenes, minutes on a CPU
    torchrun --nproc-per-node 8 experiments/detection.py --data /coco --size 1024 --workers 4 \\
        --checkpoints area/best.pt tl_align/best.pt

As segmentation.py, with torchvision's Mask R-CNN on a feature pyramid, or Faster R-CNN where
objects have no polygons, scored by COCO's average precision of boxes. --data has a file of COCO's
form for each part, annotations/instances_{train,val}*.json or {train,val}.json, and the images in
a folder of the same name without "instances_". They are resized into a square of --size. From 256
px on passes, batch size and learning rate are those of the paper's baseline on COCO.
"""

import collections
import functools
import json
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw
from torch import nn
from torch.utils.data import Dataset
from torchvision import ops, tv_tensors
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.transforms import v2

import common
import data
import dense
import train
from data import UserError

# width: of the pyramid. anchor: the side of an anchor in units of its map's stride. min_scale: of
# an image relative to the largest that fits.
SMALL = {"passes": 5, "batch_size": 8, "lr": 1e-4, "weight_decay": 0.05, "warmup_steps": 1000}
SMALL |= {"width": 32, "anchor": 4, "min_scale": 1.0}
LARGE = {"passes": 12, "batch_size": 16, "lr": 1e-4, "weight_decay": 0.05, "warmup_steps": 1000}
LARGE |= {"width": 256, "anchor": 8, "min_scale": 0.6}

# ------------------------------------------------------------------------------------------------
# The model.


class Detector(nn.Module):
    """A backbone, a feature pyramid, and the heads of torchvision's Faster R-CNN or Mask R-CNN."""

    def __init__(self, settings, num_classes, has_masks):
        super().__init__()
        self.encoder = dense.Backbone(settings)
        self.depth = self.encoder.model.depth  # which train.py asks for
        self.num_classes = num_classes
        width = settings.width
        last_level = ops.feature_pyramid_network.LastLevelMaxPool()
        fpn = ops.FeaturePyramidNetwork(self.encoder.channels, width, last_level)
        fpn.out_channels = width
        strides = [*self.encoder.strides, 2 * self.encoder.strides[-1]]
        sizes = [(settings.anchor * stride,) for stride in strides]
        options = {
            "rpn_anchor_generator": AnchorGenerator(sizes, [(0.5, 1.0, 2.0)] * len(sizes)),
            "box_head": TwoMLPHead(width * 7 * 7, 4 * width),
            "box_predictor": FastRCNNPredictor(4 * width, num_classes + 1),  # and the background
        }
        if settings.size <= data.SMALL_SIZE:  # a sixteenth of the boxes that torchvision takes
            options["rpn_post_nms_top_n_train"] = 125
            options["rpn_post_nms_top_n_test"] = 62
            options["box_batch_size_per_image"] = 32
        if has_masks:
            options["mask_head"] = MaskRCNNHeads(width, [width] * 4, dilation=1)
            options["mask_predictor"] = MaskRCNNPredictor(width, width, num_classes + 1)
        self.net = (MaskRCNN if has_masks else FasterRCNN)(fpn, **options)

    def forward(self, images, targets=None):
        """images: (B, 3, S, S), normalized. targets: dicts of boxes, labels, crowd and masks.
        Returns a dict of losses in training, else a dict of boxes, scores and labels an image."""
        maps = self.net.backbone({str(i): x for i, x in enumerate(self.encoder(images))})
        maps = {name: x.float() for name, x in maps.items()}
        images = ImageList(images, [tuple(images.shape[2:])] * len(images))
        with torch.autocast(images.tensors.device.type, enabled=False):  # bf16 rounds boxes to 4 px
            proposals, rpn_losses = self.net.rpn(images, maps, targets)
            found, losses = self.net.roi_heads(maps, proposals, images.image_sizes, targets)
        return {**rpn_losses, **losses} if self.training else found


def loss(model, images, targets, mix_mask, rand, settings):
    """The sum of the detector's losses. Crowds and boxes without area are not trained on."""
    kept = []
    for target in targets:
        keep = ~target["crowd"] & (ops.box_area(target["boxes"]) > 0)
        kept.append({name: x[keep] for name, x in target.items()})
        kept[-1]["labels"] = kept[-1]["labels"] + 1  # 0 is the background
    return sum(model(images, kept).values())


# ------------------------------------------------------------------------------------------------
# The data: images (3, H, W) uint8, and dicts as `dense.draw_scenes` gives them.


class CocoFiles(Dataset):
    """The images of a folder with the annotations of a file of COCO's form. Raises UserError."""

    def __init__(self, path, folder):
        try:
            content = json.loads(path.read_text())
            self.images = [
                (folder / image["file_name"], image["id"]) for image in content["images"]
            ]
            categories = sorted(content["categories"], key=lambda category: category["id"])
            self.classes = [category["name"] for category in categories]
            self.labels = {category["id"]: i for i, category in enumerate(categories)}
            self.annotations = collections.defaultdict(list)
            if not self.images:
                raise ValueError("it has no images")
            for annotation in content["annotations"]:
                box = [float(number) for number in annotation["bbox"]]
                if annotation["category_id"] not in self.labels or len(box) != 4:
                    raise ValueError(f"annotation {annotation['id']} has no such category or box")
                self.annotations[annotation["image_id"]].append(annotation)
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path} is no file of COCO's annotations: {error!r}") from error
        self.has_masks = all(
            annotation.get("iscrowd") or isinstance(annotation.get("segmentation"), list)
            for annotation in content["annotations"]
        )

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        path, image_id = self.images[index]
        image = tv_tensors.Image(data.decode(path))
        size = tuple(image.shape[1:])
        objects = self.annotations[image_id]
        boxes = torch.tensor([o["bbox"] for o in objects], dtype=torch.float).view(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        target = {
            "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=size),
            "labels": torch.tensor([self.labels[o["category_id"]] for o in objects]).long(),
            "crowd": torch.tensor([bool(o.get("iscrowd")) for o in objects]).bool(),
        }
        if self.has_masks:
            masks = torch.zeros(len(objects), *size, dtype=torch.bool)
            for mask, o in zip(masks, objects, strict=True):
                mask |= polygon_mask(o, size)
            target["masks"] = tv_tensors.Mask(masks)
        return image, target


def polygon_mask(annotation, size):
    """The mask (H, W) of an object, from its polygons. A crowd has none and stays empty."""
    canvas = Image.new("1", size[::-1])
    if not annotation.get("iscrowd"):
        for polygon in annotation["segmentation"]:
            ImageDraw.Draw(canvas).polygon(polygon, fill=1)
    return torch.from_numpy(np.array(canvas))


def open_datasets(folder, seed):
    """The datasets of --data, or scenes that the seed draws. Raises UserError."""
    if folder != "scenes":
        return open_folder(folder)
    parts = [dense.draw_scenes(dense.NUM_SCENES, name) for name in (seed, "val")]
    return data.Datasets(*parts, data.SHAPES_CLASSES[5:])


@functools.cache
def open_folder(folder):
    parts, files = [], []
    for part in ("train", "val"):
        paths = [*Path(folder).glob(f"annotations/instances_{part}*.json")]
        paths += Path(folder).glob(f"{part}.json")
        if len(paths) != 1:
            raise UserError(
                f"{folder} must have one file annotations/instances_{part}*.json or {part}.json, "
                f"has {len(paths)}"
            )
        images = Path(folder, paths[0].stem.removeprefix("instances_"))
        parts.append(CocoFiles(paths[0], images))
        files += [paths[0], *[path for path, _ in parts[-1].images]]
    if parts[0].classes != parts[1].classes:
        raise UserError(f"the files of annotations in {folder} must have the same categories")
    digest = dense.files_digest(Path(folder), files)  # names and sizes
    digest += "".join(dense.content_digest(path) for path in files if path.suffix == ".json")
    return data.Datasets(*parts, parts[0].classes, digest=digest)


# ------------------------------------------------------------------------------------------------
# COCO's average precision.

THRESHOLDS = np.linspace(0.5, 0.95, 10)  # of the overlap that makes a hit
RECALLS = np.linspace(0, 1, 101)
MISS, HIT, IGNORED = range(3)


def average_precision(results, num_classes):
    """Average precision of boxes in percent: the mean over THRESHOLDS, AP, and at two of them,
    AP50 and AP75. Classes without objects are left out; nan if there are no objects.

    results: for each image a dict of what was found, boxes (n, 4), scores (n,) and labels (n,), of
    which the best 100 of a class count; and of what is there, boxes (m, 4), labels (m,), crowd
    (m,). All are tensors on the CPU.
    """
    table = []
    for label in range(num_classes):
        scores, overlaps, crowds = [], [], []
        for found, target in results:
            of_class = found["labels"] == label
            best = found["scores"][of_class].argsort(descending=True, stable=True)[:100]
            is_there = target["labels"] == label
            boxes, crowd = target["boxes"][is_there], target["crowd"][is_there].numpy()
            scores.append(found["scores"][of_class][best])
            overlaps.append(overlap(found["boxes"][of_class][best], boxes, crowd))
            crowds.append(crowd)
        order = torch.cat(scores).argsort(descending=True, stable=True).numpy()
        num_objects = sum(int((~crowd).sum()) for crowd in crowds)
        if num_objects:
            row = []
            for threshold in THRESHOLDS:
                pairs = zip(overlaps, crowds, strict=True)
                kinds = np.concatenate([match(*pair, threshold) for pair in pairs])[order]
                row.append(mean_precision(kinds[kinds != IGNORED] == HIT, num_objects))
            table.append(row)
    means = 100 * np.mean(table, axis=0) if table else np.full(len(THRESHOLDS), np.nan)
    return {"AP": float(means.mean()), "AP50": float(means[0]), "AP75": float(means[5])}


def overlap(found, boxes, crowd):
    """Intersection over union, (n, m), of boxes (n, 4) and (m, 4), in float64. For a crowd it is
    the intersection over the area of the box that was found. crowd: (m,)."""
    found, boxes = found.double(), boxes.double()
    low = torch.maximum(found[:, None, :2], boxes[:, :2])
    high = torch.minimum(found[:, None, 2:], boxes[:, 2:])
    shared = (high - low).clamp(min=0).prod(2).numpy()
    area = ops.box_area(found)[:, None].numpy()
    return shared / np.where(crowd, area, area + ops.box_area(boxes).numpy() - shared)


def match(iou, crowd, threshold):
    """MISS, HIT or IGNORED for each box that was found in an image, best score first: a box takes
    the object left that it overlaps most. Crowds can be taken many times and count for nothing.
    iou: (n, m), from `overlap`. crowd: (m,)."""
    kinds = np.full(len(iou), MISS)
    left = np.ones(len(crowd), dtype=bool)
    for i, row in enumerate(iou):
        near = left & (row >= threshold)
        if (near & ~crowd).any():
            near &= ~crowd  # objects come before crowds
        if near.any():
            best = np.flatnonzero(near & (row == row[near].max()))[-1]  # of equals the last
            kinds[i] = IGNORED if crowd[best] else HIT
            left[best] = crowd[best]
    return kinds


def mean_precision(hits, num_objects):
    """The mean over RECALLS of the best precision at that recall or a higher one. hits: (found,),
    best score first."""
    correct = hits.cumsum()
    precision = correct / np.arange(1, len(hits) + 1)
    precision = np.maximum.accumulate(precision[::-1])[::-1]
    place = (correct / num_objects).searchsorted(RECALLS)
    return np.append(precision, 0)[place].mean()


# ------------------------------------------------------------------------------------------------
# The experiment.


def make_transform(settings):
    """Another size that fits into a square, a random place in it, and a flip."""
    size = settings.size
    return v2.Compose(
        [
            v2.ScaleJitter((size, size), (settings.min_scale, 1.0)),
            v2.RandomCrop(size, pad_if_needed=True),
            v2.RandomHorizontalFlip(),
        ]
    )


def score(model, dataset, settings):
    """Average precision in the squares that the model sees: overlaps do not depend on the scale."""
    size = settings.size
    fit = v2.Compose([v2.ScaleJitter((size, size), (1.0, 1.0)), v2.CenterCrop(size)])
    results = []
    for i in range(train.get_rank(), len(dataset), train.get_world_size()):
        image, target = fit(*dataset[i])
        (found,) = model(data.normalize(image[None].to(settings.device)))
        found = {name: found[name].cpu() for name in ("boxes", "scores", "labels")}
        found["labels"] -= 1
        target = {
            name: target[name].as_subclass(torch.Tensor) for name in ("boxes", "labels", "crowd")
        }
        results.append((found, target))
    if train.get_world_size() > 1:
        parts = [None] * train.get_world_size()
        dist.all_gather_object(parts, results)
        results = [result for part in parts for result in part]
    return average_precision(results, model.num_classes)


def train_run(settings):
    datasets = open_datasets(settings.data, settings.seed)
    has_masks = "masks" in datasets.train[0][1]
    model = Detector(settings, len(datasets.classes), has_masks)
    dense.finetune(settings, datasets, model, loss, make_transform(settings), score)


def main():
    args = dense.parse_args(__doc__)
    measures = {"AP": "AP", "AP50": "AP50", "AP75": "AP75"}
    dense.run("detection", args, (SMALL, LARGE), open_datasets, train_run, measures)


if __name__ == "__main__":
    common.main(main)
