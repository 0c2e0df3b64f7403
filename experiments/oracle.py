"""The share of the object pixels that a mix shows, as a target: a ceiling for any rule for labels.

It is known for the built-in images, whose objects are drawn. `ObjectLoader` and `object_loss` are
for `train.train`, in the place of `data.make_train_loader` and `train.mixed_loss`.
"""

import torch

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


class ObjectLoader(data.InMemoryLoader):
    """Training batches of built-in images. Targets are a list of pairs: the class, and the crop of
    the object's mask, (1, S, S) uint8. dataset: a Subset of the built-in images. Raises UserError.
    """

    def __init__(self, dataset, args, share):
        if not data.fits_in_memory(dataset, args.img_size):  # then the others crop from files
            raise data.UserError("the oracle needs fewer --images or --passes, to fit in memory")
        super().__init__(dataset, args, share)
        _, _, masks = data.shapes(data.SHAPES_TRAIN, 0)
        masks = masks[dataset.indices, None].to(self.images)
        self.images = torch.cat([self.images, masks], dim=1)  # a channel that is cropped with them

    def __iter__(self):
        for images, classes in super().__iter__():
            yield images[:, :3], list(zip(classes, images[:, 3:], strict=True))


def object_loss(model, images, targets, mask, rand, args):
    """The loss of a batch whose target is `object_share`, or the area's where no object is seen.
    targets: from `ObjectLoader`. Other arguments as for `train.mixed_loss`."""
    classes, objects = (torch.stack(column) for column in zip(*targets, strict=True))
    share = object_share(objects.float(), mask)
    share = torch.where(share.isnan(), mask.mean((2, 3)), share)
    logits = model(tl_align.mix(images, mask), rand=rand)
    return tl_align.mixed_cross_entropy(logits.float(), classes, share, args.smoothing)
