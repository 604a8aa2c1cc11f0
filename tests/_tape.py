"""A CUDA graph imitated on a CPU: the operators that work calls, recorded once and called again on the same tensors.

As with a graph, nothing that Python decided at the capture is decided again, and to read a value fails.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import robattr_fast as rf
from robattr_fast.ops.noisy_samples import fill
from robattr_fast.sampling import sampler as sampling
from robattr_fast.sampling import step

# What a captured step counts, on the tape and on a GPU.
COMMON = {"sigma": 0.3, "tau": 0.2, "samples": 130, "batch_size": 32}
CASES = [
    {"levels": 15, "gamma": 0.05},
    {"levels": None, "gamma": 0.05},
    {"channel_sum": True},
    {"explain": "input_x_gradient"},
    {"second_moment": False},
    # Blocks end inside of batches.
    {"retain": 44, "keep_samples": True},
    {"autocast": torch.bfloat16},
    {"samples": 20},
    {"samples": 5},
    # Looks cut batches.
    {"samples": 2000, "stop": rf.StopWhen(k=20, radius=0.05, overlap=0.3), "batch_size": 48},
]


def _tensors(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _storage(tensor):
    return tensor.untyped_storage().data_ptr()


class _Tape(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        call = (func, args, kwargs or {})
        found = func(*args, **call[2])
        given = {_storage(tensor) for tensor in _tensors((args, kwargs))}
        # A view stays one; what is written in place is the argument itself; of the rest the values are made again.
        made = [tensor for tensor in _tensors(found) if _storage(tensor) not in given]
        if made or func._schema.is_mutable:
            self.calls.append((*call, _tensors(found), made))
        return found

    @torch.no_grad()
    def replay(self):
        for func, args, kwargs, found, made in self.calls:
            again = _tensors(func(*args, **kwargs))
            for old, new in zip(found, again, strict=True):
                if any(old is one for one in made):
                    old.detach().copy_(new)


class Recorder:
    """In place of `step.capture`."""

    def __init__(self):
        self.captures = self.replays = 0
        self.memories = []
        self._results = []

    def __call__(self, work, device, memory=None):
        self.captures += 1
        memory = memory or step.Memory(object(), object())
        self.memories.append(memory)
        work()
        with _Tape() as tape:
            results = work()
        self._results.append((memory, results))

        def replay():
            self.replays += 1
            # Graphs that share their memory may write anything over what the others gave.
            for theirs, given in self._results:
                if theirs is memory and given is not results:
                    for tensor in given:
                        tensor.fill_(1 if tensor.dtype == torch.bool else -7)
            tape.replay()
            return results

        return replay, memory


@torch.library.custom_op("robattr_fast_tests::fill", mutates_args=("out",))
def _fill(
    out: torch.Tensor,
    x: torch.Tensor,
    sigma: float,
    seed: int,
    first_sample: int,
    image_ids: torch.Tensor,
    sample_offset: torch.Tensor,
) -> None:
    """As one operator: on a CPU it reads the offset."""
    noise = {"first_sample": first_sample, "image_ids": image_ids, "sample_offset": sample_offset}
    fill(out, x, sigma, seed=seed, **noise)


def recording(monkeypatch):
    """Captures are imitated on the CPU; their recorder."""
    recorder = Recorder()
    monkeypatch.setattr(step, "capture", recorder)
    monkeypatch.setattr(step, "fill", lambda out, x, sigma, **options: _fill(out, x, sigma, **options))
    monkeypatch.setattr(sampling, "can_capture", lambda device: True)
    return recorder
