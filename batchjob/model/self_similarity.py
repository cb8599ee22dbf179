"""Brings a CNN's feature map into the form of attention, so that the same clustering, scores and figures take it.

It is not attention. Its rows are the softmax of the cosine similarity of two patches' features over `TEMPERATURE`. In
place of the CLS row it has the norm of each patch's features, and their first principal component.
"""

import torch
from torch import Tensor
from torch.nn import functional

TEMPERATURE = 0.2
"""Of the softmax over cosines. It is chosen so that a ResNet's rows are about as broad as a transformer's. On the
sample's photos, ResNet-18 then puts 9 % of a row on the patch itself and spreads the row over 135 patches; DINOv2
ViT-S/14 has 11 % and 88 patches in its last layer. At 0.1, which is usual in contrastive learning, ResNet-18 puts 51 %
on the patch itself, and k-means cuts off single patches. See docs/models.md."""

SQUARINGS = 12  # of the Gram matrix: they equal 4,096 power iterations, enough for eigenvalues 0.3 % apart


def self_similarity(features: Tensor) -> Tensor:
    """Returns float32 [B, 1, P, P] of features [B, C, h, w]: row i = softmax over j of cos(f_i, f_j) / TEMPERATURE."""
    unit = functional.normalize(_patches(features), dim=-1)
    rows: Tensor = ((unit @ unit.transpose(-2, -1)) / TEMPERATURE).softmax(dim=-1)
    return rows[:, None]


def feature_norm(features: Tensor) -> Tensor:
    """Returns float32 [B, 1, P] of features [B, C, h, w]: the Euclidean norm of each patch's, divided by their sum."""
    norm = _patches(features).norm(dim=-1)
    share: Tensor = norm / norm.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    return share[:, None]


def first_component(features: Tensor) -> Tensor:
    """Returns float32 [B, 1, P] in [-1, 1]: each patch's coordinate on the image's own first principal component.

    `features` are [B, C, h, w]. The coordinates are divided by the largest absolute one of the image. Their sign is
    such that they rise with the norm of the features; where they neither rise nor fall, the largest is positive. The
    component is found by squaring the Gram matrix [P, P] repeatedly, which takes a few batched products; a batched
    eigenvalue solver would work image by image.
    """
    patches = _patches(features)
    centred = patches - patches.mean(dim=1, keepdim=True)
    gram = centred @ centred.transpose(-2, -1)
    tiny = torch.finfo(torch.float32).tiny
    for _ in range(SQUARINGS):
        gram = gram / gram.abs().amax(dim=(-2, -1), keepdim=True).clamp_min(tiny)
        gram = gram @ gram
    best = gram.diagonal(dim1=-2, dim2=-1).argmax(dim=-1)  # [B] the column with the smallest error of rounding
    component = gram.gather(2, best[:, None, None].expand(-1, gram.shape[1], 1))[..., 0]  # [B, P]
    norm = patches.norm(dim=-1)
    sign = (component * (norm - norm.mean(dim=-1, keepdim=True))).sum(dim=-1, keepdim=True)
    component = torch.where(sign < 0, -component, component)
    return (component / component.abs().amax(dim=-1, keepdim=True).clamp_min(tiny))[:, None]


def _patches(features: Tensor) -> Tensor:
    """Returns float32 [B, P, C], patches in row-major order."""
    return features.float().flatten(2).transpose(1, 2)
