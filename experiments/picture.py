"""A picture of what labels do between the first layer and the last, for a trained model.

    python experiments/picture.py runs/shapes-vit_micro-cutmix-tl_align/best.pt
    python experiments/picture.py deit_small_patch16_224.pth --model deit_small --data /imagenet

A row for each of a few mixed validation images: the mix, the area that was pasted, and the labels
after some of the layers. Blue belongs to the image itself, orange to the pasted one; the number is
the pasted image's share as the head would read it there, and under "aligned" the target. Settings
come from the checkpoint as with `train.py --eval`, or from train.py's flags, such as --data, --root
and --device.
"""

import argparse
import io
from pathlib import Path

import torch
import torch.nn.functional as F
from torchvision.utils import draw_bounding_boxes, save_image

import runs
import tl_align  # on the path that `models` has set
import weighing
from runs import data, script

ROWS, LAYERS = 2, 4  # at most so many layers
CELL, CAPTION, GAP = 112, 18, 6  # pixels
COLOURS = [(0.0, 0.25, 0.9), (1.0, 1.0, 1.0), (1.0, 0.5, 0.0)]  # of a share of 0, 1/2 and 1


def paint(share):
    """(B, 1, H, W) in [0, 1] to colours (B, 3, H, W) from 0 to 255."""
    blue, white, orange = torch.tensor(COLOURS)[:, :, None, None] * 255
    share = share.cpu()
    return torch.where(
        share < 0.5, torch.lerp(blue, white, 2 * share), torch.lerp(white, orange, 2 * share - 1)
    )


@torch.no_grad()
def draw(model, sets, s):
    """The picture as a file's bytes, a PNG."""
    chosen = torch.linspace(0, len(sets.val) - 1, 2 * ROWS).long().tolist()
    images = runs.crops_of(sets.val, s.img_size, chosen).float()
    at = (
        data.uniform((len(images), 3), "picture") * 0.5 + 0.25
    )  # boxes of middling size, not at the border
    mask = tl_align.cutmix_mask(at, images.shape[-2:], s.patch_size)
    mixed, labels = tl_align.mix(images, mask), tl_align.token_labels(mask, s.patch_size)
    given = data.normalize(mixed).to(s.device), labels.to(s.device)
    layers = model.intermediate_labels(*given)
    layers[-1] = layers[-1][0], model(*given)[1]  # which is the target by any rule

    last = len(layers) - 1
    columns = [("mixed image", mixed, None), ("pasted area", paint(mask), mask.mean((1, 2, 3)))]
    for depth in torch.linspace(1, last, min(LAYERS, last)).long().tolist():
        share, read = layers[depth]
        title = f"layer {depth}" if depth < last else "aligned"
        columns.append((title, paint(share.movedim(-1, 1)), read[:, 0]))

    def name(title, read, row):
        return title if read is None else f"{title}: {read[row].item():.2f}"

    rows = range(0, 2 * ROWS, 2)
    cells = [
        (name(title, read, row), pictures[row]) for row in rows for title, pictures, read in columns
    ]
    return grid(cells, len(columns))


def grid(cells, columns):
    """Pictures with captions, so many in a row: a PNG's bytes. cells: (caption, (3, H, W) from 0 to
    255)."""
    drawn, frame = [], torch.tensor([[0, 0, CELL - 1, CAPTION + CELL - 1]])
    for caption, cell in cells:
        cell = F.interpolate(cell[None].cpu(), (CELL, CELL), mode="area")[0]
        cell = F.pad(cell, (0, 0, CAPTION, 0), value=255).to(torch.uint8)
        drawn.append(draw_bounding_boxes(cell, frame, [caption], "black") / 255)
    save_image(drawn, file := io.BytesIO(), "png", nrow=columns, padding=GAP, pad_value=1)
    return file.getvalue()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("checkpoint", help="of train.py, or DeiT's, timm's ViT or Microsoft's Swin")
    parser.add_argument(
        "--out", type=Path, help="file to write [alignment.png beside the checkpoint]"
    )
    args, more = parser.parse_known_args()
    s = script.parse_args(["--eval", args.checkpoint, *more])
    sets = data.open_datasets(s.data, s.root, s.seed)
    script.fill_defaults(s, data.median_size(sets.train), len(sets.train))
    model, saved = runs.model_of(s, sets), script.load_checkpoint(args.checkpoint)
    if rule := runs.args_of(saved).get("residual"):
        weighing.weigh(model, rule)
    out = args.out or Path(args.checkpoint).with_name("alignment.png")
    runs.write_bytes(out, draw(model, sets, s))
    print(f"{out}: {ROWS} mixed images of {s.data}, and their labels layer by layer")


if __name__ == "__main__":
    runs.run(main, "")
