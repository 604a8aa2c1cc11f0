"""What a report says in words."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from robattr_fast.certificates import Certificate
from robattr_fast.reference._select import selected
from robattr_fast.report.rounding import grey_levels, psnr, rounded_psnr
from robattr_fast.report.rounding import radius as shown_radius


def remarks(cert: Certificate) -> list[str]:
    """What a reader of a certificate's numbers must know besides."""
    found = []
    if cert.exploratory:
        found.append("bound, slack or alpha were chosen after the fact: its level is not what it says")
    if cert.reason is not None:
        found.append(cert.reason)
    elif cert.stopped_off_plan:
        found.append(f"{_listed(cert.samples)} samples of {_listed(cert.settings.planned_samples or ())} planned")
    found += [line for line in disagreements(cert) if line is not None]
    if cert.invalid.any():
        found.append(f"{_listed(cert.invalid)} samples were not finite and count as the zero map")
    return found


def classes(noisy: str, own: str | None) -> str:
    """The class that noisy copies vote for; and that of the image itself where it is another one (None: not known)."""
    return noisy if own in (None, noisy) else f"noisy copies say {noisy}, the model says {own}"


def disagreements(cert: Certificate, class_names: Sequence[str] | None = None) -> list[str | None]:
    """`Certificate.disagreements`, without the number of an image that is the only one."""
    lines = cert.disagreements(class_names)
    return lines if len(cert) > 1 else [line and line.removeprefix("image 0: ") for line in lines]


def nothing_certified(cert: Certificate, k: int, radii: Sequence[float]) -> str | None:
    """Why nothing of the top-k of one image is certified at any of the radii above 0; None if something is."""
    radii = [radius for radius in radii if radius > 0]
    if not radii or bool(cert.overlap(k, radii).share.any()):
        return None
    least, samples = min(radii), int(cert.samples[0])
    what = f"nothing certified at radius {least:g} or above: "
    if int(cert.invalid[0]) * 2 > samples:
        return f"{what}{int(cert.invalid[0])} of {samples} samples were not finite"
    reach = float(cert.radius(k, 1 / k)[0])
    if reach > 0:
        return f"{what}the top set begins to be certified below radius {shown_radius(reach)}"
    if not _steady(cert, k, least):
        return f"{what}{samples} samples are too few, whatever the map"
    return f"{what}no element of the top set stands out enough from the others; more samples or a larger --k may help"


def _steady(cert: Certificate, k: int, radius: float) -> bool:
    """Whether so many samples would certify a map that is the same in all of them."""
    samples, settings = cert.samples, cert.settings
    same = torch.zeros(1, settings.n, dtype=torch.float64)
    same[:, : min(k, selected(settings.tau or 1.0, settings.n))] = samples.double()
    if settings.levels is None:
        ideal = Certificate(samples=samples, sums=same, settings=settings)
    else:
        counts = torch.zeros(1, settings.n, settings.levels, dtype=torch.int32)
        counts[:, :, -1] = same.int()
        ideal = Certificate(samples=samples, counts=counts, settings=settings)
    return bool(ideal.overlap(k, radius, "marginal").share.any())


def _listed(numbers: Iterable[int]) -> str:
    return ", ".join(str(int(number)) for number in numbers)


def proved(certs: Sequence[Certificate]) -> list[str]:
    """The statements of the certificates, and what they leave open."""
    levels = sorted({cert.settings.evaluation.alpha for cert in certs})
    confidence = " or ".join(f"{100 * (1 - alpha):g} %" for alpha in levels)
    return [
        f"For each image, with confidence {confidence} over the random noise, everything below holds at once, for "
        "every radius and every size of the top set.",
        "Overlap. Change the image in whatever way, by at most the radius in the L2 norm of its pixels (in [0, 1]). Of "
        "the elements that the map shown here ranks highest, at least the stated number are among as many highest "
        "elements of the smoothed map of the changed image.",
        "Certified set. An element shown as surely in belongs to the top set of the smoothed map of every such image, "
        "an element shown as surely outside to none. A pixel with several channels is in if one of them is, and "
        "outside if all are.",
        "Class. Below its radius the class that most noisy copies vote for does not change.",
        "The statements are about the smoothed map, the mean over all noise of that strength. A map that is estimated "
        "anew at the changed image from few samples has an error of its own. Nothing is said about whether a map "
        "explains the model well.",
        "Shares and radii are rounded down, curves are drawn as steps below the certified values.",
        "A checksum detects damage of a file, not forgery: robattr-fast verify FILE --model MODEL --replay all repeats "
        "all samples.",
    ]


def radius_words(radii: Sequence[float], values: int | None) -> str:
    """What L2 radii mean for an image of so many values in [0, 1] (0 or None: not known)."""
    at = ", ".join(f"{radius:g}" for radius in radii)
    counts = ", ".join(f"{grey_levels(radius):,}".replace(",", " ") for radius in radii)
    text = f"L2 radius {at}: as far as {counts} values changed by one grey level (1/255) each"
    return (
        f"{text}; PSNR {', '.join(rounded_psnr(psnr(radius, values)) for radius in radii)}." if values else f"{text}."
    )
