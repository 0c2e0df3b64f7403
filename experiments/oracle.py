"""The share of the object pixels that a mix shows, as a target: a ceiling for any rule for labels.

It is known for the built-in images, whose objects are drawn. `ObjectLoss` is a loss for
`train.train`, in the place of `train.mixed_loss`.
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


class ObjectLoss:
    """A loss whose target is `object_share`, or the area's where no object is seen.

    The trainer's images do not bring their masks. But the order and the crops of a loader depend
    on the seed, the epoch and the step only, so a second loader, of the masks, gives the crops of
    the masks of the same images. Nothing else moves pixels: no flips, no full augmentation.

    indices: of the training images, among the built-in ones. step: the first step, 0 unless a run
    is resumed.
    """

    def __init__(self, indices, settings, step=0):
        _, classes, masks = data.shapes(data.SHAPES_TRAIN, 0)
        masks = masks[:, None].expand(-1, 3, -1, -1).to(torch.uint8)
        dataset = Subset(TensorDataset(masks, classes), indices)
        self.loader = data.make_train_loader(dataset, settings, slice(None))
        self.batches = self.batches_from(step)

    def batches_from(self, step):
        while True:
            epoch, first_step = divmod(step, len(self.loader))
            self.loader.set_epoch(epoch, first_step)
            for batch in self.loader:
                yield batch
                step += 1

    def __call__(self, model, images, targets, mask, rand, args):
        masks, mask_targets = next(self.batches)
        if not torch.equal(targets, mask_targets):
            raise ValueError("the masks are not those of the images")
        share = object_share(masks[:, :1].float(), mask)
        share = torch.where(share.isnan(), mask.mean((2, 3)), share)
        logits = model(tl_align.mix(images, mask), rand=rand)
        return tl_align.mixed_cross_entropy(logits.float(), targets, share, args.smoothing)
