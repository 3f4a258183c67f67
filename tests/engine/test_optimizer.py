"""The optimizer's groups, and its updates compared with the published formulas."""

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from support.runs import full_model, parameters_by_name, tiny_config
from torch import Tensor, nn

from megagpt.config.schema import OptimizerConfig
from megagpt.engine.optimizer import build_optimizer, is_unrelated_apex, optimizer_name, set_weight_decay

RATE, DECAY, EPS, BETAS = 0.1, 0.3, 1e-3, (0.9, 0.95)


def config_of(kind: str, momentum: float = 0.0) -> OptimizerConfig:
    return OptimizerConfig(type=kind, learning_rate=RATE, weight_decay=DECAY, eps=EPS, betas=BETAS, momentum=momentum)


def test_matrices_have_weight_decay_and_biases_and_norms_have_none() -> None:
    model = full_model(tiny_config())
    groups = build_optimizer(config_of("adamw"), model.parameters()).param_groups
    decays = {id(parameter): group["weight_decay"] for group in groups for parameter in group["params"]}
    names = parameters_by_name(model)
    assert len(decays) == len(names)  # each is in one group
    for name, parameter in names.items():
        is_vector = name.endswith(".bias") or "norm" in name
        assert decays[id(parameter)] == (0.0 if is_vector else DECAY), name


def test_a_changed_weight_decay_is_that_of_matrices_alone() -> None:
    matrix, vector = nn.Parameter(torch.ones(1, 4)), nn.Parameter(torch.ones(4))
    optimizer = build_optimizer(config_of("adamw"), [matrix, vector])
    set_weight_decay(optimizer.param_groups, 0.5)
    matrix.grad, vector.grad = torch.zeros(1, 4), torch.zeros(4)
    optimizer.step()
    assert torch.equal(vector, torch.ones(4))
    torch.testing.assert_close(matrix.detach(), torch.full((1, 4), 1 - RATE * 0.5))


def test_frozen_parameters_are_in_no_group() -> None:
    model = full_model(tiny_config())
    frozen = {id(parameter) for name, parameter in parameters_by_name(model).items() if name.startswith("layers.0.")}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) not in frozen)
    groups = build_optimizer(config_of("adamw"), model.parameters()).param_groups
    in_groups = {id(parameter) for group in groups for parameter in group["params"]}
    assert in_groups == {id(parameter) for parameter in model.parameters()} - frozen


@pytest.mark.parametrize("shape, decay", [((2, 3), DECAY), ((3,), 0.0)])
def test_there_is_no_empty_group(shape: tuple[int, ...], decay: float) -> None:
    groups = build_optimizer(config_of("adamw"), [nn.Parameter(torch.ones(shape))]).param_groups
    assert [group["weight_decay"] for group in groups] == [decay]


def updated(kind: str, gradients: list[Tensor], momentum: float = 0.0) -> tuple[Tensor, Tensor]:
    """Return a matrix and a vector of the same first values after a step with each of these gradients."""
    matrix, vector = nn.Parameter(start().view(1, 4).clone()), nn.Parameter(start().clone())
    optimizer = build_optimizer(config_of(kind, momentum), [matrix, vector])
    for gradient in gradients:
        matrix.grad, vector.grad = gradient.view(1, 4).clone(), gradient.clone()
        optimizer.step()
    return matrix.detach().view(4), vector.detach()


def start() -> Tensor:
    return torch.tensor([1.0, -2.0, 0.5, 3.0])


FIRST, SECOND = torch.tensor([0.3, -0.1, 2.0, 0.0]), torch.tensor([-0.2, 0.4, 1.0, 0.5])


def by_adam(decoupled: bool, decay: float) -> Tensor:
    """Return the weights after two steps: Kingma and Ba, arXiv 1412.6980, algorithm 1; decay as in arXiv 1711.05101."""
    weights, m, v = start().double(), torch.zeros(4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    for step, raw in enumerate((FIRST, SECOND), start=1):
        gradient = raw.double() if decoupled else raw + decay * weights
        m = BETAS[0] * m + (1 - BETAS[0]) * gradient
        v = BETAS[1] * v + (1 - BETAS[1]) * gradient**2
        m_hat, v_hat = m / (1 - BETAS[0] ** step), v / (1 - BETAS[1] ** step)
        if decoupled:
            weights = weights * (1 - RATE * decay)
        weights = weights - RATE * m_hat / (v_hat.sqrt() + EPS)
    return weights.float()


def by_sgd(momentum: float, decay: float) -> Tensor:
    weights, buffer = start().double(), torch.zeros(4, dtype=torch.float64)
    for raw in (FIRST, SECOND):
        buffer = momentum * buffer + raw + decay * weights
        weights = weights - RATE * buffer
    return weights.float()


@pytest.mark.parametrize("kind", ["adamw", "adam"])
def test_two_steps_of_adam_follow_the_papers(kind: str) -> None:
    matrix, vector = updated(kind, [FIRST, SECOND])
    torch.testing.assert_close(matrix, by_adam(kind == "adamw", DECAY), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(vector, by_adam(kind == "adamw", 0.0), rtol=1e-6, atol=1e-7)


def test_adamw_and_adam_differ_in_how_they_decay_weights_only() -> None:
    (decoupled, plain), (coupled, same) = updated("adamw", [FIRST, SECOND]), updated("adam", [FIRST, SECOND])
    assert torch.equal(plain, same)
    assert not torch.allclose(decoupled, coupled, atol=1e-3)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_two_steps_of_sgd_follow_the_formula(momentum: float) -> None:
    matrix, vector = updated("sgd", [FIRST, SECOND], momentum)
    torch.testing.assert_close(matrix, by_sgd(momentum, DECAY), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(vector, by_sgd(momentum, 0.0), rtol=1e-6, atol=1e-7)


class FusedAdam(torch.optim.AdamW):
    """A stand-in with the signature that NVIDIA documents for apex.optimizers.FusedAdam."""

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        adam_w_mode: bool = True,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        set_grad_none: bool = True,
    ) -> None:
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        self.adam_w_mode = adam_w_mode


FusedAdam.__module__ = "apex.optimizers.fused_adam"


class OnCuda(nn.Parameter):
    """A parameter that claims to be on a GPU."""

    @property
    def is_cuda(self) -> bool:
        return True


def install(monkeypatch: pytest.MonkeyPatch, **members: Any) -> None:
    """Install a package apex whose apex.optimizers has these members."""
    for name, content in {"apex": {}, "apex.optimizers": members}.items():
        module = ModuleType(name)
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.parametrize("kind, decoupled", [("adamw", True), ("adam", False)])
def test_nvidias_apex_is_used_on_a_gpu(kind: str, decoupled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, FusedAdam=FusedAdam)
    optimizer = build_optimizer(config_of(kind), [OnCuda(torch.ones(2, 3)), OnCuda(torch.ones(3))])
    assert isinstance(optimizer, FusedAdam) and optimizer.adam_w_mode == decoupled
    assert [group["weight_decay"] for group in optimizer.param_groups] == [DECAY, 0.0]
    assert {(group["lr"], group["betas"], group["eps"]) for group in optimizer.param_groups} == {(RATE, BETAS, EPS)}
    assert optimizer_name(optimizer) == "NVIDIA apex's FusedAdam"
    assert not is_unrelated_apex()
    on_cpu = build_optimizer(config_of(kind), [nn.Parameter(torch.ones(2, 3))])
    assert optimizer_name(on_cpu) == f"torch's fused {'AdamW' if decoupled else 'Adam'}"


def test_the_apex_of_pypi_is_recognised_and_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)
    assert is_unrelated_apex()
    assert optimizer_name(build_optimizer(config_of("adamw"), [OnCuda(torch.ones(2, 3))])) == "torch's fused AdamW"


def test_without_any_apex_nothing_is_unrelated() -> None:
    assert not is_unrelated_apex()
