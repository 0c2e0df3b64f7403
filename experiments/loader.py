"""What the workers' part of the data path costs, beside torchvision's usual chain.

    python experiments/loader.py                        # photo-sized JPEGs that it draws
    python experiments/loader.py /imagenet/train        # the files of a folder with class folders

The usual chain augments image by image on the CPU: PIL, RandomResizedCrop, flip, RandAugment,
ToTensor, Normalize, RandomErasing. Ours decodes and crops there and leaves the rest to the device,
whole batches at a time; with repeated augmentation one decoding serves three crops. Both are timed
to the finished batch on one core, in turn, and ratios are taken within a round, so that a machine
that is busy slows both; ± is half of a 95 % interval over rounds. One crop of an image can be no
faster than its decoding, which is timed too.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Subset
from torchvision import datasets, io, transforms

import common
import data
import train

REFERENCE = "torchvision's chain"


def draw_photos(folder, num_images, height=375, width=500):
    """JPEGs of the size of ImageNet's, with noise, so that they take as many bytes."""
    Path(folder, "class").mkdir()
    images, _, _ = data.shapes(num_images, seed=0, size=512)
    for i, image in enumerate(images):
        noise = 12 * torch.randn(image.shape, generator=data.generator("photo", i))
        photo = (image + noise).clamp(0, 255).to(torch.uint8)[:, :height, :width]
        io.write_jpeg(photo, str(Path(folder, "class", f"{i:03}.jpg")), quality=90)


def reference_chain(size):
    """The chain of torchvision's training script, with DeiT's choices."""
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(size, interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.RandomHorizontalFlip(),
            transforms.RandAugment(),
            transforms.ToTensor(),
            transforms.Normalize(data.MEAN, data.STD),
            transforms.RandomErasing(0.25),
        ]
    )


def our_loader(dataset, size, repeats):
    """A `data.FileLoader` that decodes in this process."""
    args = argparse.Namespace(img_size=size, batch_size=min(48, len(dataset)), aug_repeats=repeats)
    args.seed, args.workers, args.device = 0, 0, "cpu"
    return data.FileLoader(dataset, args, slice(None))


def keep_list(items):
    return [items]


def make_loaders(folder, num_images, size):
    """The loaders by name, each of batches (images, ...), and the images."""
    files = data.ImageFiles(data.find_images(folder, data.find_classes(folder)))
    chosen = torch.linspace(0, len(files) - 1, min(num_images, len(files))).long().tolist()
    images = Subset(files, chosen)
    reference = datasets.ImageFolder(folder, reference_chain(size))
    loaders = {
        REFERENCE: DataLoader(Subset(reference, chosen), 96),
        "decode and crop": our_loader(images, size, repeats=1),
        "decode once, crop three times": our_loader(images, size, repeats=3),
        "decode, and nothing else": DataLoader(images, 8, collate_fn=keep_list),
    }
    return loaders, images


def time_loaders(loaders, rounds):
    """Samples per second of each round, {name: [rate]}."""
    rates = {name: [] for name in loaders}
    for number in range(rounds + 1):
        for name, loader in loaders.items():
            if isinstance(loader, data.FileLoader):
                loader.set_epoch(number)
            start = time.perf_counter()
            num_samples = sum(len(batch[0]) for batch in loader)
            if number > 0:  # the first round brings the files into memory
                rates[name].append(num_samples / (time.perf_counter() - start))
    return rates


def main():
    parser = train.Parser(description=__doc__.split("\n")[0], allow_abbrev=False)
    count = train.number(int, 2)
    parser.add_argument("folder", nargs="?", help="of class folders; drawn if not given")
    parser.add_argument("--images", type=count, default=200, help="in a round [200]")
    parser.add_argument("--rounds", type=train.number(int, 1), default=5)
    parser.add_argument("--size", type=count, default=224, help="of the crops, in pixels [224]")
    args = parser.parse_args()
    torch.set_num_threads(1)

    with tempfile.TemporaryDirectory() as drawn:
        if args.folder is None:
            draw_photos(drawn, min(args.images, 64))
        elif not data.find_classes(args.folder):
            raise data.UserError(f"{args.folder} has no class folders")
        loaders, images = make_loaders(args.folder or drawn, args.images, args.size)
        rates = time_loaders(loaders, args.rounds)
        rows = []
        for name, own in rates.items():
            ratios = [a / b for a, b in zip(own, rates[REFERENCE], strict=True)]
            rows.append([name, f"{statistics.median(own):.0f}", common.show(ratios)])
        text = common.markdown_table(["workers' part", "samples/s", "ratio"], rows)
        text += f"\n{len(images)} images of {args.folder or 'its own drawing'}, {args.size} px, "
        text += f"one core, {args.rounds} rounds, torch {torch.__version__}.\n"
        common.write_results("loader", text, "runs/experiments")


if __name__ == "__main__":
    common.main(main)
