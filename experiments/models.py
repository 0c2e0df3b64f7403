"""The models of the experiments: train.py's, further ones, and rules that move their labels.

Whoever imports this gets them from `train.MODELS`, `train.fill_defaults` and `train.build_model`.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import convnext  # noqa: E402
import data  # noqa: E402
import mixer  # noqa: E402
import swin  # noqa: E402
import train as script  # noqa: E402
import weighing  # noqa: E402


def swin_5m(**kwargs):
    """A Swin of DeiT-T's size for 32 px: 16 x 16 tokens, then 8 x 8 and 4 x 4; 5.2 million
    parameters."""
    sizes = {"embed_dim": 64, "depths": (2, 6, 4), "num_heads": (2, 4, 8), "window_size": 4}
    return swin.Swin(**{**sizes, "init_std": None, **kwargs})


# Each with its rate of stochastic depth in the last block.
MODELS = {
    swin_5m: 0.1,
    mixer.mixer_micro: 0.0,
    mixer.mixer_small: 0.1,
    mixer.mixer_base: 0.1,
    convnext.convnext_micro: 0.0,
    convnext.convnext_tiny: 0.1,
    convnext.convnext_small: 0.4,
}
for make, rate in MODELS.items():
    script.MODELS[make.__name__] = make
    script.DROP_PATH[make.__name__] = rate


def fill_defaults(args, image_size, num_images, hflip=True, known=script.fill_defaults):
    """`train.fill_defaults`, with ConvNeXt's patches, which are as small as Swin's."""
    if args.model.startswith("convnext") and args.patch_size is None:
        img_size = args.img_size or script.default_img_size(image_size)
        args.patch_size = 4 if img_size > data.SMALL_SIZE else 2
    return known(args, image_size, num_images, hflip)


def build_model(args, num_classes, known=script.build_model):
    """`train.build_model`, whose labels follow another rule where a run's settings have a
    residual."""
    model = known(args, num_classes)
    if "residual" in args:
        weighing.weigh(model, args.residual)
    return model


def has_class_token(name):
    return name.startswith(("vit", "deit"))


script.fill_defaults = fill_defaults
script.build_model = build_model
