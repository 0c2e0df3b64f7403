"""A picture of what labels do between the first layer and the last, for a trained model.

    python experiments/picture.py runs/shapes-vit_micro-cutmix-tl_align-0/best.pt
    python experiments/picture.py deit_tiny_patch16_224.pth --model deit_tiny --data my_photographs

A row for each of two mixes: the mixed image, the area that was pasted, and the labels after some of
the layers. Blue belongs to the image itself, orange to the pasted one. The number is the pasted
image's share as the head would read it there; that of the last layer, "aligned", is the target.

The checkpoint is one of train.py, or one that it can load. Settings come from the checkpoint, as
with `train.py --eval`, or from train.py's flags, such as --data, --root and --device. Images are
those for validation, or any folder of images: labels do not depend on their classes.
"""

import os
from pathlib import Path

import torch
import torch.nn.functional as F
from torchvision.utils import draw_bounding_boxes, save_image

import common
import data
import tl_align
import train

NUM_ROWS = 2
MAX_LAYERS = 4
CELL, CAPTION, GAP = 112, 18, 6  # pixels
COLOURS = [(0.0, 0.25, 0.9), (1.0, 1.0, 1.0), (1.0, 0.5, 0.0)]  # of a share of 0, 1/2 and 1


def open_images(settings):
    """The validation images of --data, or all images in a folder. Raises UserError."""
    if not os.path.isdir(settings.data):
        return data.open_datasets(settings.data, settings.root, settings.seed).val
    folder = Path(settings.data).resolve()
    for name in data.VAL_FOLDERS:
        if (folder / name).is_dir():
            folder = folder / name
            break
    return data.ImageFiles(data.find_images(folder.parent, [folder.name]))


def open_model(settings, path, images):
    """The model of a checkpoint, with the head and, if no flag says otherwise, the patches and the
    image size that it has; fills in the settings. Raises UserError."""
    checkpoint = train.load_checkpoint(path)
    state = checkpoint["model"]
    if "patch_embed.proj.weight" in state:
        train.set_default(settings, "patch_size", state["patch_embed.proj.weight"].shape[-1])
    if "pos_embed" in state:
        grid_size = int((state["pos_embed"].shape[1] - 1) ** 0.5)
        train.set_default(settings, "img_size", grid_size * settings.patch_size)
    train.fill_defaults(settings, data.median_size(images), len(images))
    num_classes = len(state.get("head.weight", range(1000)))
    classes = checkpoint.get("classes", list(range(num_classes)))
    model = train.build_model(settings, num_classes)
    train.load_weights(model, path, classes, new_head="head.weight" not in state)
    return model.to(settings.device).eval()


def paint(share):
    """Shares (B, 1, H, W) in [0, 1] as colours (B, 3, H, W) from 0 to 255."""
    blue, white, orange = torch.tensor(COLOURS)[:, :, None, None] * 255
    share = share.cpu()
    return torch.where(
        share < 0.5, torch.lerp(blue, white, 2 * share), torch.lerp(white, orange, 2 * share - 1)
    )


@torch.no_grad()
def make_columns(model, images, settings):
    """The picture's columns, each a title, images (B, 3, H, W) from 0 to 255, and the shares (B,)
    to print, or None."""
    chosen = torch.linspace(0, len(images) - 1, 2 * NUM_ROWS).long().tolist()
    crops = common.center_crops(images, chosen, settings.img_size).float()
    # Boxes of middling size that do not reach the border.
    rand = 0.25 + 0.5 * data.uniform((len(crops), 3), "picture")
    mask = tl_align.cutmix_mask(rand, crops.shape[-2:], settings.patch_size)
    mixed = tl_align.mix(crops, mask)
    labels = tl_align.token_labels(mask, settings.patch_size).to(settings.device)
    layers = model.intermediate_labels(data.normalize(mixed).to(settings.device), labels)

    columns = [("mixed image", mixed, None), ("pasted area", paint(mask), mask.mean((1, 2, 3)))]
    last = len(layers) - 1
    for layer in torch.linspace(1, last, min(MAX_LAYERS, last)).long().tolist():
        tokens, read = layers[layer]
        title = f"layer {layer}" if layer < last else "aligned"
        columns.append((title, paint(tokens.movedim(-1, 1)), read[:, 0]))
    return columns


def draw(path, columns):
    """Write the picture; a row shows every second mix, because neighbours have the same images."""
    frame = torch.tensor([[0, 0, CELL - 1, CAPTION + CELL - 1]])
    cells = []
    for row in range(0, 2 * NUM_ROWS, 2):
        for title, pictures, shares in columns:
            caption = title if shares is None else f"{title}: {shares[row].item():.2f}"
            cell = F.interpolate(pictures[row, None], (CELL, CELL), mode="area")[0]
            cell = F.pad(cell, (0, 0, CAPTION, 0), value=255).to(torch.uint8)
            cells.append(draw_bounding_boxes(cell, frame, [caption], "black") / 255)
    common.make_folder(path.parent)
    save_image(cells, path, nrow=len(columns), padding=GAP, pad_value=1)


def main():
    parser = train.Parser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("checkpoint", help="of train.py, or DeiT's, timm's ViT or Microsoft's Swin")
    parser.add_argument("--out", help="file to write [alignment.png beside the checkpoint]")
    args, words = parser.parse_known_args()
    settings = train.parse_args(["--eval", args.checkpoint, *words])
    images = open_images(settings)
    model = open_model(settings, args.checkpoint, images)
    out = Path(args.out or Path(args.checkpoint).with_name("alignment.png"))
    draw(out, make_columns(model, images, settings))
    print(f"{out}: {NUM_ROWS} mixed images of {settings.data}, and their labels layer by layer")


if __name__ == "__main__":
    common.main(main)
