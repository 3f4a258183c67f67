"""Number of parameters by closed formula (Narayanan et al., arXiv 2104.04473, eq. 2, with any feed-forward width)."""

from megagpt.config.schema import ModelConfig


def parameters_by_part(model: ModelConfig) -> dict[str, int]:
    """Parameters of each part, the vocabulary without its padding. With ffn = 4h a block has 12 h^2 + 13 h."""
    h, f = model.n_embd, model.ffn_width
    attention = 3 * h * h + 3 * h + h * h + h
    mlp = h * f + f + f * h + h
    parts = {
        "token embedding": model.tokens_in_vocab * h,
        "position embedding": model.n_positions * h,
        "attention": model.n_layer * attention,
        "mlp": model.n_layer * mlp,
        "norms": model.n_layer * 4 * h + 2 * h,
    }
    if not model.tie_embeddings:
        parts["output layer"] = model.tokens_in_vocab * h
    return parts


def parameter_count(model: ModelConfig) -> int:
    """All parameters."""
    return sum(parameters_by_part(model).values())
