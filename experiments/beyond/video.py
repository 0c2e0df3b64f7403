"""Clips: a ViT of tubelets, with CutMix in space and time.

    python experiments/beyond/video.py                 # 9 minutes on a core

A clip of 16 frames of 16 x 16 px is laid out as an image of 64 x 64 px in which each patch of
8 x 8 px is a tubelet of 4 frames and 4 x 4 px (Arnab et al. 2021, arXiv 2103.15691). So the model,
the label rules and the truth are those of images; only the box that is pasted differs: it spans
rows, columns and frames, on the grid of tubelets (Yun et al. 2020, arXiv 2012.03457).

The clips are drawn: an object moves over a cluttered ground, and the class is the direction, one
of eight, which no single frame tells. First table: accuracy, held against the area target seed by
seed. Second: how far the shares that rules assign to the pasted clip are from its influence (see
`mixing_ratio.py`), in models trained with the area target.
"""

import functools
import itertools
import sys
from pathlib import Path

import torch
from einops import rearrange
from torch.utils.data import Subset, TensorDataset

sys.path.append(str(Path(__file__).resolve().parent.parent))
import common
import compare
import data
import mixing_ratio
import rules
import tl_align
import train

SIZE = 16  # frames, rows and columns of a clip
TUBELET = 4  # frames, rows and columns of a tubelet
STEPS = [(-1, 0), (-1, 1), (0, 1), (1, 1), (1, 0), (1, -1), (0, -1), (-1, -1)]  # rows, columns

MODEL = "vit_micro"
METHODS = ("no mixing", "area", "TL-Align")
NUM_MIXES = 500  # on which errors are measured

# ------------------------------------------------------------------------------------------------
# Clips.


def lay_out(clips):
    """Clips as images: (B, 16, C, 16, 16) to (B, C, 64, 64), each tubelet a patch of 8 x 8 px."""
    # Four times, (t1 t2), are the image's quarters, and the four frames of a tubelet, (f1 f2), are
    # its patch's.
    pattern = "b (t1 t2 f1 f2) c (h p) (w q) -> b c (t1 h f1 p) (t2 w f2 q)"
    return rearrange(clips, pattern, t1=2, t2=2, f1=2, f2=2, p=TUBELET, q=TUBELET)


@functools.cache
def draw_clips(n, *name):
    """n clips, laid out, and their classes, by a generator of that name. The object of one built-in
    image moves over another image, a pixel a frame, and comes back on the other side."""
    grounds, _, _ = data.shapes(n, (*name, "ground"), SIZE)
    objects, _, masks = data.shapes(n, (*name, "object"), SIZE)
    targets = torch.randint(len(STEPS), (n,), generator=data.generator(*name, "direction"))
    starts = torch.randint(SIZE, (n, 2), generator=data.generator(*name, "start"))
    clips = grounds[:, None].repeat(1, SIZE, 1, 1, 1)
    for i in range(n):
        for t in range(SIZE):
            shift = (starts[i] + t * torch.tensor(STEPS[targets[i]])).tolist()
            mask = masks[i].roll(shift, (0, 1))
            clips[i, t] = torch.where(mask, objects[i].roll(shift, (1, 2)), clips[i, t])
    return TensorDataset(lay_out(clips), targets)


def open_datasets(settings):
    """Clips that the seed draws, repeated `passes` times, and others to validate on."""
    clips = draw_clips(settings.images, settings.seed)
    clips = Subset(clips, list(range(settings.images)) * settings.passes)
    val_clips = draw_clips(settings.val_images, "val")
    return data.Datasets(clips, val_clips, [str(step) for step in STEPS], hflip=False)


def cutmix_mask(rand):
    """One box in space and time per clip, on the grid of tubelets; it covers 1 - lambda.

    rand: (B, 4) in [0, 1]: lambda, and the centre's frame, row and column. Returns a mask that is
    laid out, (B, 1, 64, 64).
    """
    grid = SIZE // TUBELET
    length = ((1 - rand[:, :1]) ** (1 / 3) * grid).floor()  # of each side, in tubelets, (B, 1)
    start = (rand[:, 1:] * grid).floor() - (length / 2).floor()  # (B, 3)
    start, length = start[..., None], length[..., None]
    position = torch.arange(grid, device=rand.device)
    inside = (position >= start) & (position < start + length)  # (B, 3, grid)
    frames, rows, cols = inside.float().repeat_interleave(TUBELET, dim=2).unbind(1)
    return lay_out(torch.einsum("bt,bh,bw->bthw", frames, rows, cols)[:, :, None])


# ------------------------------------------------------------------------------------------------
# Training.


def clip_loss(model, images, targets, mask, rand, args):
    """`train.mixed_loss` with a box in space and time. The trainer's mask is for images; here it
    only tells whether clips are mixed."""
    if mask is not None:
        # The trainer draws two numbers per block for drop path, which this model lacks. A box needs
        # four: those of two blocks, (b, 2, 2).
        mask = cutmix_mask(rand[:, :2].flatten(1))
    return train.mixed_loss(model, images, targets, mask, None, args)


class ClipLoader(data.InMemoryLoader):
    """Training batches of laid-out clips, which cannot be cropped."""

    def __iter__(self):
        order = data.epoch_order(len(self.images), self.args.seed, self.epoch)
        for step in range(self.first_step, len(self)):
            index = order[step * self.args.batch_size : (step + 1) * self.args.batch_size]
            index = index.to(self.images.device)
            yield self.images[index], self.targets[index]


def train_run(settings):
    common.train_run(settings, open_datasets(settings), loss=clip_loss, make_loader=ClipLoader)


@torch.no_grad()
def measure_run(settings):
    """As `rules.measure_run`: the shares by each rule, and the influence."""
    model = common.load_model(settings, train.build_model(settings, len(STEPS)))
    clips = open_datasets(settings).val.tensors[0]
    n = min(NUM_MIXES, len(clips)) // 2 * 2
    clips = data.normalize(clips[:n].to(settings.device))
    mask = cutmix_mask(data.uniform((len(clips), 4), "video").to(settings.device))
    mixed = tl_align.mix(clips, mask)
    blank = mixing_ratio.mean_patch(clips, settings.patch_size)
    influence = mixing_ratio.influence(model, mixed, mask, [blank])
    return rules.predict_shares(model, mixed, mask), {"influence": influence}


def make_runs(args):
    """{(MODEL, method, seed): settings}."""
    runs = {}
    for seed, method in itertools.product(range(args.seeds), METHODS):
        own = {"model": MODEL, "seed": seed, **compare.METHODS[method]}
        runs[MODEL, method, seed] = common.make_run(args, open_datasets, f"{MODEL}-{method}", **own)
    return runs


def main():
    parser = common.make_parser(__doc__)
    add = parser.add_argument
    count = train.number(int, 2)
    add("--images", type=count, default=500, help="training clips of a seed [%(default)s]")
    add("--val-images", type=count, default=1000, help="validation clips [%(default)s]")
    add("--passes", type=train.number(int, 1), default=60, help="over the clips [%(default)s]")
    add("--batch-size", type=count, default=50, help="[%(default)s]")
    parser.set_defaults(data="clips")  # for `common.make_run`
    args = parser.parse_args()
    runs = make_runs(args)
    common.run_all(train_run, runs.values(), args.jobs)

    top1 = common.read_results(runs, MODEL, METHODS, args.seeds)
    rows = common.make_rows(top1, "area")
    text = common.markdown_table(["trained with", "top-1 %", "difference to area"], rows)
    measured = [measure_run(runs[MODEL, "area", seed]) for seed in range(args.seeds)]
    rows = rules.make_error_rows(measured)
    text += "\n" + common.markdown_table(["rule", "error of the share"], rows)
    num_mixes = len(measured[0][0]["area"])
    text += f"\n{num_mixes} mixes. {common.describe(args)}\n"
    common.write_results("video", text, args.runs)


if __name__ == "__main__":
    common.main(main)
