"""Model FLOPs, for throughput and MFU. The numbers come from the modules (see `flops_per_token` in model/)."""

from megagpt.config.schema import Config
from megagpt.model.meta_model import meta_model


def training_flops_per_token(config: Config) -> int:
    """Return the model FLOPs of forward and backward for one token, as MFU is usually defined.

    The convention of PaLM (Chowdhery et al., arXiv 2204.02311, appendix B), which nanoGPT and Megatron-LM use too:
    6 FLOPs per matrix weight plus 12 x layers x width x sequence length for attention, which counts the full square of
    attention scores although half of it is masked; a layer with a window counts the window instead of the sequence. The width
    is that of all heads. Recomputation does not count. With an encoder, the FLOPs of a sample are divided by the tokens of
    source and target. `model.vocab_size` must be known.
    """
    model, length = meta_model(config), config.model.n_positions
    per_sample = length * model.loss.flops_per_token() + sum(model.layer_flops()) + model.hidden_core_flops()
    return 3 * per_sample // config.model.sample_tokens
