"""The training step on a GPU, without one: shapes, types and devices are computed by torch's fake
tensors. No tensors of different devices meet, and nothing in a step waits for the GPU."""

import pytest
import torch
from helpers import make_args
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import data
import train as script

FLAGS = ("--augment", "full", "--mix", "switch", "--clip-grad", 1, "--ema-decay", 0.9)
FLAGS += ("--drop-path", 0.1, "--batch-size", 64, "--micro-batch", 32)


class FakeGPU(TorchDispatchMode):
    """Tensors on the GPU are fake, those on the CPU are real. Raises where both are used together,
    and where the host would wait for the GPU."""

    def __init__(self):
        super().__init__()
        self.mode = FakeTensorMode()
        self.mode.__deepcopy__ = lambda memo: self.mode  # the averaged model is a copy
        self.pinned = []
        self.all_must_be_pinned = False
        self.calls = []  # each function that ran on the GPU, and the type of its result

    def pin_memory(self, tensor):
        self.pinned.append(tensor)
        return tensor

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        is_copy = function is torch.ops.aten._to_copy.default
        is_used = any(isinstance(x, FakeTensor) for x in tree_leaves((args, kwargs)))
        if not is_used and torch.device(kwargs.get("device") or "cpu").type == "cpu":
            with unset_fake_temporarily():
                return function(*args, **kwargs)
        if is_copy and not is_used and self.all_must_be_pinned:
            pinned = any(args[0] is tensor for tensor in self.pinned)
            assert pinned, "the host waits while memory that is not pinned is copied"

        def to_fake(x):
            if isinstance(x, FakeTensor) or not (is_copy or x.dim() == 0):
                return x  # other real tensors are refused
            return self.mode.from_tensor(x)

        args, kwargs = tree_map_only(torch.Tensor, to_fake, (args, kwargs))
        result = function(*args, **kwargs)
        for x in tree_leaves(result):
            if isinstance(x, FakeTensor):
                assert x.device.type == "cuda", f"the host waits for the result of {function}"
                self.calls.append((str(function), x.dtype))
        return result


@pytest.fixture
def train_on_fake_gpu(monkeypatch):
    """train_on_fake_gpu(model_name) takes three steps, and returns the FakeGPU."""
    gpu = FakeGPU()
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: gpu.pin_memory(tensor))
    # autocast would be off without a GPU.
    monkeypatch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *args, **kwargs: True)

    def train(model_name, loss=script.mixed_loss):
        args = make_args("--model", model_name, *FLAGS)
        args.device, args.bf16 = "cuda:0", True
        with gpu.mode, gpu:
            trainer = script.Trainer(args, script.build_model(args, 10), loss)

            def backward(loss):  # autograd's own one needs a GPU
                for parameter in trainer.raw_model.parameters():
                    parameter.grad = torch.zeros_like(parameter)

            monkeypatch.setattr(torch.Tensor, "backward", backward)
            images = torch.zeros(64, 3, 32, 32, dtype=torch.uint8, device="cuda:0")
            targets = torch.zeros(64, dtype=torch.long, device="cuda:0")
            for step in range(3):
                total_loss = trainer.train_step(images, targets, step, 1e-3)
                gpu.all_must_be_pinned = True  # the first step also copies constants
        assert total_loss.device.type == "cuda" and total_loss.dtype == torch.float32
        return gpu

    constants = (data.channel_statistics, data.erasing_noise)
    for constant in constants:
        constant.cache_clear()
    yield train
    for constant in constants:
        constant.cache_clear()


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
@pytest.mark.parametrize("model_name", ["vit_micro", "swin_micro"])
def test_step_neither_waits_for_the_gpu_nor_mixes_devices(train_on_fake_gpu, model_name):
    calls = train_on_fake_gpu(model_name).calls
    assert ("aten.addmm.default", torch.bfloat16) in calls  # the linear layers
    assert ("aten._log_softmax.default", torch.float32) in calls  # the loss
    assert ("aten._log_softmax.default", torch.bfloat16) not in calls


def wait_for_a_number(loss, batch):
    return loss * loss.item()


def copy_to_the_host(loss, batch):
    return loss * batch.mean().cpu()


def select_by_a_mask(loss, batch):
    return loss + batch[batch > 0].sum()


def use_a_cpu_tensor(loss, batch):
    return loss + (batch * torch.ones(batch.shape)).mean()


def copy_what_is_not_pinned(loss, batch):
    return loss + torch.ones(3).to(batch.device).mean()


FAULTS = {
    wait_for_a_number: "_local_scalar_dense",
    copy_to_the_host: "the host waits for the result",
    select_by_a_mask: "nonzero",
    use_a_cpu_tensor: "convert all Tensors to FakeTensors",
    copy_what_is_not_pinned: "memory that is not pinned",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_in_a_step_is_noticed(train_on_fake_gpu, fault):
    def loss(model, images, *args):
        return fault(script.mixed_loss(model, images, *args), images)

    with pytest.raises((RuntimeError, AssertionError), match=FAULTS[fault]):
        train_on_fake_gpu("vit_micro", loss)
