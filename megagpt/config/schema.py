"""The tree of a run's config: each key with its type, unit, default and meaning, declared once.

The docstring under a field is its help text; `docs/config.md` is generated from them. `rules.py` has the rules that join
several keys, `load.py` reads files and overrides. This module does no I/O and does not import torch.
"""

import os
import types
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, cast, get_args, get_origin

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, ValidationInfo, field_validator

from megagpt.schedules.registry import SCHEDULES

if TYPE_CHECKING:
    ScheduleName = str
else:
    ScheduleName = Literal[(*SCHEDULES, "auto")]


def _expand(path: str) -> str:
    """Replace a leading `~` by the home directory, and $NAME by the environment variable if it is set, as a shell does."""
    if "\0" in path:
        raise ValueError("a path cannot contain a NUL character")
    path = os.path.expandvars(path)
    return str(Path(path).expanduser()) if path.startswith("~") else path


PathText = Annotated[str, StringConstraints(min_length=1), AfterValidator(_expand)]
"""A path of a file or folder; a leading `~` is the home directory, $NAME an environment variable."""
Source = PathText | dict[PathText, float]
"""One prefix of a .bin/.idx pair, or several with their weights: {"data/web": 0.7, "data/books": 0.3}."""
SetName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z][A-Za-z0-9_-]{0,39}$")]
"""Name of a set of validation data, which is part of the names of its metrics."""
MAX_STEPS = 10**12
MAX_SEED = 2**63 - 1


class Section(BaseModel):
    """A section of the tree. Unknown keys are errors, values are not converted, and nothing changes after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True)

    @field_validator("*", mode="before")
    @classmethod
    def _plain_numbers(cls, value: Any, info: ValidationInfo) -> Any:
        """Accept 1e6 for an integer and a list for a tuple; refuse true and false for a number (Python takes True for 1)."""
        annotation = cls.model_fields[str(info.field_name)].annotation
        accepted = accepted_types(annotation)
        if isinstance(value, list) and get_origin(annotation) is tuple:
            return tuple(value)
        if isinstance(value, bool) and bool not in accepted and accepted & {int, float}:
            raise ValueError("expected a number, not true or false")
        if isinstance(value, float) and int in accepted and float not in accepted and value.is_integer():
            return int(value)
        return value


def accepted_types(annotation: Any) -> set[type]:
    """Return the Python types of an annotation's members and literals."""
    origin = get_origin(annotation)
    if origin in (Union, types.UnionType):
        return set().union(*(accepted_types(member) for member in get_args(annotation)))
    if origin is Annotated:
        return accepted_types(get_args(annotation)[0])
    if origin is Literal:
        return {type(choice) for choice in get_args(annotation)}
    return {annotation} if isinstance(annotation, type) else set()


class RotaryConfig(Section):
    """Rotary position embedding (Su et al., arXiv 2104.09864); with position_embedding "rotary"."""

    theta: float = Field(default=10000.0, gt=1)
    """Base of the frequencies."""
    fraction: float = Field(default=1.0, gt=0, le=1)
    """Share of each head that is rotated (GPT-NeoX: 0.25)."""
    interleaved: bool = False
    """Rotate neighbouring pairs (GPT-J) instead of the first with the second half (GPT-NeoX, LLaMA)."""
    scaling: Literal["none", "linear", "ntk", "yarn", "llama3"] = "none"
    """Change of the frequencies for sequences that are longer than those of the pretraining: position interpolation (Chen et
    al., arXiv 2306.15595), NTK-aware base, YaRN (Peng et al., arXiv 2309.00071), or LLaMA 3.1's."""
    factor: float = Field(default=1.0, ge=1)
    """Ratio of the new to the original sequence length, for each scaling."""
    original_positions: int | None = Field(default=None, ge=1, le=2**27)
    """Sequence length of the pretraining; required by yarn and llama3."""
    low_freq_factor: float = Field(default=1.0, gt=0)
    """llama3: wavelengths above original_positions / low_freq_factor are scaled fully."""
    high_freq_factor: float = Field(default=4.0, gt=0)
    """llama3: wavelengths below original_positions / high_freq_factor are not scaled."""
    beta_fast: float = Field(default=32.0, gt=0)
    """yarn: dims with more rotations than this over original_positions are not scaled."""
    beta_slow: float = Field(default=1.0, gt=0)
    """yarn: dims with fewer rotations than this are scaled fully."""


class ModelConfig(Section):
    """Shape of the transformer. The names are those of GPT-2."""

    n_layer: int = Field(ge=1, le=10_000)
    """Number of transformer blocks."""
    n_embd: int = Field(ge=1, le=2**20)
    """Hidden size (width of the residual stream)."""
    n_head: int = Field(ge=1, le=2**16)
    """Number of attention heads; must divide n_embd, unless head_dim is set."""
    n_positions: int = Field(ge=1, le=2**27)
    """Sequence length in tokens; that of the decoder in a model with an encoder."""
    encoder_layers: int = Field(default=0, ge=0, le=10_000)
    """Transformer blocks of the encoder, before the n_layer of the decoder (T5, Raffel et al., arXiv 1910.10683); 0 for a model
    without an encoder."""
    encoder_positions: int | None = Field(default=None, ge=1, le=2**27)
    """Sequence length of the encoder's input in tokens; n_positions if absent."""
    decoder_start: int = Field(default=0, ge=0, le=2**31 - 1)
    """Token that the input of the decoder begins with (T5: 0, its padding)."""
    vocab_size: int | None = Field(default=None, ge=2, le=2**31 - 1)
    """Number of tokens in the vocabulary; taken from data.tokenizer if absent."""
    vocab_multiple: int = Field(default=128, ge=1, le=2**20)
    """Pad the token embedding to a multiple of this. The padding is unused: it is never in the loss or in a checkpoint."""
    n_kv_head: int | None = Field(default=None, ge=1, le=2**16)
    """Number of key and value heads; n_head if absent. Fewer: grouped-query attention (Ainslie et al., arXiv 2305.13245)."""
    head_dim: int | None = Field(default=None, ge=1, le=2**16)
    """Size of one attention head; n_embd / n_head if absent."""
    ffn_hidden: int | None = Field(default=None, ge=1, le=2**24)
    """Hidden size of the MLP; 4 x n_embd if absent."""
    activation: Literal["gelu", "gelu_tanh", "relu", "relu_squared", "silu"] = "gelu"
    """Activation function of the MLP: exact GELU, GELU's tanh approximation (GPT-2), ReLU, its square, or SiLU."""
    gated_mlp: bool = False
    """activation(gate) * up (Shazeer, arXiv 2002.05202): SwiGLU with silu, GeGLU with gelu."""
    norm: Literal["layernorm", "rmsnorm", "rmsnorm_plus_one"] = "layernorm"
    """Kind of all norms. rmsnorm_plus_one multiplies by 1 + weight (Gemma)."""
    norm_placement: Literal["before", "after", "both"] = "before"
    """Norm of each residual branch: at its input (GPT-2, LLaMA), at its output (OLMo 2), or both (Gemma 2)."""
    qk_norm: Literal["none", "head", "width"] = "none"
    """Norm of queries and keys: each head (Qwen3), or all heads together (OLMo 2)."""
    position_embedding: Literal["learned", "rotary", "alibi", "relative", "relative_vectors", "none"] = "learned"
    """learned: vectors that are added to the token embeddings; rotary: rotary embeddings in attention; alibi: a fixed bias of
    the attention scores (Press et al., arXiv 2108.12409); relative: a learned bias (T5, arXiv 1910.10683), one for each layer,
    or in a model with an encoder one for the encoder and one for the decoder, as in T5; relative_vectors: learned vectors of
    distances that are added to keys and values (Shaw et al., arXiv 1803.02155)."""
    relative_buckets: int = Field(default=32, ge=2, le=2**16)
    """relative: number of buckets of distances, an even number; with an encoder a multiple of 4."""
    relative_max_distance: int = Field(default=128, ge=2, le=2**27)
    """relative: all distances from here on share the last bucket; relative_vectors: they share the last vector (Shaw et al.:
    16)."""
    rotary: RotaryConfig = RotaryConfig()
    """Frequencies of rotary embeddings."""
    attention_window: int | None = Field(default=None, ge=1, le=2**27)
    """Attend only to this many last tokens, the token itself included (sliding window); all earlier tokens if absent."""
    full_attention_every: int | None = Field(default=None, ge=1, le=10_000)
    """With attention_window: every n-th layer attends to all earlier tokens."""
    attention_scale: float | None = Field(default=None, gt=0)
    """Factor of the attention scores; 1 / sqrt(head_dim) if absent."""
    attention_softcap: float | None = Field(default=None, gt=0)
    """Limit the attention scores to +-cap by cap * tanh(score / cap) (Gemma 2)."""
    attention_sinks: bool = False
    """A learned score of each head for a key without a value, so that a head can attend to nothing (gpt-oss)."""
    parallel_branches: Literal["no", "two_norms", "one_norm"] = "no"
    """Attention and MLP read the same input, and both are added to it: each with its own norm (GPT-NeoX), or with one norm for
    both (GPT-J)."""
    qkv_bias: bool = True
    """Biases of queries, keys and values."""
    attention_bias: bool = True
    """Bias of the attention's output projection."""
    mlp_bias: bool = True
    """Biases of the MLP."""
    embedding_scale: float = Field(default=1.0, gt=0)
    """Factor of the token embeddings (Gemma: sqrt(n_embd))."""
    output_scale: float = Field(default=1.0, gt=0)
    """Factor of the input of the output layer (T5 with a tied embedding: 1 / sqrt(n_embd))."""
    logit_softcap: float | None = Field(default=None, gt=0)
    """Limit the logits to +-cap by cap * tanh(logit / cap) (Gemma 2)."""
    embd_pdrop: float = Field(default=0.0, ge=0, lt=1)
    """Dropout probability after the embeddings, and with an encoder after the final norm of both stacks (T5)."""
    attn_pdrop: float = Field(default=0.0, ge=0, lt=1)
    """Dropout probability of the attention weights. Above 0, attention takes memory quadratic in the sequence length."""
    resid_pdrop: float = Field(default=0.0, ge=0, lt=1)
    """Dropout probability before each residual addition."""
    mlp_pdrop: float = Field(default=0.0, ge=0, lt=1)
    """Dropout probability of the hidden channels of the MLP (T5)."""
    clf_pdrop: float = Field(default=0.0, ge=0, lt=1)
    """Dropout probability before the classification head of finetune_classifier.py. Without that head it has no effect."""
    tie_embeddings: bool = True
    """Use the token embedding's weight for the output layer as well."""
    init_std: float = Field(default=0.02, gt=0)
    """Standard deviation of the initial weights."""
    init_scheme: Literal["plain", "scaled", "small_wang"] = "scaled"
    """plain: init_std for all matrices; scaled: divided by sqrt(2 n_layer) in the last layer of each residual branch (GPT-2,
    Megatron-LM); small_wang: sqrt(2 / (5 n_embd)), and 2 / (n_layer sqrt(n_embd)) there (GPT-NeoX); init_std is not used."""
    mup_base_width: int | None = Field(default=None, ge=1, le=2**20)
    """muP (Yang et al., arXiv 2203.03466): the n_embd for which learning rate and init_std were chosen. For m times the
    width, the learning rate of the blocks' matrices is divided by m, their init_std by sqrt(m), and the logits by m. Keep
    head_dim, or set attention_scale in proportion to 1 / head_dim."""
    layer_norm_epsilon: float = Field(default=1e-5, gt=0)
    """Added to the variance, or the mean square, in each norm."""

    @property
    def n_blocks(self) -> int:
        """Number of transformer blocks of encoder and decoder."""
        return self.encoder_layers + self.n_layer

    @property
    def source_length(self) -> int:
        """Sequence length of the encoder's input in tokens."""
        return self.encoder_positions or self.n_positions

    @property
    def sample_tokens(self) -> int:
        """Tokens of a sample that the model reads: those of the decoder, and of the encoder if there is one."""
        return self.n_positions + (self.source_length if self.encoder_layers else 0)

    @property
    def ffn_hidden_size(self) -> int:
        """Hidden size of the MLP."""
        return self.ffn_hidden or 4 * self.n_embd

    @property
    def width_growth(self) -> float:
        """Ratio of the width to the one that muP starts from; 1 without muP."""
        return self.n_embd / (self.mup_base_width or self.n_embd)

    @property
    def head_size(self) -> int:
        """Size of one attention head."""
        return self.head_dim or self.n_embd // self.n_head

    @property
    def kv_heads(self) -> int:
        """Number of key and value heads."""
        return self.n_kv_head or self.n_head

    def window_of(self, layer: int) -> int | None:
        """Return the attention window of a layer; None for full attention."""
        every = self.full_attention_every
        return None if every is not None and (layer + 1) % every == 0 else self.attention_window

    @property
    def tokens_in_vocab(self) -> int:
        """The resolved `vocab_size`. Raises ValueError if it is not known yet."""
        if self.vocab_size is None:
            raise ValueError("model.vocab_size is not resolved: set it, or data.tokenizer")
        return self.vocab_size

    @property
    def padded_vocab_size(self) -> int:
        """Entries of the token embedding: `vocab_size` rounded up to a multiple of `vocab_multiple`."""
        return -(-self.tokens_in_vocab // self.vocab_multiple) * self.vocab_multiple


class ScheduleCosts(Section):
    """Times of one micro-batch on all layers of one pipeline rank, in any unit, and the memory limit of a rank. Without times
    the planner predicts those of each stage, in seconds (docs/planner.md)."""

    forward: float | None = Field(default=None, gt=0)
    """Time of the forward; with another time given, 1 if absent."""
    input_backward: float | None = Field(default=None, gt=0)
    """Time of the backward that computes the gradient of the layers' input; with another time given, 1 if absent."""
    weight_backward: float | None = Field(default=None, gt=0)
    """Time of the backward that computes the weight gradients; with another time given, 1 if absent."""
    transfer: float | None = Field(default=None, ge=0)
    """Travel time of a message between two ranks; predicted if absent, or 0 with other times given."""
    max_micro_batches: float | None = Field(default=None, gt=0)
    """Maximum number of in-flight micro-batches that fit in a rank's memory; unlimited if absent."""


class ParallelConfig(Section):
    """Layout over the ranks. The data-parallel size is world size / (tensor x pipeline x context)."""

    tensor: int = Field(default=1, ge=1, le=2**20)
    """Tensor-parallel size: ranks that share each matrix. Best within one node."""
    pipeline: int = Field(default=1, ge=1, le=2**20)
    """Pipeline-parallel size: ranks that share the layers."""
    context: int = Field(default=1, ge=1, le=2**20)
    """Context-parallel size: ranks that share each sequence, for long sequences."""
    schedule: ScheduleName = "1f1b"
    """Pipeline schedule: the order of forwards and backwards. docs/schedules.md compares them. "auto" simulates all of them
    with the planner's times of the stages (or those in `schedule_costs`), picks the fastest, and logs the reason."""
    schedule_costs: ScheduleCosts = ScheduleCosts()
    """Times that the "auto" schedule search uses instead of predicted ones, and its memory limit."""
    virtual_stages: int = Field(default=1, ge=1, le=10_000)
    """Chunks of layers on each pipeline rank. The interleaved schedules need 2 or more; zbv, v_half and v_min always have 2."""
    sequence_parallel: bool = False
    """Split norms and dropout along the sequence over the tensor ranks: reduce-scatter and all-gather replace all-reduce."""
    timeout_seconds: float = Field(default=1800.0, gt=0, le=1e8)
    """Watchdog timeout: if a rank makes no progress for this long, the job exits and names the rank and the phase."""


class ZeroConfig(Section):
    """ZeRO: what is sharded over the data-parallel and context-parallel ranks (Rajbhandari et al., arXiv 1910.02054)."""

    stage: Literal[0, 1, 2, 3] = 1
    """0: nothing; 1: optimizer states; 2: also gradients; 3: also parameters."""
    offload_optimizer: Literal["none", "cpu"] = "none"
    """"cpu" stores the optimizer states in host memory (stages 1 to 3)."""
    offload_param: Literal["none", "cpu"] = "none"
    """"cpu" stores the parameter shards in host memory (stage 3)."""
    reduce_bucket_mib: float = Field(default=64.0, gt=0, le=2**20)
    """Stages 1 and 2: gradients of consecutive blocks, of at least so many MiB in fp32, are summed over the ranks as soon as
    the backward of the last micro-batch has passed these blocks, beside the backward of the others. What is left is summed at
    the end. Schedules with a split backward sum at the end of a stage. Updated weights are gathered in the same buckets, beside
    the next forward."""


class FillInTheMiddleConfig(Section):
    """Fill-in-the-middle (Bavarian et al., arXiv 2207.14255) for the training data of task text: the middle of a document is
    moved to its end, so that the model learns to write what is missing. Needs data.tokenizer."""

    rate: float = Field(default=0.0, ge=0, le=1)
    """Share of the documents that are transformed. The share of documents in their normal order is 1 - rate."""
    spm_share: float = Field(default=0.5, ge=0, le=1)
    """Share of the transformed documents in the order suffix, prefix, middle; the others have prefix, suffix, middle."""
    tokens: tuple[str | int, str | int, str | int] = ("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>")
    """The special tokens of prefix, middle and suffix: texts of tokens of data.tokenizer, or ids."""


class SpanCorruptionConfig(Section):
    """Span corruption (T5, Raffel et al., arXiv 1910.10683), for task span_corruption. The piece of text of a sample is as long
    as its source and its target allow: 568 tokens for 512 encoder positions, which need 114 positions of the decoder."""

    density: float = Field(default=0.15, gt=0, lt=1)
    """Share of the tokens that are replaced."""
    mean_length: float = Field(default=3.0, ge=1)
    """Mean length of a replaced span, in tokens."""
    sentinels: int = Field(default=100, ge=1, le=2**16)
    """Number of different sentinels, at least the number of spans in a source. They are data.tokenizer's tokens <extra_id_0>,
    <extra_id_1>, ...; if it has none, the ids that follow those of the tokenizer, the first sentinel last, as in T5."""


class DataConfig(Section):
    """Datasets: either separate ones for train, valid and test, or `paths` divided by `split`."""

    train: Source | None = None
    """Training data: the prefix of a .bin/.idx pair, or several prefixes with weights, such as {"data/web": 0.7, "data/books":
    0.3}."""
    valid: Source | dict[SetName, Source] | None = None
    """Validation data, for evaluation during training; same form as `train`, or several sets by name, each with its own loss:
    {"web": "data/web_valid", "code": {"data/python_valid": 1, "data/rust_valid": 1}}."""
    test: Source | None = None
    """Test data, for evaluation after the last step; same form as `train`."""
    paths: Source | None = None
    """Data that `split` divides into train, valid and test by documents; same form as `train`."""
    split: str | None = None
    """Shares of train, valid and test in `paths`, for example "969,30,1"."""
    tokenizer: PathText | None = None
    """A SentencePiece .model file, a Hugging Face tokenizer.json, a folder with vocab.json and merges.txt, or "byte".
    GPT-2's vocab.json and merges.txt: https://huggingface.co/openai-community/gpt2."""
    task: Literal["text", "chat", "preference", "classification", "span_corruption", "prefix_lm", "pairs"] = "text"
    """What the data is for. text: every token of the stream is learned. chat: examples made by preprocess_data.py --task chat;
    the answers are learned, several examples share a sample, and attention and positions restart at each. preference: pairs of
    answers made by --task preference, learned by DPO (section dpo). classification: set by finetune_classifier.py. For a model
    with an encoder: span_corruption and prefix_lm read the same files as text; pairs: sources and targets made by
    preprocess_data.py --task pairs."""
    classes: list[str] = []
    """task classification: names of the classes."""
    long_examples: Literal["drop", "truncate"] = "drop"
    """task chat and pairs: what happens to an example that is longer than its positions. Their number is in the first lines of
    the run. Preferences are always dropped: both answers together must fit."""
    seed: int = Field(default=1234, ge=0, le=MAX_SEED)
    """Seed for the shuffle order of documents and samples."""
    cache_dir: PathText | None = None
    """Folder for the shuffle orders of large datasets (from one million documents and samples): 13 bytes per document and
    epoch. If absent, the data's folder, or the node's temporary folder if that one is read-only."""
    reset_positions: bool = False
    """Restart the position numbers at each document of a sample (Megatron: reset-position-ids)."""
    reset_attention: bool = False
    """Attend only to earlier tokens of the same document, not of the entire sample (Megatron: reset-attention-mask).
    Needs a mask of micro_batch_size x n_positions^2 numbers and is slower than plain causal attention."""
    fill_in_the_middle: FillInTheMiddleConfig = FillInTheMiddleConfig()
    """Fill-in-the-middle."""
    span_corruption: SpanCorruptionConfig = SpanCorruptionConfig()
    """Span corruption."""
    mask_document_ends: bool = False
    """Mask the loss on the first token of each document, which cannot be predicted from the previous document (Megatron:
    eod-mask-loss)."""

    @property
    def separates_positions(self) -> bool:
        """Whether position numbers restart at each document."""
        return self.reset_positions or self.packs_examples

    @property
    def separates_attention(self) -> bool:
        """Whether attention stays inside each document."""
        return self.reset_attention or self.packs_examples

    @property
    def packs_examples(self) -> bool:
        """Whether a sample has several examples."""
        return self.task in ("chat", "preference", "classification")

    @property
    def has_examples(self) -> bool:
        """Whether the data has examples, with a mask, not documents."""
        return self.packs_examples or self.task == "pairs"

    @property
    def needs_encoder(self) -> bool:
        """Whether samples have a source for an encoder."""
        return self.task in ("span_corruption", "prefix_lm", "pairs")

    @property
    def valid_sets(self) -> dict[str, Source]:
        """The sets of validation data by the name of their metrics: "eval" for the only one, else "eval_NAME"."""
        if self.valid is None:
            return {}
        if isinstance(self.valid, dict) and not all(isinstance(value, float) for value in self.valid.values()):
            return {f"eval_{name}": cast(Source, source) for name, source in self.valid.items()}
        return {"eval": cast(Source, self.valid)}

    @property
    def sources(self) -> dict[str, Source]:
        """All data that is named, by its key without "data.", such as "train" or "valid.web"."""
        valid = {f"valid{name.removeprefix('eval').replace('_', '.', 1)}": source for name, source in self.valid_sets.items()}
        found = {"train": self.train, **valid, "test": self.test, "paths": self.paths}
        return {key: source for key, source in found.items() if source is not None}


class OptimizerConfig(Section):
    """The optimizer."""

    type: Literal["adamw", "adam", "sgd", "muon"] = "adamw"
    """adamw: decoupled weight decay (Loshchilov and Hutter, arXiv 1711.05101); adam: L2 penalty added to the gradient; sgd:
    stochastic gradient descent; muon: orthogonalised momentum for the matrices of the blocks, adamw for the rest (Liu et al.,
    arXiv 2502.16982). muon needs zero.stage 0 to 2."""
    learning_rate: float = Field(default=3e-4, gt=0)
    """Peak learning rate."""
    learning_rate_scales: dict[str, Annotated[float, Field(ge=0, le=1e6)]] = {}
    """Patterns of weights -> factor of their learning rate, for example {"embedding.*": 0.5, "layers.*.bias": 2}. A weight
    that several patterns match gets the product. Names as in training.freeze."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay rates of the two moments (adam, adamw, muon)."""
    eps: float = Field(default=1e-8, gt=0)
    """Added to the square root of the second moment (adam, adamw)."""
    momentum: float = Field(default=0.0, ge=0, lt=1)
    """Momentum (sgd, muon); muon has 0.95 if this is 0."""
    weight_decay: float = Field(default=0.1, ge=0)
    """Weight decay of matrices and embeddings; biases and norms have none."""
    final_weight_decay: float | None = Field(default=None, ge=0)
    """Weight decay after the last step; weight_decay is that of the first. The same in every step if absent."""
    weight_decay_schedule: Literal["linear", "cosine"] = "linear"
    """Shape of the change from weight_decay to final_weight_decay over the run (Megatron: weight-decay-incr-style)."""
    clip_grad: float = Field(default=1.0, ge=0)
    """Clip the gradient to this global L2 norm; 0 disables clipping."""


class LRScheduleConfig(Section):
    """Learning rate schedule: linear warm-up, then the decay `type`, down to `min_lr`."""

    type: Literal["cosine", "linear", "constant", "inverse-sqrt", "warmup-stable-decay"] = "cosine"
    """Shape after the warm-up."""
    warmup_steps: int = Field(default=0, ge=0, le=MAX_STEPS)
    """Steps of linear warm-up from 0."""
    decay_steps: int | None = Field(default=None, ge=1, le=MAX_STEPS)
    """cosine, linear: the number of steps after which min_lr is reached; the length of the run if absent.
    warmup-stable-decay: the number of decay steps at the end of the run; a tenth of the run if absent."""
    min_lr: float = Field(default=0.0, ge=0)
    """Lower limit of the learning rate."""


class BatchRampConfig(Section):
    """Batch-size ramp: the global batch grows to training.global_batch_size (Megatron: rampup-batch-size). Each size must be
    a multiple of micro-batch size x data-parallel size. The LR schedule counts optimizer steps; a ramp increases their
    number."""

    start: int | None = Field(default=None, ge=1, le=2**30)
    """Global batch size of the first step, in sequences; no ramp if absent."""
    increment: int = Field(default=1, ge=1, le=2**30)
    """Sequences that each increase adds."""
    samples: int = Field(default=0, ge=0, le=10**15)
    """Length of the ramp in sequences; each size is used for an equal share of them."""


class TrainingConfig(Section):
    """Length, batch size and precision of the run."""

    steps: int | None = Field(default=None, ge=1, le=MAX_STEPS)
    """Number of optimizer steps. Set exactly one of steps, tokens and epochs."""
    tokens: int | None = Field(default=None, ge=1, le=10**18)
    """Number of tokens to train on; rounded up to full steps."""
    epochs: float | None = Field(default=None, gt=0, le=1e6)
    """Passes over the training data; rounded down to full steps, at least one."""
    max_hours: float | None = Field(default=None, gt=0, le=1e6)
    """Wall-clock limit of one start of the run, in hours. After it, the run saves a checkpoint at the end of the step and
    exits with code 75, so that a job script can restart it. Unlimited if absent."""
    micro_batch_size: int = Field(ge=1, le=2**20)
    """Sequences per micro-batch per data-parallel rank."""
    global_batch_size: int = Field(ge=1, le=2**30)
    """Sequences per optimizer step, over all ranks."""
    batch_ramp: BatchRampConfig = BatchRampConfig()
    """Smaller batches in the first steps; null for none."""
    precision: Literal["fp32", "bf16", "fp16", "fp8"] = "fp32"
    """Data type of parameters and activations. Gradients are accumulated in fp32 and optimizer states stored in fp32 for
    every precision. fp8: bf16, and the factors of the blocks' matrix products are rounded to 8 bits, except for the weight
    gradients. It needs a GPU of NVIDIA's Hopper or newer; a CPU computes it slowly, for tests."""
    compile: Literal["auto"] | bool = "auto"
    """Compile the functions between matrix products (norms, residual additions, activations, loss) with torch.compile: faster,
    with the same results up to rounding. The first step takes 10 to 20 s more on a GPU machine, and up to minutes on a busy
    CPU. "auto": on CUDA, except under ZeRO-3, which cannot use it."""
    flex_attention: bool = True
    """On a GPU, compute attention with document masks, windows, biases, caps or sinks by torch's FlexAttention, in memory that
    grows linearly with the sequence. false, dropout of attention weights, "relative_vectors" and heads smaller than 16:
    with all scores of 256 queries at a time, in memory that grows with the square of the sequence, as on a CPU."""
    loss_chunk_mib: float | None = Field(default=None, gt=0, le=2**20)
    """Memory of the logits that exist at a time, in MiB; 1024 on a GPU and 32 on a CPU if absent. More is faster on a GPU."""
    deterministic: bool = False
    """Give the same bits on every run of the same layout on a GPU, more slowly. On a CPU that is always the case."""
    seed: int = Field(default=1234, ge=0, le=MAX_SEED)
    """Seed of the initial weights and of dropout."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activations that the backward recomputes instead of storing: none, those of the attention core (selective), or those of
    entire blocks (full)."""
    recompute_layers: int = Field(default=1, ge=1, le=10_000)
    """Consecutive blocks that full recompute treats as one group; only the input of each group is stored."""
    freeze: list[str] = []
    """Name patterns of weights that are not trained, for example "embedding.*", "layers.[0-3].*" or "layers.2.attention.*".
    Frozen weights get no gradient and no optimizer state. A tied output layer is frozen with the embedding. Patterns may
    change on resume; newly unfrozen weights start with zero moments."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Share of each label that is spread evenly over the vocabulary. Evaluation reports the loss without smoothing."""
    z_loss: float = Field(default=0.0, ge=0, le=1)
    """Weight of log(sum of exp(logits))^2 per token, which keeps logits small (PaLM: 1e-4). Evaluation reports the loss without
    it."""

    @field_validator("batch_ramp", mode="before")
    @classmethod
    def _null_is_no_ramp(cls, value: Any) -> Any:
        return BatchRampConfig() if value is None else value

    @property
    def weight_precision(self) -> str:
        """Data type of parameters and activations: bf16 under fp8, whose 8 bits are only inside matrix products."""
        return "bf16" if self.precision == "fp8" else self.precision


class LoRAConfig(Section):
    """Low-rank adapters of the linear layers (LoRA, Hu et al., arXiv 2106.09685): they are trained, all other weights are
    frozen. Conversion to Hugging Face and generation merge them into the weights."""

    rank: int | None = Field(default=None, ge=1, le=2**16)
    """Rank of the adapters; no adapters if absent."""
    alpha: float = Field(default=16.0, gt=0)
    """The output of an adapter is multiplied by alpha / rank."""
    targets: list[str] = ["*"]
    """Name patterns of the layers that get an adapter, for example "layers.*.attention.*" or "layers.*.mlp.up"; all linear
    layers of the blocks by default. The names are those of the weights without ".weight"."""


class DPOConfig(Section):
    """Direct preference optimization (Rafailov et al., arXiv 2305.18290); with data.task "preference". The reference model is
    checkpoint.initialize_from."""

    beta: float = Field(default=0.1, gt=0)
    """Strength of the pull towards the reference model."""


class EvaluationConfig(Section):
    """Loss on the validation data during training, and on the test data after the last step."""

    interval: int | None = Field(default=None, ge=1, le=MAX_STEPS)
    """Steps between evaluations; only after the last step if absent."""
    samples: int | None = Field(default=1024, ge=1, le=10**15)
    """Samples of the validation data per evaluation, always the first ones, so that losses of different layouts, batch sizes
    and runs can be compared. If the data has fewer, or for null, all of it is used, once."""
    test_samples: int | None = Field(default=None, ge=1, le=10**15)
    """Samples of the test data for the evaluation after the last step; all of the test data if absent."""
    micro_batch_size: int | None = Field(default=None, ge=1, le=2**20)
    """Sequences per micro-batch in evaluation; training.micro_batch_size if absent."""
    sample_prompts: list[str] = []
    """Prompts that the model continues at each evaluation, by its most likely tokens. The texts are printed and in the metrics
    file. Each new token takes a forward of all prompts. Needs data.tokenizer, and zero.stage 0 to 2."""
    sample_tokens: int = Field(default=32, ge=1, le=100_000)
    """New tokens for each of sample_prompts. The end of a prompt is used if both do not fit in model.n_positions. With an
    encoder the prompts are sources, of which the first model.encoder_positions tokens are used."""


class CheckpointConfig(Section):
    """Saving checkpoints and resuming from them."""

    dir: PathText | None = None
    """Folder of the run's checkpoints; nothing is saved if absent."""
    interval: int | None = Field(default=None, ge=1, le=MAX_STEPS)
    """Steps between checkpoints; only after the last step if absent."""
    keep: int = Field(default=0, ge=0, le=10**9)
    """Number of newest checkpoints to keep; 0 keeps all. The checkpoint that the run resumed from is never deleted."""
    keep_every: int | None = Field(default=None, ge=1, le=MAX_STEPS)
    """Also keep the checkpoints whose step is a multiple of this."""
    resume: PathText = "auto"
    """"auto": resume from the newest complete checkpoint in dir, or start from scratch if there is none. "never": start from
    scratch; dir must have no checkpoints. A path: resume from that checkpoint, or from the newest that this run has saved in
    dir since, so that a job that is started again with the same command continues."""
    initialize_from: PathText | None = None
    """A checkpoint, or a run's folder with checkpoints: a new run starts from its weights alone, with a fresh optimizer,
    learning rate schedule and data position, as for continued pretraining or fine-tuning. If dir has checkpoints, the run
    resumes from them."""


class ResilienceConfig(Section):
    """Response to a bad step. "stop": end the run. "skip": drop the update and continue with the next batch. "rollback":
    return to the last checkpoint and skip the batch when it comes up again. All ranks take the same decision."""

    on_nonfinite: Literal["stop", "skip", "rollback"] = "stop"
    """The loss or the gradient is NaN or infinite. The update is always dropped."""
    on_overflow: Literal["stop", "skip", "rollback"] = "skip"
    """fp16 only: the loss is finite, but the gradient is not, because the loss scale is too high. "skip" lowers the scale."""
    on_spike: Literal["none", "stop", "skip", "rollback"] = "none"
    """The loss is a spike: more than `spike_num_std` standard deviations above the mean of the last `spike_window` losses. The
    standard deviation counts as at least 1% of the mean."""
    spike_window: int = Field(default=100, ge=2, le=10**6)
    """Window of recent losses; spike detection starts once it is full."""
    spike_num_std: float = Field(default=6.0, gt=0)
    """Threshold for a spike, in standard deviations."""
    max_skipped: int = Field(default=16, ge=1, le=MAX_STEPS)
    """Maximum number of consecutive skipped steps; the run stops at the next one."""
    max_rollbacks: int = Field(default=3, ge=0, le=MAX_STEPS)
    """Maximum number of rollbacks in one start of the run; the run stops at the next one."""
    replica_check_interval: int | None = Field(default=None, ge=1, le=MAX_STEPS)
    """Steps between checks that replicas of the same weights are bitwise equal; no checks if absent."""
    straggler_factor: float = Field(default=1.5, gt=1)
    """Report a rank whose compute time exceeds the median of its stage by this factor."""


class WandbConfig(Section):
    """Weights & Biases. Only rank 0 writes. With checkpoint.dir, a run that resumes is the same run there."""

    project: Annotated[str, StringConstraints(min_length=1, max_length=128, pattern=r"^[^/\\#?%:]+$")] | None = None
    """Project name; disabled if absent. Offline if there is no network or no API key."""
    name: str | None = None
    """Display name of the run."""
    dir: PathText | None = None
    """Folder of the local files; the current folder if absent."""


class TensorBoardConfig(Section):
    """TensorBoard. Only rank 0 writes."""

    dir: PathText | None = None
    """Folder of the event files; disabled if absent. Needs the tensorboard package."""


class LoggingConfig(Section):
    """What a run reports."""

    interval: int = Field(default=10, ge=1, le=MAX_STEPS)
    """Steps between log lines."""
    metrics_file: PathText | None = None
    """File that gets one JSON line per logged step and per evaluation; none if absent. A new run keeps the records of an
    earlier one in FILE.1, FILE.2 and so on. docs/metrics.md describes the fields."""
    peak_tflops: float | None = Field(default=None, gt=0)
    """Peak of a device in TFLOP/s, of which the MFU is a share; by the name of the GPU if absent."""
    noise_scale_interval: int | None = Field(default=None, ge=1, le=MAX_STEPS)
    """Steps between measurements of the gradient noise scale (McCandlish et al., arXiv 1812.06162); none if absent. Logged as
    noise_scale, in tokens, and suggested_batch_size, the same in sequences. A measurement costs one more forward and
    backward, with one micro-batch at a time in the pipeline. Its running mean restarts with each start of the run."""
    wandb: WandbConfig = WandbConfig()
    """Weights & Biases."""
    tensorboard: TensorBoardConfig = TensorBoardConfig()
    """TensorBoard."""


class Config(Section):
    """The keys of a config that are not in a section."""

    model: ModelConfig
    """Shape of the transformer."""
    parallel: ParallelConfig = ParallelConfig()
    """Layout over the ranks."""
    zero: ZeroConfig = ZeroConfig()
    """ZeRO sharding."""
    data: DataConfig = DataConfig()
    """Datasets and tokenizer."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """The optimizer."""
    lr_schedule: LRScheduleConfig = LRScheduleConfig()
    """Learning rate schedule."""
    training: TrainingConfig
    """Length, batch size and precision."""
    lora: LoRAConfig = LoRAConfig()
    """Low-rank adapters."""
    dpo: DPOConfig = DPOConfig()
    """Direct preference optimization."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """Loss on held-out data."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Saving and resuming."""
    resilience: ResilienceConfig = ResilienceConfig()
    """Response to a bad step."""
    logging: LoggingConfig = LoggingConfig()
    """What a run reports."""
    deepspeed: dict[str, Any] = Field(default_factory=dict)
    """Further settings, passed to DeepSpeed unchanged. With an effect: the sizes in zero_optimization, such as
    stage3_prefetch_bucket_size, under stage 3 or with the optimizer on the CPU, and the loss scale in fp16, such as
    initial_scale_power and loss_scale_window. Without: DeepSpeed's profilers and timers (flops_profiler,
    wall_clock_breakdown). The keys in the table at the end of docs/config.md are refused."""
