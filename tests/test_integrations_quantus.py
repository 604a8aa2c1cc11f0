"""Quantus: its calling convention, explain_func(model=, inputs=, targets=, **explain_func_kwargs) -> numpy."""

import numpy as np
import pytest
import torch
from models import small_cnn

import robattr_fast as rf
from robattr_fast.integrations.quantus import explain_func

SETTINGS = {"sigma": 0.2, "samples": 5, "kind": "squared", "seed": 4}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_convention(dtype):
    x = np.random.default_rng(0).random((3, 1, 12, 12)).astype(dtype)
    labels = np.array([0, 3, 1])
    got = explain_func(model=small_cnn(), inputs=x, targets=labels, device="cpu", **SETTINGS)
    assert isinstance(got, np.ndarray)
    assert got.shape == x.shape
    expected = rf.smoothgrad(small_cnn(), torch.from_numpy(x).float(), target=[0, 3, 1], **SETTINGS)
    np.testing.assert_allclose(got, expected.numpy(), rtol=1e-5)


def test_tensors_and_no_targets():
    x = torch.rand(2, 1, 12, 12)
    got = explain_func(small_cnn(), x, None, **SETTINGS)
    np.testing.assert_allclose(got, rf.smoothgrad(small_cnn(), x, **SETTINGS).numpy(), rtol=1e-5)


def test_half_models_give_numpy_maps():
    x = np.zeros((1, 1, 12, 12), np.float32)
    assert explain_func(small_cnn().bfloat16(), x, np.array([1]), **SETTINGS).dtype == np.float32


def test_in_a_metric_of_quantus():
    quantus = pytest.importorskip("quantus", reason="quantus brings pandas and opencv, which the tests do not need")
    metric = quantus.MaxSensitivity(nr_samples=2, disable_warnings=True)
    x = np.random.default_rng(0).random((2, 1, 12, 12)).astype(np.float32)
    scores = metric(
        model=small_cnn(),
        x_batch=x,
        y_batch=np.array([0, 1]),
        explain_func=explain_func,
        explain_func_kwargs=SETTINGS,
        device="cpu",
    )
    assert len(scores) == 2
    assert all(score > 0 for score in scores)
