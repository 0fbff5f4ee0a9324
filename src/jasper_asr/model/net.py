"""Jasper and QuartzNet in torch, for training only; inference runs the graph that model/graph.py builds.

Parameters carry NVIDIA's v2 names (`encoder.layers.I.conv.J.weight`, `encoder.layers.I.res.R.J.weight`,
`decoder.layers.0.weight`; QuartzNet says `mconv`), so a state_dict of this module is a checkpoint as NVIDIA writes it.
Architecture: Li et al., "Jasper: An End-to-End Convolutional Neural Acoustic Model", arXiv 1904.03288.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from jasper_asr.config import BATCH_NORM_EPS, BlockConfig, ModelConfig
from jasper_asr.model.net_spectral import convolve


class Jasper(nn.Module):
    """features float [B, n_filt, T], lens int [B] -> (log_probs [B, T', n_classes], lens [B])."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = nn.Module()
        channels = [config.in_feats, *(block.filters for block in config.blocks)]
        self.encoder.layers = nn.ModuleList(
            Block(block, channels[i], panes, config.family)
            for i, (block, panes) in enumerate(zip(config.blocks, config.residual_panes(), strict=True))
        )
        self.decoder = nn.Module()
        self.decoder.layers = nn.ModuleList([nn.Conv1d(channels[-1], config.n_classes, 1)])
        initialise = getattr(nn.init, config.init + "_")
        for module in self.modules():
            if isinstance(module, nn.Conv1d):
                initialise(module.weight)

    def forward(self, features: Tensor, lens: Tensor) -> tuple[Tensor, Tensor]:
        values, lens = self.encode(features, lens)[-1]
        return self.decode(values), lens

    def encode(self, features: Tensor, lens: Tensor) -> list[tuple[Tensor, Tensor]]:
        """What each block gives: values [B, C, T'] and lens [B]."""
        panes, outputs = [features], []
        for block in self.encoder.layers:  # type: ignore[union-attr]
            panes, lens = block(panes, lens)
            outputs.append((panes[-1], lens))
        return outputs

    def decode(self, values: Tensor) -> Tensor:
        """The last block's values [B, C, T'] -> log_probs [B, T', n_classes]."""
        logits = self.decoder.layers[0](values)  # type: ignore[index, operator]
        return F.log_softmax(logits.transpose(1, 2).float(), dim=2)


class Block(nn.Module):
    """`repeat` convolutions with BatchNorm, ReLU between them, plus 1x1 residuals of the panes; then ReLU."""

    def __init__(self, config: BlockConfig, in_channels: int, panes: tuple[int, ...], family: str) -> None:
        super().__init__()
        self.config = config
        self.dropout = nn.Dropout(config.dropout)
        layers: list[nn.Module] = []
        for index in range(config.repeat):
            if index:
                layers += [nn.ReLU(), nn.Dropout(config.dropout)]
            layers += _convolution(config, in_channels if index == 0 else config.filters)
        # QuartzNet's published weights say mconv where Jasper's say conv
        self.conv_name = "mconv" if family == "quartznet" else "conv"
        self.add_module(self.conv_name, nn.ModuleList(layers))
        self.res = nn.ModuleList(
            nn.ModuleList([nn.Conv1d(pane, config.filters, 1, bias=False), _batch_norm(config.filters)])
            for pane in panes
        )

    def forward(self, panes: list[Tensor], lens: Tensor) -> tuple[list[Tensor], Tensor]:
        out, out_lens = panes[-1], lens
        for layer in getattr(self, self.conv_name):
            if isinstance(layer, nn.Conv1d):
                out = self._convolve(layer, _mask(out, out_lens))
                out_lens = conv_lens(out_lens, layer)
            else:
                out = layer(out)
        for pane, branch in zip(panes, self.res, strict=False):  # a block without residuals has panes but no res
            residual = _mask(pane, lens)
            out = out + branch[1](self._convolve(branch[0], residual))  # type: ignore[index]
        out = self.dropout(F.relu(out))
        return ([*panes, out] if self.config.residual_dense else [out]), out_lens

    def _convolve(self, conv: nn.Conv1d, values: Tensor) -> Tensor:
        # the plain way outside training: there this network stands for what others compute
        return convolve(conv, values) if self.training else conv(values)


def conv_lens(lens: Tensor, conv: nn.Conv1d) -> Tensor:
    """Valid frames after a convolution: (L + 2p - d(k-1) - 1) // s + 1, in whole numbers."""
    (kernel,), (stride,), (dilation,) = conv.kernel_size, conv.stride, conv.dilation
    padding = int(conv.padding[0])
    return (lens + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


def _convolution(config: BlockConfig, in_channels: int) -> list[nn.Module]:
    def conv(out_channels: int, groups: int) -> nn.Conv1d:
        return nn.Conv1d(
            in_channels,
            out_channels,
            config.kernel_size,
            stride=config.stride,
            padding=config.padding,
            dilation=config.dilation,
            groups=groups,
            bias=False,
        )

    if not config.separable:
        return [conv(config.filters, 1), _batch_norm(config.filters)]
    pointwise = nn.Conv1d(in_channels, config.filters, 1, bias=False)
    return [conv(in_channels, in_channels), pointwise, _batch_norm(config.filters)]


def _batch_norm(channels: int) -> nn.BatchNorm1d:
    return nn.BatchNorm1d(channels, eps=BATCH_NORM_EPS, momentum=0.1)


def _mask(values: Tensor, lens: Tensor) -> Tensor:
    """Zeros beyond each utterance's length, so that a padded batch sees what a single utterance sees."""
    frames = torch.arange(values.shape[2], device=values.device)
    return values * (frames < lens[:, None])[:, None].to(values.dtype)
