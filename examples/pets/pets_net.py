"""A network of one's own: what `base.factory: pets_net:PetsNet` in params.yaml names."""

import torch
import torch.nn.functional as F
from torch import nn


class PetsNet(nn.Module):
    """Three convolutions with BatchNorm, the mean over the image, one linear layer.

    nss calls it with the number of classes and the shape of the images (channels, height, width); further arguments
    come from `base.arguments`.
    """

    def __init__(self, num_classes: int, input_shape: tuple[int, int, int], width: int = 16) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(input_shape[0], width, 3, padding=1)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, 2 * width, 3, padding=1)
        self.norm2 = nn.BatchNorm2d(2 * width)
        self.conv3 = nn.Conv2d(2 * width, 4 * width, 3, padding=1)
        self.norm3 = nn.BatchNorm2d(4 * width)
        self.head = nn.Linear(4 * width, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: normalised images [n, c, h, w]. Returns logits [n, classes]."""
        x = F.max_pool2d(F.relu(self.norm1(self.conv1(x))), 2)
        x = F.max_pool2d(F.relu(self.norm2(self.conv2(x))), 2)
        x = F.relu(self.norm3(self.conv3(x)))
        return self.head(x.mean((2, 3)))
