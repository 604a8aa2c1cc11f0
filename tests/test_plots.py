"""The figure of a certificate: the numbers that it shows, and that it can be drawn at all."""

import numpy as np
import pytest
import torch
from PIL import Image

from robattr_fast.certificates import Certificate
from robattr_fast.certificates.certificate.statements import METHODS
from robattr_fast.report import picture

K = 20


def certificate(shape=(3, 8, 9), *, images=1, samples=2000, **options):
    """Counts of a smooth map with a clear top, levels=1."""
    n = int(np.prod(shape))
    values = torch.linspace(0.01, 0.9, n, dtype=torch.float64).repeat(images, 1)
    counts = (samples * values).to(torch.int32)[:, :, None]
    return Certificate.from_counts(counts, samples, sigma=0.5, shape=shape, slack=options.pop("slack", None), **options)


def lines(figure, panel=-1):
    return {line.get_label(): line for line in figure.axes[panel].get_lines()}


@pytest.mark.parametrize("shape", [(3, 8, 9), (8, 9), (1, 8, 9)])
def test_figure_is_a_png_of_paper_width(tmp_path, shape):
    image = torch.rand(3 if shape[0] == 8 else shape[0], 8, 9)
    figure = picture.certificate_figure(image, certificate(shape), k=K, radii=[0.01, 0.1], title="a title")
    picture.save(figure, tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as drawn:
        assert drawn.size == (1600, 510)
        assert np.asarray(drawn.convert("L")).std() > 20


def test_curves_are_those_of_the_certificate():
    cert = certificate()
    figure = picture.certificate_figure(torch.rand(3, 8, 9), cert, k=K, radii=[0.02, 0.1])
    (panel,) = (index for index, axes in enumerate(figure.axes) if "radius" in axes.get_xlabel())
    drawn = lines(figure, panel)
    for label, source in ((picture.OURS, cert), (picture.PUBLISHED, cert.with_bounds(bound="hoeffding", slack=0))):
        radii, percent = drawn[label].get_data()
        assert radii[0] == 0
        assert radii[-1] >= 0.1
        np.testing.assert_allclose(percent, 100 * source.overlap(K, radii.tolist()).share[:, 0].numpy())
    assert (drawn[picture.OURS].get_ydata() > drawn[picture.PUBLISHED].get_ydata()).any()


def with_second_moments(n=360, samples=600, k_tau=36):
    """Independent samples of 0/1 maps that each select k_tau elements."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.linspace(-3, 3, n) + 1.5 * torch.randn(samples, n, generator=generator)
    maps = torch.zeros(samples, n, dtype=torch.uint8).scatter_(1, scores.topk(k_tau, dim=1).indices, 1)
    return Certificate.from_samples(
        maps[None], num_levels=1, sigma=0.5, shape=(3, 12, 10), tau=0.1, slack=None, retain=samples
    )


def test_every_method_has_its_curve():
    cert = with_second_moments()
    grid, marked = np.linspace(0, 0.4, 9).tolist(), [0.1, 0.2]
    curves = picture.overlap_curves(cert, 36, grid, marked)
    assert list(curves) == [picture.OURS, picture.MARGINAL, picture.PUBLISHED]
    shares = {method: cert.overlap(36, grid, method).share[:, 0].numpy() for method in METHODS}
    np.testing.assert_array_equal(curves[picture.MARGINAL], shares["marginal"])
    assert (curves[picture.OURS] <= shares["best"]).all()
    assert (curves[picture.OURS] >= np.maximum(shares["marginal"], shares["second-moment"])).all()
    at = [grid.index(radius) for radius in marked]
    np.testing.assert_array_equal(curves[picture.OURS][at], shares["best"][at])
    assert (shares["best"] > shares["marginal"]).any()


def test_figure_tells_the_cosine():
    cert = with_second_moments()
    figure = picture.certificate_figure(torch.rand(3, 12, 10), cert, k=36, radii=[0.02, 0.1])
    (caption,) = (text.get_text() for text in figure.texts if "samples" in text.get_text())
    assert f"at radius 0.1: at least {np.floor(1000 * float(cert.cosine(0.1))) / 1000:.3f}" in caption
    assert float(cert.cosine(0.1)) > 0.1


def test_published_procedure_alone_has_one_curve():
    cert = certificate(bound="hoeffding", slack=0)
    assert list(picture.overlap_curves(cert, K, [0.0, 0.1])) == [picture.OURS]


def test_radius_grid_reaches_what_is_marked_and_where_the_certificate_fades():
    cert = certificate()
    fade = float(cert.radius(K, 0.02)[0])
    assert fade > 0.01
    assert picture.radius_grid(cert, K, [0.01])[-1] >= fade
    assert picture.radius_grid(cert, K, [10 * fade])[-1] >= 10 * fade


def test_signed_radius_of_a_pixel_is_in_if_a_channel_is_and_out_if_all_are():
    stays_in = torch.tensor([[[0.0, 0.3, 0.0]], [[0.2, 0.0, 0.0]]])
    stays_out = torch.tensor([[[0.0, 0.0, 0.5]], [[0.0, 0.4, 0.1]]])
    np.testing.assert_allclose(picture.signed_radius(stays_in, stays_out), [[0.2, 0.3, -0.1]])


def test_display_map_clips_and_scales():
    values = torch.zeros(2, 10, 10, dtype=torch.float64)
    values[:, 0, 0] = 1000.0
    values[:, 1:6] = 1.0
    shown = picture.display_map(values, percentile=90)
    assert shown[0, 0] == 1
    assert shown[3, 3] == 1
    assert shown[8, 8] == 0
    assert np.isfinite(picture.display_map(torch.zeros(4, 4))).all()
    assert picture.display_map(torch.eye(40))[0, 0] == 1


@pytest.mark.parametrize(
    ("image", "cert", "radii", "message"),
    [
        (torch.rand(3, 8, 9), certificate(images=2), [0.1], "image"),
        (torch.rand(3, 9, 8), certificate(), [0.1], "image"),
        (torch.rand(8, 9), certificate(), [0.1], "image"),
        (torch.rand(3, 8, 9), certificate(), [], "radii"),
    ],
)
def test_bad_arguments(image, cert, radii, message):
    with pytest.raises(ValueError, match=message):
        picture.certificate_figure(image, cert, k=K, radii=radii)


def test_a_certificate_of_nothing_can_be_drawn(tmp_path):
    cert = certificate(samples=1)
    picture.save(picture.certificate_figure(torch.zeros(3, 8, 9), cert, k=K, radii=[0.0]), tmp_path / "void.png")
