"""What is a backbone trained with aligned targets worth for object detection? (the paper's Table 4)

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
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.transforms import v2

import common
import data
import dense
import train
from data import UserError

# width: of the pyramid. anchor: the side of an anchor in units of its map's stride. min_scale: of
# an image relative to the largest that fits. options: of torchvision's detectors.
SMALL = {"passes": 5, "batch_size": 8, "lr": 1e-4, "weight_decay": 0.05, "warmup_steps": 1000}
SMALL |= {"width": 32, "anchor": 4, "min_scale": 1.0}
SMALL["options"] = {"rpn_post_nms_top_n_train": 125, "box_batch_size_per_image": 32}
SMALL["options"] |= {"rpn_post_nms_top_n_test": 60}
LARGE = {"passes": 12, "batch_size": 16, "lr": 1e-4, "weight_decay": 0.05, "warmup_steps": 1000}
LARGE |= {"width": 256, "anchor": 8, "min_scale": 0.6, "options": {}}

# ------------------------------------------------------------------------------------------------
# The model.


class Detector(nn.Module):
    """A backbone, a feature pyramid, and the heads of torchvision's Faster R-CNN or Mask R-CNN."""

    def __init__(self, settings, num_classes, has_masks):
        super().__init__()
        self.encoder = dense.Backbone(settings)
        self.depth = self.encoder.model.depth
        width = settings.width
        last_level = ops.feature_pyramid_network.LastLevelMaxPool()
        fpn = ops.FeaturePyramidNetwork(self.encoder.channels, width, last_level)
        fpn.out_channels = width
        strides = [*self.encoder.strides, 2 * self.encoder.strides[-1]]
        sizes = [(settings.anchor * stride,) for stride in strides]
        options = {
            "rpn_anchor_generator": AnchorGenerator(sizes, [(0.5, 1.0, 2.0)] * len(sizes)),
            "box_predictor": FastRCNNPredictor(1024, num_classes + 1),  # and the background
            **settings.options,
        }
        if has_masks:
            options["mask_head"] = MaskRCNNHeads(width, [width] * 4, dilation=1)
            options["mask_predictor"] = MaskRCNNPredictor(width, width, num_classes + 1)
        self.net = (MaskRCNN if has_masks else FasterRCNN)(fpn, **options)

    def forward(self, images, rand=None, targets=None):
        """images: (B, 3, S, S), normalized. targets: dicts of boxes, labels, crowd and masks.
        Returns a dict of losses in training, else a dict of boxes, scores and labels an image."""
        maps = self.net.backbone({str(i): x for i, x in enumerate(self.encoder(images, rand))})
        maps = {name: x.float() for name, x in maps.items()}
        images = ImageList(images, [tuple(images.shape[2:])] * len(images))
        with torch.autocast(images.tensors.device.type, enabled=False):  # bf16 rounds boxes to 4 px
            proposals, rpn_losses = self.net.rpn(images, maps, targets)
            found, losses = self.net.roi_heads(maps, proposals, images.image_sizes, targets)
        return {**rpn_losses, **losses} if self.training else found


def loss(model, images, targets, mix_mask, rand, settings):
    """The sum of the detector's losses. Crowds are not trained on. Labels start with 1, because 0
    is the background."""
    kept = []
    for target in targets:
        keep = ~target["crowd"]
        kept.append({name: x[keep] for name, x in target.items()})
        kept[-1]["labels"] = kept[-1]["labels"] + 1
    return sum(model(images, rand, kept).values())


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
            for annotation in content["annotations"]:
                if annotation["category_id"] not in self.labels or len(annotation["bbox"]) != 4:
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


@functools.cache
def open_datasets(folder, seed):
    """The datasets of --data, or scenes that the seed draws. Raises UserError."""
    if folder == "scenes":
        parts = [dense.draw_scenes(dense.NUM_SCENES, name) for name in (seed, "val")]
        return data.Datasets(*parts, data.SHAPES_CLASSES[5:])
    parts = []
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
    if parts[0].classes != parts[1].classes:
        raise UserError(f"the files of annotations in {folder} must have the same categories")
    return data.Datasets(*parts, parts[0].classes)


# ------------------------------------------------------------------------------------------------
# COCO's average precision.

THRESHOLDS = np.linspace(0.5, 0.95, 10)  # of the overlap that makes a hit
RECALLS = np.linspace(0, 1, 101)


def average_precision(found, targets, num_classes, max_found=100):
    """Average precision of boxes in percent: the mean over THRESHOLDS, AP, and at two of them,
    AP50 and AP75. Classes without objects are left out; nan if there are no objects.

    found: a dict for each image, of boxes (n, 4), scores (n,) and labels (n,), of which the best
    max_found of each class count. targets: of boxes, labels and crowd. All tensors.
    """
    per_class = []
    for label in range(num_classes):
        scores, hits, ignored, num_objects = [], [], [], 0
        for one, target in zip(found, targets, strict=True):
            mine = one["labels"] == label
            best = one["scores"][mine].argsort(descending=True, stable=True)[:max_found]
            theirs = target["labels"] == label
            crowd = target["crowd"][theirs].numpy()
            iou = overlap(one["boxes"][mine][best], target["boxes"][theirs], crowd)
            hit, ignore = match(iou, crowd)
            scores.append(one["scores"][mine][best])
            hits.append(hit)
            ignored.append(ignore)
            num_objects += int((~crowd).sum())
        if num_objects:
            order = torch.cat(scores).argsort(descending=True, stable=True).numpy()
            hits = np.concatenate(hits, axis=1)[:, order]  # (thresholds, found)
            counted = ~np.concatenate(ignored, axis=1)[:, order]
            per_class.append(
                [mean_precision(h[c], num_objects) for h, c in zip(hits, counted, strict=True)]
            )
    means = 100 * np.mean(per_class, axis=0) if per_class else np.full(len(THRESHOLDS), np.nan)
    return {"AP": float(means.mean()), "AP50": float(means[0]), "AP75": float(means[5])}


def overlap(found, boxes, crowd):
    """Intersection over union (n, m) of boxes (n, 4) and (m, 4). For a crowd (m,) it is the
    intersection over the area of the box that was found."""
    found, boxes = found.double(), boxes.double()
    sides = torch.min(found[:, None, 2:], boxes[:, 2:]) - torch.max(
        found[:, None, :2], boxes[:, :2]
    )
    shared = sides.clamp(min=0).prod(2).numpy()
    area = ops.box_area(found)[:, None].numpy()
    return shared / np.where(crowd, area, area + ops.box_area(boxes).numpy() - shared)


def match(iou, crowd):
    """Which boxes that were found are hits. Each takes, best score first, the object left that it
    overlaps most; a crowd can be taken many times and is not counted, neither right nor wrong.

    iou: (found, objects). Returns whether a box hits an object or a crowd, and whether it hit a
    crowd, (10, found) each.
    """
    hits = np.zeros((len(THRESHOLDS), len(iou)), dtype=bool)
    ignored = np.zeros_like(hits)
    for t, threshold in enumerate(THRESHOLDS):
        left = np.ones(len(crowd), dtype=bool)
        for i, row in enumerate(iou):
            near = left & (row >= threshold)
            if (near & ~crowd).any():
                near &= ~crowd  # objects come first
            if near.any():
                best = np.flatnonzero(near & (row == row[near].max()))[-1]
                hits[t, i] = True
                ignored[t, i] = crowd[best]
                left[best] = crowd[best]
    return hits, ignored


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


def get_labels(inputs):
    _, target = inputs
    return target["labels"], target["crowd"]


def make_transform(settings):
    """Another size that fits into a square, a random place in it, and a flip."""
    size = settings.size
    return v2.Compose(
        [
            v2.ScaleJitter((size, size), (settings.min_scale, 1.0)),
            v2.RandomCrop(size, pad_if_needed=True),
            v2.RandomHorizontalFlip(),
            v2.SanitizeBoundingBoxes(labels_getter=get_labels),  # leaves out those without area
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
        results.append((i, found, target))
    if train.get_world_size() > 1:
        parts = [None] * train.get_world_size()
        dist.all_gather_object(parts, results)
        results = sorted(
            (result for part in parts for result in part), key=lambda result: result[0]
        )
    _, found, targets = zip(*results, strict=True)
    return average_precision(
        found, targets, model.net.roi_heads.box_predictor.cls_score.out_features - 1
    )


def tune(job):
    _, settings = job
    datasets = open_datasets(settings.data, settings.seed)
    has_masks = "masks" in datasets.train[0][1]
    model = Detector(settings, len(datasets.classes), has_masks)
    dense.finetune(settings, datasets, model, loss, make_transform(settings), score)


def main():
    args = dense.parse_args(__doc__)
    measures = {"AP": "AP", "AP50": "AP50", "AP75": "AP75"}
    dense.compare("detection", args, (SMALL, LARGE), open_datasets, tune, measures)


if __name__ == "__main__":
    common.main(main)
