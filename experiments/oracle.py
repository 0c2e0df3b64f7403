"""The share of the object pixels that a mix shows, as a target: a ceiling for any rule for labels.

It is known for the built-in images, whose objects are drawn. `ObjectLoader` and `object_loss` are
for `train.train`, in the place of `data.make_train_loader` and `train.mixed_loss`.
"""

import torch
from torch.utils.data import Subset, TensorDataset

import data
import tl_align


def object_share(objects, mask):
    """The pasted image's share of the object pixels that a mix shows, (B, 1); nan where it shows
    none.

    objects: (B, 1, H, W), 1 on the object of each image, else 0. mask: (B, 1, H, W), of the mix.
    """
    own = (objects * (1 - mask)).sum((2, 3))
    pasted = (tl_align.partner(objects) * mask).sum((2, 3))
    return pasted / (own + pasted)


class ObjectLoader:
    """Training batches of built-in images, whose targets are pairs: the class, and the crop of the
    object's mask, (3, S, S) uint8. Used like `data.FileLoader`.

    The order and the crops of a loader depend on the seed, the epoch and the step only, so those of
    the masks are those of the images. Nothing else moves pixels: no flips, no full augmentation.
    dataset: a Subset of the built-in images.
    """

    def __init__(self, dataset, args, share):
        _, classes, masks = data.shapes(data.SHAPES_TRAIN, 0)
        masks = masks[:, None].expand(-1, 3, -1, -1).to(torch.uint8)
        masks = Subset(TensorDataset(masks, classes), dataset.indices)
        self.image_loader = data.make_train_loader(dataset, args, share)
        self.mask_loader = data.make_train_loader(masks, args, share)

    def set_epoch(self, epoch, first_step=0):
        self.image_loader.set_epoch(epoch, first_step)
        self.mask_loader.set_epoch(epoch, first_step)

    def __len__(self):
        return len(self.image_loader)

    def __iter__(self):
        for (images, classes), (masks, _) in zip(self.image_loader, self.mask_loader, strict=True):
            yield images, list(zip(classes, masks, strict=True))


def object_loss(model, images, targets, mask, rand, args):
    """The loss of a batch whose target is `object_share`, or the area's where no object is seen.
    targets: from `ObjectLoader`. Other arguments as for `train.mixed_loss`."""
    classes, objects = (torch.stack(column) for column in zip(*targets, strict=True))
    share = object_share(objects[:, :1].float(), mask)
    share = torch.where(share.isnan(), mask.mean((2, 3)), share)
    logits = model(tl_align.mix(images, mask), rand=rand)
    return tl_align.mixed_cross_entropy(logits.float(), classes, share, args.smoothing)
