"""The input gradient (Simonyan, Vedaldi, Zisserman 2014) and its product with the input (Shrikumar et al. 2016)."""

from __future__ import annotations

import torch
from torch import nn

from robattr_fast import model as _model
from robattr_fast.attributions.contract import Target, mapped


def gradient(model: nn.Module, x: torch.Tensor, target: Target = None, create_graph: bool = False) -> torch.Tensor:
    """d f_c / d x, signed: captum.attr.Saliency with abs=False.

    Args:
        model: eval-mode module that returns logits [B, classes].
        x: [B, *S] float images.
        target: class or classes [B]; None: the largest logit of each image.
        create_graph: let the map be differentiated, to x, where it requires gradients, and to the model's parameters.

    Returns:
        [B, *S] in x's dtype.

    Raises:
        TypeError, ValueError: a bad argument. ModelError: training mode, no logits, no gradient.
    """

    def rows(leaf: torch.Tensor, classes: torch.Tensor | None) -> torch.Tensor:
        return _model.input_gradient(model, leaf, classes, create_graph=create_graph)[0]

    return mapped(model, x, target, create_graph, rows)


def input_x_gradient(
    model: nn.Module, x: torch.Tensor, target: Target = None, create_graph: bool = False
) -> torch.Tensor:
    """x * d f_c / d x, signed: captum.attr.InputXGradient. Arguments as of `gradient`."""

    def rows(leaf: torch.Tensor, classes: torch.Tensor | None) -> torch.Tensor:
        return _model.input_gradient(model, leaf, classes, create_graph=create_graph)[0] * leaf

    return mapped(model, x, target, create_graph, rows)
