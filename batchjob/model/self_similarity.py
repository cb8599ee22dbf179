"""A CNN's feature map in the form of attention, which it is not: the same clustering, scores and figures take it.

Pseudo-attention: softmax of the cosine similarity of the features of two patches over `TEMPERATURE`. Saliency in place
of the CLS row: the norm of each patch's features, and the features' first principal component.
"""

import torch
from torch import Tensor
from torch.nn import functional

TEMPERATURE = 0.2
"""Of the softmax over cosines. Chosen so that a ResNet's rows are as broad as a transformer's: on the sample's photos
ResNet-18 then puts 9 % of a row on the patch itself (DINOv2 ViT-S/14, last layer: 11 %) and spreads it over 135 patches
(88). At 0.1, as in contrastive learning, it is 51 %, and k-means cuts off single patches; see docs/models.md."""

SQUARINGS = 12  # of the Gram matrix: 4,096 power iterations, enough for eigenvalues 0.3 % apart


def self_similarity(features: Tensor) -> Tensor:
    """float32 [B, 1, P, P]: row i = softmax over patches j of cos(f_i, f_j) / TEMPERATURE, from [B, C, h, w]."""
    unit = functional.normalize(_patches(features), dim=-1)
    rows: Tensor = ((unit @ unit.transpose(-2, -1)) / TEMPERATURE).softmax(dim=-1)
    return rows[:, None]


def feature_norm(features: Tensor) -> Tensor:
    """float32 [B, 1, P]: the Euclidean norm of each patch's features, divided by the image's sum (so it sums to 1)."""
    norm = _patches(features).norm(dim=-1)
    share: Tensor = norm / norm.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    return share[:, None]


def first_component(features: Tensor) -> Tensor:
    """float32 [B, 1, P] in [-1, 1]: each patch's coordinate on the image's own first principal component.

    Divided by the largest absolute one; the sign is such that it rises with the feature norm (of a component that is
    not correlated with it, so that the first patch off zero is positive). Found by squaring the Gram matrix [P, P],
    which is a handful of batched products where a batched eigenvalue solver works image by image.
    """
    patches = _patches(features)
    centred = patches - patches.mean(dim=1, keepdim=True)
    gram = centred @ centred.transpose(-2, -1)
    tiny = torch.finfo(torch.float32).tiny
    for _ in range(SQUARINGS):
        gram = gram / gram.abs().amax(dim=(-2, -1), keepdim=True).clamp_min(tiny)
        gram = gram @ gram
    best = gram.diagonal(dim1=-2, dim2=-1).argmax(dim=-1)  # [B], the column least hurt by rounding
    component = gram.gather(2, best[:, None, None].expand(-1, gram.shape[1], 1))[..., 0]  # [B, P]
    norm = patches.norm(dim=-1)
    sign = (component * (norm - norm.mean(dim=-1, keepdim=True))).sum(dim=-1, keepdim=True)
    component = torch.where(sign < 0, -component, component)
    return (component / component.abs().amax(dim=-1, keepdim=True).clamp_min(tiny))[:, None]


def _patches(features: Tensor) -> Tensor:
    """float32 [B, P, C], patches in row-major order."""
    return features.float().flatten(2).transpose(1, 2)
