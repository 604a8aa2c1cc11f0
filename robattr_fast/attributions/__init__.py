"""Maps that explain one class of one image: ``attribution(model, x, target=None, create_graph=False)`` -> [B, *M].

With ``create_graph=True`` each can be differentiated with respect to x and the model's parameters; each is an
``explain=`` of `robattr_fast.certify`. What else one takes are keywords: functools.partial sets them.
"""

from robattr_fast.attributions.attention import attention, gradient_rollout, rollout
from robattr_fast.attributions.gradcam import grad_cam
from robattr_fast.attributions.gradient import gradient, input_x_gradient
from robattr_fast.attributions.integrated import integrated_gradients
from robattr_fast.attributions.magnitude import magnitude
from robattr_fast.attributions.smoothed import smoothgrad

__all__ = [
    "attention",
    "grad_cam",
    "gradient",
    "gradient_rollout",
    "input_x_gradient",
    "integrated_gradients",
    "magnitude",
    "rollout",
    "smoothgrad",
]
