"""The models of the experiments: train.py's, others that it does not know, and rules that move their labels.

Whoever imports this gets them from `train.MODELS`, `train.recipe` and `train.build`.
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

# A Swin of DeiT-T's size for 32 px: 16 x 16 tokens, then 8 x 8 and 4 x 4; 5.2 million parameters.
SWIN_5M = {"dim": 64, "depths": (2, 6, 4), "heads": (2, 4, 8), "window": 4}
script.MODELS["swin_5m"] = lambda **kwargs: swin.Swin(**{**SWIN_5M, **kwargs})
MIXERS = [mixer.mixer_micro, mixer.mixer_small, mixer.mixer_base]
CONVNEXTS = [convnext.convnext_micro, convnext.convnext_tiny, convnext.convnext_small]
script.MODELS |= {make.__name__: make for make in MIXERS + CONVNEXTS}
DROP_PATH = {"mixer_micro": 0.0, "convnext_micro": 0.0, "convnext_small": 0.4}


def recipe(s, side, images, known=script.recipe):
    """`train.recipe`, with what it does not know of these models."""
    if s.model.startswith("convnext"):
        vars(s).setdefault("patch_size", 4 if vars(s).get("img_size", side) > data.SMALL else 2)
    if s.model in DROP_PATH:
        vars(s).setdefault("drop_path", DROP_PATH[s.model])
    return known(s, side, images)


def build(s, classes, known=script.build):
    """`train.build`, whose labels follow another rule where a run's settings have a residual."""
    model = known(s, classes)
    if "residual" in s:
        weighing.weigh(model, s.residual)
    return model


def has_class_token(name):
    return name.startswith(("vit", "deit"))


script.recipe, script.build = recipe, build
