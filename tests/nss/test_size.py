"""Multiply-adds against sums by hand."""

from __future__ import annotations

import pytest
import torch
from tiny_helpers import VIT
from torch import nn

import nss


@pytest.mark.parametrize("kind", [torch.float32, torch.float64, torch.bfloat16])
def test_those_of_a_convolution_and_a_head_are_products_of_their_sizes_in_any_precision(kind: torch.dtype) -> None:
    # 16 of 3 x 3 x 3 at 32 x 32 places; 16 maps pooled to 4 x 4, seven classes.
    layers = (nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(256, 7))
    assert nss.count_macs(nn.Sequential(*layers).to(kind), (3, 32, 32)) == 32 * 32 * 16 * 27 + 256 * 7


@pytest.mark.parametrize("is_fast", [True, False])
def test_attention_counts_whole_whether_pytorch_computes_it_at_once_or_not(is_fast: bool) -> None:
    factory = "torchvision.models:VisionTransformer"
    model = nss.build_model(factory, list("abcd"), (3, 32, 32), seed=0, arguments=VIT).eval()
    tokens, width = 4 * 4 + 1, 64
    project = tokens * width * 4 * width  # queries, keys, values, and what comes out
    attend = 2 * tokens * tokens * width  # scores, and values by them, of all heads
    layer = project + attend + 2 * tokens * width * 256
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(is_fast)
    try:
        assert nss.count_macs(model) == 4 * 4 * width * 3 * 8 * 8 + 2 * layer + width * 4
        assert torch.backends.mha.get_fastpath_enabled() is is_fast
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
