"""What the workers' half of the data path costs, against torchvision's usual chain.

    python experiments/loader.py                        # on photo-sized JPEGs that it draws
    python experiments/loader.py /imagenet/train        # on the files of a folder

The usual chain does all of augmentation an image at a time on the CPU: PIL, RandomResizedCrop,
flip, RandAugment, ToTensor, Normalize, RandomErasing. Ours decodes and crops there and leaves the
rest to the device, whole batches at a time; with repeated augmentation one decode serves three
crops. Both are timed to the finished batch, on one core, in turn, and each round's ratio is taken,
so that a machine that is busy slows both. Decoding alone stands beside them: one crop of an image
can be no faster.

Also written: augmented.png, a grid of what the device's half makes of eight of the images, for the
eye.
"""

import argparse
import itertools
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Subset
from torchvision import datasets, io, transforms
from torchvision.utils import save_image

sys.path.insert(0, str(Path(__file__).parent.parent))
import data  # noqa: E402


def draw_photos(folder, n, size=(375, 500)):
    """JPEGs as large as ImageNet's usual ones, and as rich in detail as to weigh about the same."""
    (folder / "class").mkdir()
    for i, image in enumerate(data.shapes(n, seed=0, size=512)[0]):
        noise = 12 * torch.randn(image.shape, generator=data.generator("photo", i))
        photo = (image + noise).clamp(0, 255).to(torch.uint8)[:, : size[0], : size[1]]
        io.write_jpeg(photo, str(folder / "class" / f"{i:03}.jpg"), quality=90)


def reference(size):
    """The chain of torchvision's own training script, with DeiT's choices."""
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


class Ours:
    """The batches of a worker of `data.FileLoader`, of as many epochs as images are repeated: each
    epoch decodes so many times fewer of them."""

    def __init__(self, dataset, size, repeats):
        args = argparse.Namespace(img_size=size, batch_size=min(48, len(dataset)), seed=0)
        args.aug_repeats, args.workers, args.device = repeats, 0, "cpu"
        self.sampler = data.TrainSampler(len(dataset), args, slice(None))
        crops = data.TrainCrops(dataset, size)
        self.loader = data.make_data_loader(crops, args, batch_sampler=self.sampler)
        self.epochs = itertools.count()
        self.repeats = repeats

    def __iter__(self):
        for _ in range(self.repeats):
            self.sampler.set_epoch(next(self.epochs))
            yield from data.batches_on_device(self.loader, "cpu")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "folder", nargs="?", help="with a folder of images a class; drawn if not given"
    )
    parser.add_argument(
        "--images", type=int, default=200, help="how many of them a round reads [200]"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--size", type=int, default=224, help="side of the crops in pixels [224]")
    parser.add_argument("--out", type=Path, default=Path("runs/loader"))
    args = parser.parse_args()
    torch.set_num_threads(1)

    with tempfile.TemporaryDirectory() as drawn:
        if args.folder is None:
            draw_photos(Path(drawn), min(args.images, 64))
        folder = args.folder or drawn
        theirs = datasets.ImageFolder(folder, reference(args.size))
        files = data.ImageFiles(data.find_images(folder, data.find_classes(folder)))
        chosen = torch.linspace(0, len(files) - 1, min(args.images, len(files))).long().tolist()
        ways = {
            "torchvision's chain": DataLoader(Subset(theirs, chosen), 96),
            "decode and crop": Ours(Subset(files, chosen), args.size, repeats=1),
            "decode once, crop three times": Ours(Subset(files, chosen), args.size, repeats=3),
            "decode, and nothing else": DataLoader(
                Subset(files, chosen), 8, collate_fn=lambda items: [items]
            ),
        }
        rates = {name: [] for name in ways}
        for round in range(args.rounds + 1):  # the first brings the files into memory
            for name, loader in ways.items():
                began = time.perf_counter()
                samples = sum(len(images) for images, *_ in loader)
                if round:
                    rates[name].append(samples / (time.perf_counter() - began))
            print(f"round {round} of {args.rounds}", file=sys.stderr)

        print(f"{len(chosen)} images of {folder if args.folder else 'its own drawing'}, one core\n")
        print(
            "| workers' half | samples/s | ratio | least and most of the rounds |\n"
            "|---|---|---|---|"
        )
        for name, ours in rates.items():
            ratios = sorted(a / b for a, b in zip(ours, rates["torchvision's chain"], strict=False))
            middle = statistics.median(ratios)
            rate = statistics.median(ours)
            print(f"| {name} | {rate:.0f} | {middle:.2f} | {ratios[0]:.2f} to {ratios[-1]:.2f} |")

        rows = []
        for i in chosen[:: max(1, len(chosen) // 8)][:8]:
            crop = data.random_resized_crop(files[i][0], args.size, ("picture", i))
            many = crop.expand(9, -1, -1, -1)
            augmented = data.augment(many, data.uniform((9, 16), "picture", i))
            mean, std = data.channel_statistics(augmented.device)
            rows += [crop[None] / 255, (augmented * std + mean).clamp(0, 1)]
        args.out.mkdir(parents=True, exist_ok=True)
        save_image(torch.cat(rows), args.out / "augmented.png", nrow=10)
        print(
            f"\n{args.out}/augmented.png: a crop at the left of each row, "
            "nine augmentations of it beside"
        )


if __name__ == "__main__":
    main()
