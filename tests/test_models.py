"""The models in other people's hands: hooks, adapters, quantization, meta device, export."""

import pytest
import torch

import tl_align
from test_alignment import (
    CASES,
    add_noise,
    forward_with_full_last_block,
    small_swin,
    small_vit,
)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


class Adapter(torch.nn.Module):
    """A low-rank layer beside a frozen one, whose weights it shows as its own (LoRA)."""

    def __init__(self, base):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = torch.nn.Linear(base.in_features, 4)
        self.up = torch.nn.Linear(4, base.out_features)

    @property
    def weight(self):
        return self.base.weight

    @property
    def bias(self):
        return self.base.bias

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


@pytest.mark.parametrize("change", ["hooks", "adapters"])
@pytest.mark.parametrize("fused", [False, True])
def test_changed_qkv_layers_act_in_the_class_only_block_too(fused, change):
    model = small_vit(fused=fused)
    for block in model.blocks:
        if change == "hooks":
            block.attn.qkv.register_forward_hook(lambda layer, inputs, output: 2 * output)
        else:
            block.attn.qkv = add_noise(Adapter(block.attn.qkv))
    model = model.double()
    images = torch.randn(4, 3, 24, 24, dtype=torch.float64)
    labels = torch.rand(4, 36, 1, dtype=torch.float64)
    rand = torch.rand(4, model.depth, 2)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    results = model(images, labels, rand)
    expected = forward_with_full_last_block(model, images, labels, rand)
    torch.testing.assert_close(results, expected)
    gradients = torch.autograd.grad(results[0].square().sum(), parameters)
    expected_gradients = torch.autograd.grad(expected[0].square().sum(), parameters)
    torch.testing.assert_close(gradients, expected_gradients)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_class_only_last_block_matches_full_block_with_a_quantized_qkv():
    quantization = pytest.importorskip("torch.ao.quantization")
    plain = small_vit().eval()
    names = {f"blocks.{i}.attn.qkv" for i in range(plain.depth)}
    model = quantization.quantize_dynamic(plain, names)
    images, labels, rand = torch.randn(2, 3, 24, 24), torch.rand(2, 36, 1), torch.rand(2, 3, 2)
    results = model(images, labels, rand)
    torch.testing.assert_close(results, forward_with_full_last_block(model, images, labels, rand))
    assert not torch.equal(results[0], plain(images))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("build_model", [small_vit, small_swin])
def test_every_layer_is_called(build_model, fused):
    model = build_model(fused=fused)
    layers = {name: layer for name, layer in model.named_modules() if not [*layer.children()]}
    called = set()
    for name, layer in layers.items():
        layer.register_forward_hook(lambda *_, name=name: called.add(name))
    model(torch.randn(2, 3, model.img_size, model.img_size))
    assert called == layers.keys()


@torch.no_grad()
@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("build_model", [small_vit, small_swin])
def test_model_that_was_built_on_the_meta_device_gives_the_same_logits(build_model, assign):
    model = build_model().eval()
    with torch.device("meta"):
        other = build_model().eval()
    if not assign:
        other.to_empty(device="cpu")
    other.load_state_dict(model.state_dict(), assign=assign)
    images = torch.randn(2, 3, model.img_size, model.img_size)
    assert torch.equal(other(images), model(images))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("build_model", [small_vit, small_swin])
def test_a_loss_on_the_meta_device_has_the_right_shapes(build_model, fused):
    model = build_model(fused=fused, drop_path_rate=0.1).to("meta")
    with torch.device("meta"):
        images = torch.randn(4, 3, model.img_size, model.img_size)
        mask = tl_align.cutmix_mask(torch.rand(4, 3), images.shape[-2:], model.patch_size)
        targets = torch.zeros(4, dtype=torch.long)
    labels = tl_align.token_labels(mask, model.patch_size)
    logits, share = model(tl_align.mix(images, mask), labels)
    assert logits.shape == (4, 7) and share.shape == (4, 1)
    tl_align.mixed_cross_entropy(logits, targets, share).backward()
    assert all(parameter.grad.is_meta for parameter in model.parameters())


@torch.no_grad()
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("name", ["vit", "swin-odd"])
def test_traced_models_accept_other_batch_sizes(name):
    build_model, (height, width) = CASES[name]
    model = build_model().eval()
    images = torch.randn(3, 3, height, width)
    labels = torch.rand(3, (height // 4) * (width // 4), 1)
    traced = torch.jit.trace(model, (images[:1], labels[:1]))
    torch.testing.assert_close(traced(images, labels), model(images, labels))


@torch.no_grad()
@pytest.mark.parametrize("name", ["vit", "swin-odd"])
def test_exported_models_accept_other_batch_sizes(name):
    build_model, (height, width) = CASES[name]
    model = build_model().eval()
    images = torch.randn(3, 3, height, width)
    labels = torch.rand(3, (height // 4) * (width // 4), 1)
    batch = torch.export.Dim("batch", max=4096)
    shapes = ({0: batch}, {0: batch})
    exported = torch.export.export(model, (images, labels), dynamic_shapes=shapes).module()
    for size in (1, 2):
        expected = model(images[:size], labels[:size])
        torch.testing.assert_close(exported(images[:size], labels[:size]), expected)
