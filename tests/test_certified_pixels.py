"""The measures of pixel certificates: shares, the grid pointing game, deletion."""

import math

import pytest
import torch
from models import small_cnn
from torch import nn

import robattr_fast as rf
from robattr_fast import metrics


def certificate(counts, samples=200):
    """Of two maps of 4 x 6 pixels: the second with all counts upside down."""
    both = torch.stack([counts, samples - counts]).int()
    return rf.Certificate.from_counts(both[..., None], samples, sigma=0.25, shape=(4, 6), bound="clopper-pearson")


def test_shares_of_a_certificate():
    counts = torch.tensor([200] * 5 + [0] * 12 + [100] * 7)
    shares = metrics.certified_shares(certificate(counts).pixels(0.1))
    assert (shares.top * 24).tolist() == pytest.approx([5, 12])
    assert (shares.rest * 24).tolist() == pytest.approx([12, 5])
    assert (shares.abstained * 24).tolist() == pytest.approx([7, 7])
    assert (shares.certified + shares.abstained).tolist() == pytest.approx([1, 1])
    with pytest.raises(TypeError, match=r"pixels: got torch\.float64, expected int8"):
        metrics.certified_shares(certificate(counts).map)


def test_localization_of_what_is_certified():
    counts = torch.full((4, 6), 100)
    counts[:2, :3] = 200  # the top left cell
    counts[3, 5] = counts[0, 4] = 200
    found = certificate(counts.flatten()).pixels(0.1) == 1
    regions = metrics.grid_regions(4, 6)
    shares = [metrics.localization(found.float(), region)[0].item() for region in regions]
    assert shares == pytest.approx([6 / 8, 1 / 8, 0, 1 / 8])
    assert metrics.localization(found.float(), regions[0])[1].isnan()  # nothing is certified to be selected


def test_localization_counts_what_is_positive():
    maps = torch.randn(3, 8, 8)
    maps[2] = -maps[2].abs()
    region = torch.rand(8, 8) > 0.5
    expected = [float(m[region & (m > 0)].sum() / m[m > 0].sum()) for m in maps[:2]]
    found = metrics.localization(maps, region)
    assert found[:2].tolist() == pytest.approx(expected, rel=1e-6)
    assert found[2].isnan()
    each = torch.stack([region, ~region, region])
    assert (found + metrics.localization(maps, ~region))[:2].tolist() == pytest.approx([1, 1])
    assert metrics.localization(maps, each)[1] == pytest.approx(1 - expected[1])
    maps[0, 0, 0] = math.inf
    assert metrics.localization(maps, region)[0].isnan()
    with pytest.raises(ValueError, match=r"region: got shape \(8,\), expected \(3, 8, 8\)"):
        metrics.localization(maps, region[0])
    with pytest.raises(TypeError, match="region: got dtype"):
        metrics.localization(maps, region.float())


def test_grids_and_their_cells():
    images = torch.rand(4, 3, 5, 6)
    grid = metrics.image_grid(images)
    assert grid.shape == (1, 3, 10, 12)
    regions = metrics.grid_regions(10, 12)
    assert bool((regions.sum(dim=0) == 1).all())
    for image, region in zip(images, regions, strict=True):
        assert torch.equal(grid[0][:, region].view(3, 5, 6), image)
    assert metrics.image_grid(torch.rand(9, 1, 2, 2)).shape == (1, 1, 6, 6)
    with pytest.raises(ValueError, match=r"images: got shape \(3, 3, 5, 6\)"):
        metrics.image_grid(images[:3])
    with pytest.raises(ValueError, match="height: got 9, expected a multiple of 2"):
        metrics.grid_regions(9, 12)


class Pixel(nn.Module):
    """Two classes; the logit of the first is the value of one pixel."""

    def forward(self, x):
        return torch.stack([x[:, 0, 1, 2], torch.zeros(len(x))], dim=1)


def test_deletion_by_hand():
    x = torch.full((2, 1, 3, 4), 2.0)
    masks = torch.zeros(3, 2, 3, 4, dtype=torch.bool)
    masks[0, :, 0, 0] = True
    masks[1, 0, 1, 2] = True
    found = metrics.deletion(Pixel(), x, masks, [0, 0])
    high, low = 1 / (1 + math.exp(-2)), 0.5
    assert found.probability[:, 0].tolist() == pytest.approx([high, high, low, low])  # what is deleted stays deleted
    assert found.probability[:, 1].tolist() == pytest.approx([high] * 4)
    assert found.area.tolist() == pytest.approx([(high + (high + low) / 2 + low) / 3, high])
    filled = metrics.deletion(Pixel(), x, masks[:, :, None], [0, 1], fill=torch.full((3, 4), -2.0))
    assert filled.probability[-1].tolist() == pytest.approx([1 - high, 1 - high])


def test_the_top_of_a_map_is_deleted_first():
    model, x = small_cnn(), torch.rand(2, 1, 12, 12)
    maps = rf.attributions.input_x_gradient(model, x, [1, 1])[:, 0]
    shares = [0.1, 0.3, 1.0]
    masks = metrics.top_masks(maps, shares)
    assert masks.flatten(2).sum(dim=2).tolist() == [[14, 14], [43, 43], [144, 144]]
    assert bool((masks[0] <= masks[1]).all())
    kept = ~masks[0]
    assert bool(
        (maps.where(masks[0], math.inf).flatten(1).amin(1) >= maps.where(kept, -math.inf).flatten(1).amax(1)).all()
    )
    found = metrics.deletion(model, x, masks, [1, 1])
    least = metrics.deletion(model, x, metrics.top_masks(-maps, shares), [1, 1])
    assert (found.probability[1] < found.probability[0]).all()
    assert (found.area < least.area).all()
    nothing = model(torch.zeros_like(x)).softmax(1)[:, 1].double()
    torch.testing.assert_close(found.probability[-1], nothing.detach(), rtol=1e-5, atol=0)


def test_a_constant_map_deletes_nothing():
    maps = torch.stack([torch.zeros(4, 4), torch.rand(4, 4)])
    assert metrics.top_masks(maps, [0.5]).flatten(2).sum(dim=2).tolist() == [[0, 8]]


def test_deletion_refuses():
    x = torch.rand(2, 1, 3, 4)
    masks = torch.zeros(1, 2, 3, 4, dtype=torch.bool)
    with pytest.raises(TypeError, match="masks: got dtype"):
        metrics.deletion(Pixel(), x, masks.float(), [0, 0])
    with pytest.raises(ValueError, match=r"masks: got shape \(1, 2, 3, 3\)"):
        metrics.deletion(Pixel(), x, masks[..., :3], [0, 0])
    with pytest.raises(ValueError, match="target: got shape"):
        metrics.deletion(Pixel(), x, masks, [0])
    with pytest.raises(ValueError, match=r"model: it returned \(2, 1, 3, 4\)"):
        metrics.deletion(nn.Identity(), x, masks, [0, 0])
    with pytest.raises(ValueError, match="shares: got 0"):
        metrics.top_masks(x, [0])
