"""What stands at the ends of every model: the token embedding, the output layer and its loss."""

from torch import Tensor, nn

from megagpt.config.schema import Config, ModelConfig
from megagpt.model.dropout_masks import token_keys
from megagpt.model.forward_context import MicroBatch
from megagpt.model.init_scheme import init_stds
from megagpt.parallel.embedding import VocabParallelEmbedding
from megagpt.parallel.parallel_context import ParallelContext
from megagpt.parallel.parameter import mark_second_copy
from megagpt.parallel.seeding import stable_seed
from megagpt.parallel.vocab_loss import VocabParallelLoss

TOKEN_EMBEDDING = "embedding.token.weight"
"""Name of the parameter that a tied output layer shares."""
CLASSIFIER = "classifier.weight"
"""Name of the classification head."""


def build_embedding(name: str, config: Config, parallel: ParallelContext, entries: int | None = None) -> VocabParallelEmbedding:
    """Return an embedding. `entries`: tokens in the vocabulary by default, or classes."""
    model = config.model
    entries = entries or model.tokens_in_vocab
    padded = -(-entries // model.vocab_multiple) * model.vocab_multiple
    return VocabParallelEmbedding(name, entries, padded, model.n_embd, parallel, init_stds(model).embedding)


def build_output(config: Config, parallel: ParallelContext, tokens: VocabParallelEmbedding | None) -> VocabParallelLoss:
    """Return the output layer with its loss. `tokens`: the token embedding, if the same chunk has it."""
    return VocabParallelLoss(
        _output_weight(config, parallel, tokens),
        parallel,
        config.training.label_smoothing,
        softcap=config.model.logit_softcap,
        z_loss=config.training.z_loss,
        chunk_mib=config.training.loss_chunk_mib,
    )


def scaled_output(x: Tensor, model: ModelConfig) -> Tensor:
    """Return the input of the output layer, for the output of the final norm."""
    scale = model.output_scale / model.width_growth  # muP: smaller logits for larger widths
    return x if scale == 1 else x * scale


def dropout_keys(config: Config, micro_batch: MicroBatch, length: int) -> Tensor | None:
    """Return the keys of the dropout masks of `length` positions, [batch, length]; None without dropout."""
    model = config.model
    probabilities = (model.embd_pdrop, model.attn_pdrop, model.resid_pdrop, model.mlp_pdrop, model.clf_pdrop)
    if micro_batch.samples is None or not any(probabilities):
        return None
    return token_keys(stable_seed(config.training.seed, "dropout"), micro_batch.samples, length)


def _output_weight(config: Config, parallel: ParallelContext, tokens: VocabParallelEmbedding | None) -> nn.Parameter:
    if config.data.classes:
        return build_embedding(CLASSIFIER, config, parallel, len(config.data.classes)).weight
    if not config.model.tie_embeddings:
        return build_embedding("head.weight", config, parallel).weight
    if tokens is not None:
        return tokens.weight
    weight = build_embedding(TOKEN_EMBEDDING, config, parallel).weight
    mark_second_copy(weight)
    return weight
