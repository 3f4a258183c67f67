"""Standard deviations of the initial weights. A new scheme is one function and one line in `INIT_SCHEMES`."""

from collections.abc import Callable
from dataclasses import dataclass

from megagpt.config.schema import ModelConfig


@dataclass(frozen=True)
class InitStds:
    """Standard deviations by kind of weight."""

    embedding: float
    """Token and position embeddings, and an output layer of its own."""
    hidden: float
    """Matrices that read the residual stream."""
    residual: float
    """Matrices that write to it: the last of each branch."""


def plain(model: ModelConfig) -> InitStds:
    """Return init_std for all."""
    return InitStds(model.init_std, model.init_std, model.init_std)


def scaled(model: ModelConfig) -> InitStds:
    """Scale by depth, so that the variance of the residual stream does not grow with it (GPT-2, Megatron-LM)."""
    return InitStds(model.init_std, model.init_std, model.init_std / (2 * model.n_layer) ** 0.5)


def small_wang(model: ModelConfig) -> InitStds:
    """Scale by width and depth, as GPT-NeoX does: "small init" (arXiv 1910.05895) and Wang and Komatsuzaki's."""
    small = (2 / (5 * model.n_embd)) ** 0.5
    return InitStds(small, small, 2 / (model.n_layer * model.n_embd**0.5))


INIT_SCHEMES: dict[str, Callable[[ModelConfig], InitStds]] = {"plain": plain, "scaled": scaled, "small_wang": small_wang}


def init_stds(model: ModelConfig) -> InitStds:
    """Return the standard deviations of the config; muP divides the variance of matrices by the growth of their width."""
    stds = INIT_SCHEMES[model.init_scheme](model)
    growth = model.width_growth**0.5
    return InitStds(stds.embedding, stds.hidden / growth, stds.residual / growth)
