"""Promises of the README: its snippets run and give the right labels."""

import re
from pathlib import Path

import pytest
import torch
import torchvision

import data
import tl_align
import vit
from test_alignment import TORCHVISION_VIT_NAMES, load_torchvision_weights

README = (Path(__file__).parent.parent / "README.md").read_text()


def run_readme_snippet(words, namespace):
    """Run the Python snippet of the README that contains the words."""
    snippets = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    (snippet,) = [snippet for snippet in snippets if words in snippet]
    exec(compile(snippet, "README.md", "exec"), namespace)
    return namespace


def test_readme_snippet_for_vit_runs():
    namespace = run_readme_snippet("from vit import", {})
    assert namespace["loss"].isfinite() and namespace["share"].shape == (4, 1)


def run_snippet_for_another_model(words, model, grid_size=14):
    """The names of a snippet for other people's models, run on mixed images."""
    size = 16 * grid_size
    mask = tl_align.cutmix_mask(data.uniform((2, 3), "mask"), (size, size), 16)
    names = {"model": model, "images": torch.randn(2, 3, size, size), "mask": mask}
    run_readme_snippet("import add_class_token, align", names)
    return run_readme_snippet(words, names)


@torch.no_grad()
@pytest.mark.parametrize("qk_norm", [False, True])
def test_readme_snippet_for_timm_gives_the_labels_of_our_vit(qk_norm):
    timm = pytest.importorskip("timm")
    model = timm.create_model("deit_tiny_patch16_224", qk_norm=qk_norm, depth=3)
    names = run_snippet_for_another_model("q_norm", model)
    share = names["state"]["labels"][:, 0]
    assert share.shape == (2, 1)
    if qk_norm:
        return
    ours = vit.deit_tiny(depth=3)
    ours.load_state_dict(model.state_dict())
    labels = tl_align.token_labels(names["mask"], 16)
    logits, expected = ours(tl_align.mix(names["images"], names["mask"]), labels)
    torch.testing.assert_close(names["logits"], logits)
    torch.testing.assert_close(share, expected)


@torch.no_grad()
def test_readme_snippet_for_torchvision_gives_the_labels_of_our_vit():
    settings = {"num_layers": 3, "num_heads": 3, "hidden_dim": 192, "mlp_dim": 768}
    settings.update({"image_size": 64, "patch_size": 16, "num_classes": 5})
    model = torchvision.models.VisionTransformer(**settings).eval()
    names = run_snippet_for_another_model("self_attention", model, grid_size=4)
    ours = vit.deit_tiny(img_size=64, depth=3, num_classes=5)
    load_torchvision_weights(ours, model, TORCHVISION_VIT_NAMES)
    labels = tl_align.token_labels(names["mask"], 16)
    logits, expected = ours(tl_align.mix(names["images"], names["mask"]), labels)
    torch.testing.assert_close(names["logits"], logits)
    torch.testing.assert_close(names["state"]["labels"][:, 0], expected)


@torch.no_grad()
def test_readme_snippet_for_hugging_face_gives_the_labels_of_its_attentions():
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(num_hidden_layers=2, attn_implementation="eager")
    model = transformers.ViTForImageClassification(config).eval()
    names = run_snippet_for_another_model("output_attentions", model)
    expected = tl_align.add_class_token(tl_align.token_labels(names["mask"], 16))
    for attn in names["outputs"].attentions:
        expected = (expected + attn.mean(1) @ expected) / 2
    torch.testing.assert_close(names["state"]["labels"], expected)
    assert not torch.allclose(expected[:, 0], names["mask"].mean((2, 3)), atol=1e-4)


def test_lines_of_the_readme_are_in_the_code():
    (excerpt,) = re.findall(r"```py\n(.*?)```", README, re.DOTALL)
    code = {line.split("#")[0].strip() for line in Path(vit.__file__).read_text().splitlines()}
    assert all(line.split("#")[0].strip() in code for line in excerpt.splitlines())


def test_readme_has_the_lengths_of_the_files():
    lengths = re.findall(r"\[`(\w+\.py)`\]\(\w+\.py\) \| (\d+) \|", README)
    assert len(lengths) == 6
    for name, length in lengths:
        lines = (Path(tl_align.__file__).parent / name).read_text().splitlines()
        assert int(length) == pytest.approx(len(lines), rel=0.05), name
