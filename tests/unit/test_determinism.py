"""The same run twice is the same to the bit: eager and compiled, fp32 and bf16, two threads."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from trainer.contract.scaling import param_groups
from trainer.contract.schedule import Schedule
from trainer.contract.shape import ModelShape
from trainer.contract.spec import JobSpec
from trainer.gpt import GPT
from trainer.optim import Optimizer, clip_grad_norm

SPEC = JobSpec.parse(
    {
        "model": {"depth": 2, "aspect_ratio": 32, "head_dim": 16, "max_seq_len": 256}
        | {"window_pattern": "SL", "n_kv_head": 2},
        "batch": {"device_batch_size": 4, "total_batch_size": 2048},
    }
)
# Compiling takes seconds a kind of layer, so what is compiled has one.
SMALL = JobSpec.parse(
    {
        "model": {"depth": 1, "aspect_ratio": 64, "head_dim": 32, "max_seq_len": 256},
        "batch": {"device_batch_size": 4, "total_batch_size": 2048},
    }
)
VOCAB, USED = 5000, 300  # tokens that repeat, in a table split over threads: atomics would show
STEPS = 4

# Compilation itself runs into what torch deprecates.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(autouse=True)
def deterministic() -> Iterator[None]:
    threads, fill = torch.get_num_threads(), torch.utils.deterministic.fill_uninitialized_memory
    torch.set_num_threads(2)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = fill
    torch.set_num_threads(threads)


def train(
    spec: JobSpec, dtype: torch.dtype, compile: bool
) -> tuple[list[float], dict[str, Tensor]]:
    """Losses of the steps, and all weights and optimizer state after them."""
    shape = ModelShape.of(spec.model, VOCAB)
    groups = param_groups(spec, shape)
    model = GPT(shape, dtype, dtype)
    model.init_weights(0)
    if compile:
        model.compile_loss()
    optimizer = Optimizer(model, groups, dtype, compile=compile)
    schedule = Schedule(spec.schedule, groups)
    generator = torch.Generator().manual_seed(1)
    losses = []
    for step in range(STEPS):
        for _ in range(2):
            ids_BT = torch.randint(0, USED, (4, 257), generator=generator)
            losses.append(model.learn(ids_BT[:, :-1], ids_BT[:, 1:], 0.5).item())
        clip_grad_norm(model.parameters(), 1.0)
        optimizer.apply(schedule.at(step))
        optimizer.step()
        optimizer.zero_grad()
    return losses, {**model.state_dict(), **optimizer.state_tensors()}


def differing(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    return [name for name in one if not torch.equal(one[name], other[name])]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_eager_runs_are_the_same_to_the_bit(dtype: torch.dtype) -> None:
    (losses, state), (again, same) = (train(SPEC, dtype, compile=False) for _ in range(2))
    assert losses == again
    assert not differing(state, same)


@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 1e-4), (torch.bfloat16, 1e-2)])
def test_compiled_runs_are_the_same_to_the_bit_and_near_the_eager_one(
    dtype: torch.dtype, near: float
) -> None:
    losses, state = train(SMALL, dtype, compile=True)
    torch._dynamo.reset()
    again, same = train(SMALL, dtype, compile=True)
    assert losses == again
    assert not differing(state, same)
    eager, _ = train(SMALL, dtype, compile=False)
    assert losses == pytest.approx(eager, rel=near)


def test_new_rates_never_recompile() -> None:
    shape = ModelShape.of(SMALL.model, VOCAB)
    groups = param_groups(SMALL, shape)
    model = GPT(shape, torch.float32, torch.float32)
    model.init_weights(0)
    optimizer = Optimizer(model, groups, torch.float32, compile=True)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    values = Schedule(SMALL.schedule, groups).at(0)
    optimizer.step()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for factor in (0.0, 0.3, 7.0):
            rates = {k: replace(v, lr=v.lr * factor) for k, v in values.groups.items()}
            optimizer.apply(replace(values, groups=rates))
            optimizer.step()
