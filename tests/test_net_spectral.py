"""Spectral convolution in training against torch's own, values and gradients, and against finite differences."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

from jasper_asr.model.net import Jasper  # noqa: E402
from jasper_asr.model.net_spectral import SpectralConvolution, best_tile, convolve, suits  # noqa: E402


def conv(channels=64, outputs=64, taps=9, **options) -> nn.Conv1d:
    torch.manual_seed(channels + outputs + taps)
    options = {"padding": taps // 2, "bias": False} | options
    return nn.Conv1d(channels, outputs, taps, **options)


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Within float32 rounding of sums of hundreds of terms."""
    assert float((found.detach() - expected.detach()).abs().max()) < 3e-6 * float(expected.detach().abs().max())


@pytest.mark.parametrize(
    ("batch", "channels", "outputs", "taps", "frames", "dilation"),
    [
        (8, 176, 176, 13, 152, 1),
        (3, 64, 70, 7, 5, 1),
        (2, 65, 64, 29, 1, 1),
        (2, 65, 64, 9, 333, 1),
        (1, 64, 64, 31, 40, 1),
        (3, 64, 70, 13, 152, 2),
        (3, 64, 70, 13, 47, 2),
        (3, 64, 70, 13, 64, 3),
        (3, 64, 70, 13, 3, 4),
        (3, 64, 70, 13, 1, 2),
    ],
)
def test_values_and_gradients_are_those_of_float64(batch, channels, outputs, taps, frames, dilation):
    options = {"dilation": dilation, "padding": taps // 2 * dilation}
    layer, exact = conv(channels, outputs, taps, **options), conv(channels, outputs, taps, **options).double()
    values, gradient = torch.randn(batch, channels, frames), torch.randn(batch, outputs, frames)
    exact_values = values.double().requires_grad_()
    expected = exact(exact_values)
    expected.backward(gradient.double())
    values.requires_grad_()
    found = convolve(layer, values)
    # what undoes the phases comes after the spectral step
    assert dilation > 1 or type(found.grad_fn).__name__ == "SpectralConvolutionBackward"
    assert suits(layer)
    found.backward(gradient)
    assert_close(found, expected)
    assert_close(values.grad, exact_values.grad)
    assert_close(layer.weight.grad, exact.weight.grad)


def test_gradients_against_finite_differences():
    rng = np.random.default_rng(0)
    values, weight, gradient = (
        torch.from_numpy(rng.standard_normal(shape).astype(np.float32)) for shape in ((2, 3, 11), (4, 3, 5), (2, 4, 11))
    )
    values.requires_grad_()
    weight.requires_grad_()
    SpectralConvolution.apply(values, weight, 6).backward(gradient)
    for tensor, index in ((values, (1, 2, 7)), (weight, (3, 1, 4))):
        moved = []
        for step in (0.5, -0.5):  # linear in each: the step may be large
            shifted = tensor.detach().clone()
            shifted[index] += step
            pair = (shifted, weight.detach()) if tensor is values else (values.detach(), shifted)
            moved.append(float((SpectralConvolution.apply(*pair, 6) * gradient).sum()))
        assert moved[0] - moved[1] == pytest.approx(float(tensor.grad[index]), abs=1e-4)


def test_no_gradient_for_an_input_that_needs_none():
    layer = conv()
    found = convolve(layer, torch.randn(2, 64, 30))
    found.sum().backward()
    assert layer.weight.grad is not None


@pytest.mark.parametrize(
    "options", [{"stride": 2}, {"dilation": 2, "padding": 4}, {"groups": 64}, {"padding": 0}, {"bias": True}]
)
def test_what_does_not_suit_is_left_to_torch(options):
    layer = conv(**options)
    assert not suits(layer)
    values = torch.randn(2, 64, 50)
    assert torch.equal(convolve(layer, values), layer(values))


@pytest.mark.parametrize("bias", [True, False])
def test_one_tap_is_a_product(bias):
    layer, values = conv(64, 29, 1, bias=bias), torch.randn(3, 64, 17)
    assert_close(convolve(layer, values), layer(values))


def test_float64_is_left_to_torch():
    layer, values = conv(), torch.randn(2, 64, 50)
    assert convolve(layer.double(), values.double()).dtype == torch.float64


@pytest.mark.parametrize("taps", [9, 13, 17])
def test_under_autocast_spectra_are_bfloat16(taps):
    """Values and both gradients within 1 % of float64; torch's own bfloat16 convolution comes within 0.3 %."""
    layer, values = conv(176, 176, taps), torch.relu(torch.randn(4, 176, 150)).requires_grad_()
    gradient = torch.randn(4, 176, 150)
    exact, exact_values = conv(176, 176, taps).double(), values.detach().double().requires_grad_()
    expected = exact(exact_values)
    expected.backward(gradient.double())
    with torch.autocast("cpu", torch.bfloat16):
        found = convolve(layer, values)
    assert type(found.grad_fn).__name__ == "SpectralConvolutionBackward"
    found.backward(gradient.to(found.dtype))
    assert (found.dtype, values.grad.dtype, layer.weight.grad.dtype) == (torch.bfloat16, torch.float32, torch.float32)
    for got, wanted in (
        (found.detach(), expected.detach()),
        (values.grad, exact_values.grad),
        (layer.weight.grad, exact.weight.grad),
    ):
        assert float((got - wanted).norm() / wanted.norm()) < 0.01


@pytest.mark.parametrize("taps", [7, 9, 13, 29, 41, 63])
@pytest.mark.parametrize("frames", [1, 40, 1500])
def test_tiles_are_even_and_as_long_as_the_overlap(taps, frames):
    tile = best_tile(torch.Size((176, 176, taps)), 8, frames)
    assert tile % 2 == 0
    assert tile >= taps - 1


def test_training_and_evaluation_modes_agree(tiny):
    torch.manual_seed(3)
    net = Jasper(tiny)
    for norm in net.modules():
        if isinstance(norm, nn.BatchNorm1d | nn.Dropout):
            norm.eval()
    feats, lens = torch.randn(2, 64, 90), torch.tensor([90, 61])
    trained, _ = net(feats, lens)
    evaluated, _ = net.eval()(feats, lens)
    np.testing.assert_allclose(trained.detach().numpy(), evaluated.detach().numpy(), atol=2e-5)
