"""How far an adversary can move a map: projected ascent on attributions, and on classes."""

from robattr_fast.attacks.attribution import AttributionPGD, Sweep
from robattr_fast.attacks.beside import Beside, beside
from robattr_fast.attacks.classes import pgd
from robattr_fast.attacks.objectives import Cosine, Distance, MassCenter, Objective, Region, TargetMap, TopK
from robattr_fast.attacks.presets import dombrowski, ghorbani, levine_l2, random_sign, random_sphere, rar_topk
from robattr_fast.attacks.problem import AttackResult
from robattr_fast.attacks.surrogate import Softplus, Surrogate

__all__ = [
    "AttackResult",
    "AttributionPGD",
    "Beside",
    "Cosine",
    "Distance",
    "MassCenter",
    "Objective",
    "Region",
    "Softplus",
    "Surrogate",
    "Sweep",
    "TargetMap",
    "TopK",
    "beside",
    "dombrowski",
    "ghorbani",
    "levine_l2",
    "pgd",
    "random_sign",
    "random_sphere",
    "rar_topk",
]
