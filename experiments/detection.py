"""What is a backbone trained with aligned targets worth for object detection? (the paper's Table 4)

    python experiments/detection.py                             # built-in scenes, minutes on a CPU
    torchrun --nproc-per-node 8 experiments/detection.py --data /coco --workers 4 \\
        --checkpoints area/best.pt tl_align/best.pt             # the first is the baseline

As `segmentation.py`, with torchvision's Faster R-CNN, and Mask R-CNN where objects have masks, on a
feature pyramid over the backbone's levels; scored by COCO's average precision of boxes. With --data
ROOT and --checkpoints, by the recipe of the paper's baseline: 12 epochs of 16 images whose shorter
side is 480 to 800 px. ROOT is laid out as COCO (annotations/instances_train*.json and
instances_val*.json, with the images in the folder that follows "instances_"), or as VOC
(ImageSets/Main, JPEGImages, Annotations).
"""

import collections
import functools
import io
import itertools
import math

import numpy as np
import torch
from torch import nn
from torchvision import ops, tv_tensors
from torchvision.models import detection
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import TwoMLPHead
from torchvision.transforms import v2
from torchvision.utils import draw_bounding_boxes, save_image

import annotated
import dense
import runs
from runs import data, script

LARGE = {"size": 800, "batch_size": 16, "lr": 1e-4, "weight_decay": 0.05, "warmup": 1000}
LARGE |= {"drops": [8 / 12, 11 / 12], "shortest": 480, "width": 256, "anchor": 8}
SMALL = {"size": 64, "steps": 180, "batch_size": 8, "lr": 1e-3, "weight_decay": 0.05, "warmup": 20}
SMALL |= {"drops": [8 / 12, 11 / 12], "shortest": 64, "width": 32, "anchor": 4, "masks": True}


# --- The model.


class Pyramid(nn.Module):
    """A backbone's levels as torchvision's detectors want them: maps of one width, by name."""

    def __init__(self, s):
        super().__init__()
        self.levels, self.out_channels, self.names, self.bf16 = dense.Levels(s), s.width, (), False
        more = ops.feature_pyramid_network.LastLevelMaxPool()
        self.fpn = ops.FeaturePyramidNetwork(self.levels.channels, s.width, more)

    def forward(self, images):
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.bf16):
            maps = self.levels(images, self.names)
            maps = self.fpn(collections.OrderedDict((str(i), m) for i, m in enumerate(maps)))
        return {
            name: m.float() for name, m in maps.items()
        }  # boxes take their type, and bf16 is too coarse


class Sampler(detection._utils.BalancedPositiveNegativeSampler):
    """torchvision's choice of what losses look at, by each image's own random numbers, and of how
    many it is: so the mean of a loss can be taken over the images of all processes."""

    names = ()

    def __call__(self, matched):
        choose, chosen = super().__call__, []
        for name, one in zip(self.names, matched, strict=True):
            with torch.random.fork_rng([one.device] if one.is_cuda else []):
                torch.manual_seed(data.generator(*name, "sample").initial_seed())
                chosen.append([mask for (mask,) in choose([one])])
        positive, negative = map(list, zip(*chosen, strict=False))
        self.positive, self.all = (
            sum(int(m.sum()) for m in ms) for ms in (positive, positive + negative)
        )
        return positive, negative


class Detector(nn.Module):
    """Faster R-CNN, or Mask R-CNN where objects have masks (s.masks), on a backbone's levels.
    Images are padded to the largest of a batch: where their sizes differ, what one process holds
    has an effect."""

    def __init__(self, s, classes):
        super().__init__()
        torch.manual_seed(s.seed)
        body = Pyramid(s)
        strides = body.levels.strides
        anchors = [(s.anchor * stride,) for stride in (*strides, 2 * strides[-1])]
        names = [str(i) for i in range(len(strides))]
        # Of small images a sixteenth of torchvision's candidates, and one sample for each cell of
        # theirs.
        few, samples = (1, 2) if s.size > data.SMALL_SIZE else (16, 1)
        options = {
            "rpn_anchor_generator": AnchorGenerator(anchors, ((0.5, 1.0, 2.0),) * len(anchors)),
            "box_roi_pool": ops.MultiScaleRoIAlign(names, 7, samples),
            "box_head": TwoMLPHead(s.width * 49, 4 * s.width),
            "box_predictor": detection.faster_rcnn.FastRCNNPredictor(4 * s.width, classes + 1),
            "rpn_pre_nms_top_n_train": 2000 // few,
            "rpn_post_nms_top_n_train": 2000 // few,
            "rpn_pre_nms_top_n_test": 1000 // few,
            "rpn_post_nms_top_n_test": 1000 // few,
            "box_batch_size_per_image": 512 // few,
            "size_divisible": math.lcm(32, *strides, body.levels.backbone.patch_size),
            "min_size": s.size,  # in training `prepared` has done it
            "max_size": longest(s),
            "_skip_resize": True,
        }
        if s.masks:
            options["mask_roi_pool"] = ops.MultiScaleRoIAlign(names, 14, samples)
            options["mask_head"] = detection.mask_rcnn.MaskRCNNHeads(s.width, (s.width,) * 4, 1)
            options["mask_predictor"] = detection.mask_rcnn.MaskRCNNPredictor(
                s.width, s.width, classes + 1
            )
        self.net = (detection.MaskRCNN if s.masks else detection.FasterRCNN)(body, **options)
        # Masks help to find boxes; nobody asks for them afterwards.
        self.net.roi_heads.has_mask = lambda: s.masks and self.training
        self.samplers = [Sampler(256, 0.5), Sampler(512 // few, 0.25)]
        self.net.rpn.fg_bg_sampler, self.net.roi_heads.fg_bg_sampler = self.samplers

    def forward(self, images, known=None, names=()):
        """images: a list of uint8 (3, H, W). Returns detections, or of each loss its (sum,
        count)."""
        for part in (self.net.backbone, *self.samplers):  # torchvision would not hand them on
            part.names = names
        device = images[0].device.type
        self.net.backbone.bf16 = torch.is_autocast_enabled(device)
        with torch.autocast(device, enabled=False):
            losses = self.net([image / 255 for image in images], known)
        if known is None:
            return losses
        rpn, roi = self.samplers
        counts = {
            "loss_objectness": rpn.all,
            "loss_rpn_box_reg": rpn.all,
            "loss_mask": roi.positive,
        }
        return [(loss * (n := counts.get(name, roi.all)), n) for name, loss in losses.items()]


# --- Average precision.

RECALLS = np.linspace(0, 1, 101)
IOUS = np.linspace(0.5, 0.95, 10)
SIZES = {
    "": (0, 1e10),
    "small": (0, 32**2),
    "medium": (32**2, 96**2),
    "large": (96**2, 1e10),
}  # areas in pixels


def average_precision(found, known, classes, most=100):
    """COCO's average precision of boxes, in percent: the mean over ten overlaps (AP), at two of
    them (AP50, AP75), and by the size of objects (AP small, medium, large); nan where there is no
    such object.

    found: a dict for each image, of boxes (n, 4), scores (n,) and labels (n,), of which the best
    `most` of a class count. known: of boxes, labels, area, crowd and ignore; what overlaps an
    object to be ignored, or a crowd, is neither right nor wrong. All tensors.
    """
    found, known = (
        [{k: v.cpu().numpy() for k, v in image.items()} for image in part]
        for part in (found, known)
    )
    tables = {name: [] for name in SIZES}
    for label in range(classes):
        pairs = []
        for f, k in zip(found, known, strict=False):
            f, k = (
                {name: v[image["labels"] == label] for name, v in image.items()} for image in (f, k)
            )
            best = (-f["scores"]).argsort(kind="stable")[:most]
            if len(best) or len(k["labels"]):
                f = {name: v[best].astype(float) for name, v in f.items()}
                pairs.append((f, k, overlap(f["boxes"], k["boxes"].astype(float), k["crowd"])))
        for name, sizes in SIZES.items():
            matched = [match(*pair, sizes) for pair in pairs]
            if objects := sum(n for *_, n in matched):
                best = (-np.concatenate([f["scores"] for f, *_ in pairs])).argsort(kind="stable")
                hits, spared = (
                    np.concatenate(m, axis=1)[:, best]
                    for m in ([m[i] for m in matched] for i in (0, 1))
                )
                tables[name].append(
                    [precision(h[~i], objects) for h, i in zip(hits, spared, strict=False)]
                )
    means = {
        name: np.mean(t, axis=0) if t else np.full(len(IOUS), np.nan) for name, t in tables.items()
    }
    result = {"AP": means[""].mean(), "AP50": means[""][0], "AP75": means[""][5]}
    result |= {f"AP {name}": means[name].mean() for name in SIZES if name}
    return {name: 100 * float(value) for name, value in result.items()}


def match(found, known, iou, sizes):
    """Give each box that was found, the best first, the object left that it overlaps most, at each
    of IOUS. Returns whether it hits one and whether it counts for neither right nor wrong, (10,
    found) each, and how many objects there are to be found. iou: (found, known)."""
    spared = (
        known["crowd"] | known["ignore"] | (known["area"] < sizes[0]) | (known["area"] > sizes[1])
    )
    crowd, boxes = known["crowd"], found["boxes"]
    hits, ignored = np.zeros((2, len(IOUS), len(boxes)), dtype=bool)
    area = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    for t, least in enumerate(IOUS):
        left = np.ones(len(crowd), dtype=bool)
        for d, row in enumerate(iou):
            near = left & (row >= min(least, 1 - 1e-10))
            near = near & ~spared if (near & ~spared).any() else near  # what counts comes first
            hits[t, d] = near.any()
            if hits[t, d]:
                object = len(row) - 1 - np.where(near, row, -1)[::-1].argmax()  # of equals the last
                left[object], ignored[t, d] = crowd[object], spared[object]
            else:
                ignored[t, d] = not sizes[0] <= area[d] <= sizes[1]
    return hits, ignored, int((~spared).sum())


def overlap(a, b, crowd):
    """Intersection over union of boxes (n, 4) and (m, 4); of a crowd box over the first one's area
    alone."""
    sides = np.minimum(a[:, None, 2:], b[None, :, 2:]) - np.maximum(a[:, None, :2], b[None, :, :2])
    shared = sides.clip(0).prod(-1)
    area_a, area_b = ((x[:, 2:] - x[:, :2]).prod(1) for x in (a, b))
    return shared / np.where(crowd, area_a[:, None], area_a[:, None] + area_b - shared)


def precision(hits, objects):
    """The mean over RECALLS of the best precision at that recall or more. hits: (found,), best
    first."""
    right = hits.cumsum()
    best = np.maximum.accumulate((right / np.arange(1, len(hits) + 1))[::-1])[::-1]
    at = (right / objects).searchsorted(RECALLS)
    return np.append(best, 0)[at].mean()


# --- The experiment.


def prepared(s):
    """What training does to an image and its objects: another size, a flip; of objects those to be
    found."""
    shortest = v2.RandomShortestSize([*range(min(s.shortest, s.size), s.size + 1, 32)], longest(s))
    return functools.partial(change, v2.Compose([shortest, v2.RandomHorizontalFlip()]))


def change(transform, image, known):
    keep = ~(known["crowd"] | known["ignore"])
    boxes = tv_tensors.BoundingBoxes(
        known["boxes"][keep], format="XYXY", canvas_size=image.shape[1:]
    )
    inputs = {"boxes": boxes, "labels": known["labels"][keep] + 1}
    inputs |= {"masks": tv_tensors.Mask(known["masks"][keep])} if "masks" in known else {}
    image, known = transform(tv_tensors.Image(image), inputs)
    return image.as_subclass(torch.Tensor), {
        k: v.as_subclass(torch.Tensor) for k, v in known.items()
    }


def longest(s):
    return s.size * 5 // 3  # side of an image, whatever its shape


def score(model, sets, s):
    mine = []
    for i in range(script.get_rank(), len(sets.val), script.get_world_size()):
        image, known = sets.val[i]
        found, known = predict(model, image), {k: v for k, v in known.items() if k != "masks"}
        mine.append((i, found, known))
    every = sorted(itertools.chain(*dense.gather(mine)), key=lambda three: three[0])
    return average_precision(*list(zip(*every, strict=False))[1:], len(sets.classes))


def predict(model, image):
    """Boxes, scores and labels in an image, uint8 (3, H, W) of any size."""
    (found,) = model([image.to(next(model.parameters()).device)])
    found = {name: found[name].cpu() for name in ("boxes", "scores", "labels")}
    return found | {"labels": found["labels"] - 1}


def tune(s, sets):
    with runs.logged(s.out):
        dense.fit(s, Detector(s, len(sets.classes)), prepared(s), sets, score)


@torch.no_grad()
def draw(tuned, sets, columns=4, side=192):
    """A PNG's bytes: what is in some images, and below what the first seed's models find there."""
    cells, images = [], [sets.val[i] for i in range(min(columns, len(sets.val)))]
    rows = [[known | {"scores": known["area"] * 0 + 1} for _, known in images]]
    for s in tuned:
        model = Detector(s, len(sets.classes)).to(s.device).eval()
        model.load_state_dict(script.load_checkpoint(f"{s.out}/last.pt")["model"])
        rows.append([predict(model, image) for image, _ in images])
    for row in rows:
        for (image, _), found in zip(images, row, strict=False):
            keep = found["scores"] > 0.5
            scale = torch.tensor([side / image.shape[2], side / image.shape[1]] * 2)
            names = [sets.classes[label] for label in found["labels"][keep]]
            cell = v2.functional.resize(image, [side, side])
            if names:
                cell = draw_bounding_boxes(cell, found["boxes"][keep] * scale, names, "red")
            cells.append(cell / 255)
    save_image(cells, file := io.BytesIO(), "png", nrow=len(images), padding=4, pad_value=1)
    return file.getvalue()


def main():
    args = dense.parsed(dense.arguments(__doc__))
    if args.data == "shapes":
        sets, recipe = functools.cache(lambda seed: annotated.scene_sets(args, seed)), SMALL
    else:
        opened, masks = annotated.once(annotated.open_boxes, args.data)
        kind, some = ("Mask", "all") if masks else ("Faster", "not all")
        script.print0(f"{kind} R-CNN: {some} objects have polygons")
        batch = args.tune_batch_size or LARGE["batch_size"]
        recipe = LARGE | {"steps": math.ceil(12 * len(opened.train) / batch), "masks": masks}

        def sets(seed):
            return opened

    measures = {"AP": "AP", "AP50": "AP50", "AP75": "AP75"}
    compared = dense.compare(args, "detection", tune, sets, recipe, measures)
    dense.write(args, "detection", compared, sets, draw)


if __name__ == "__main__":
    runs.run(main)
