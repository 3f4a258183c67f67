"""The tree of a run: every key with its type, unit, default and meaning, declared once.

The docstring under a field is its help text (`docs/config.md` is made of them). Rules that join
several keys are in `rules.py`; reading files and overrides is in `load.py`. Nothing here does I/O.
"""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

Schedule = Literal["1f1b", "gpipe", "interleaved_1f1b", "interleaved_zero_bubble", "zb_h1", "zbv", "v_half", "v_min"]
Source = str | dict[str, float]
"""One prefix of a .bin/.idx pair, or several with their weights: {"data/web": 0.7, "data/books": 0.3}."""


class Section(BaseModel):
    """A part of the tree: unknown keys are errors, values keep the type written, nothing changes after load."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True)


class ModelConfig(Section):
    """Shape of the transformer. Names follow GPT-2."""

    n_layer: int = Field(ge=1)
    """Transformer blocks."""
    n_embd: int = Field(ge=1)
    """Width of the residual stream."""
    n_head: int = Field(ge=1)
    """Attention heads; divides n_embd."""
    n_positions: int = Field(ge=1)
    """Sequence length, tokens."""
    vocab_size: int | None = Field(default=None, ge=2)
    """Tokens that the model can predict; taken from data.tokenizer if absent."""
    vocab_multiple: int = Field(default=128, ge=1)
    """The embedding is padded with unused rows to a multiple of this; they reach neither loss nor checkpoint."""
    ffn_hidden: int | None = Field(default=None, ge=1)
    """Width inside the MLP; 4 x n_embd if absent."""
    activation: Literal["gelu", "gelu_tanh", "relu", "silu"] = "gelu"
    """Non-linearity of the MLP: exact GELU, its tanh form (GPT-2), ReLU or SiLU."""
    embd_pdrop: float = Field(default=0.0, ge=0, lt=1)
    """Dropout after the embeddings, probability."""
    attn_pdrop: float = Field(default=0.0, ge=0, lt=1)
    """Dropout of attention weights, probability."""
    resid_pdrop: float = Field(default=0.0, ge=0, lt=1)
    """Dropout before each residual addition, probability."""
    tie_embeddings: bool = True
    """The output layer uses the token embedding's weight."""
    init_std: float = Field(default=0.02, gt=0)
    """Standard deviation of the initial weights; divided by sqrt(2 n_layer) in the layers that end a residual branch."""
    layer_norm_epsilon: float = Field(default=1e-5, gt=0)
    """Added to the variance in every norm."""

    @property
    def ffn_width(self) -> int:
        """Width inside the MLP."""
        return self.ffn_hidden or 4 * self.n_embd

    @property
    def head_width(self) -> int:
        """Width of one attention head."""
        return self.n_embd // self.n_head

    @property
    def tokens_in_vocab(self) -> int:
        """`vocab_size`, once it is known."""
        if self.vocab_size is None:
            raise ValueError("model.vocab_size is not resolved: give it, or data.tokenizer")
        return self.vocab_size

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the token embedding: `vocab_size` rounded up to `vocab_multiple`."""
        return -(-self.tokens_in_vocab // self.vocab_multiple) * self.vocab_multiple


class ScheduleCosts(Section):
    """Times of one micro-batch on all layers of one pipeline rank, in any unit, and what the rank may hold."""

    forward: float = Field(default=1.0, gt=0)
    """Time of the forward."""
    input_backward: float = Field(default=1.0, gt=0)
    """Time of the backward for the layers' inputs."""
    weight_backward: float = Field(default=1.0, gt=0)
    """Time of the backward for the weights."""
    transfer: float = Field(default=0.0, ge=0)
    """Time that a message between ranks is under way."""
    most_micro_batches: float | None = Field(default=None, gt=0)
    """Micro-batches whose activations, of all its layers, a rank has memory for; no limit if absent."""


class ParallelConfig(Section):
    """Where the work runs. The data-parallel size is what is left of the world: world / (tensor x pipeline x context)."""

    tensor: int = Field(default=1, ge=1)
    """Ranks that share each matrix; best kept within one node."""
    pipeline: int = Field(default=1, ge=1)
    """Stages that share the layers."""
    context: int = Field(default=1, ge=1)
    """Ranks that share each sequence, for long ones: every one has a part of the positions."""
    schedule: Schedule | Literal["auto"] = "1f1b"
    """Order of the forwards and backwards in a pipeline: docs/schedules.md shows and compares them. "auto" takes the
    fastest by simulation with the times in `schedule_costs`, and says why."""
    schedule_costs: ScheduleCosts = ScheduleCosts()
    """What "auto" reckons with."""
    virtual_stages: int = Field(default=1, ge=1)
    """Chunks of layers on each rank: 2 or more for the interleaved schedules; the V-shaped ones have two by themselves."""
    sequence_parallel: bool = False
    """Split norms and dropout along the sequence over the tensor ranks: reduce-scatter in place of all-reduce."""
    timeout_seconds: float = Field(default=1800.0, gt=0)
    """A rank that stays in one place of its step for longer than this ends the job, which names the rank and the place."""


class ZeroConfig(Section):
    """What data-parallel ranks keep a share of (Rajbhandari et al., arXiv 1910.02054)."""

    stage: Literal[0, 1, 2, 3] = 1
    """0 nothing, 1 optimizer state, 2 and gradients, 3 and parameters."""
    offload_optimizer: Literal["none", "cpu"] = "none"
    """Keep the optimizer's state in host memory (stages 1 to 3)."""
    offload_param: Literal["none", "cpu"] = "none"
    """Keep the parameters' shards in host memory (stage 3)."""


class DataConfig(Section):
    """The corpora: separate prefixes for train, valid and test, or `paths` cut by `split`."""

    train: Source | None = None
    """Prefix of a .bin/.idx pair, or prefixes with weights."""
    valid: Source | None = None
    """As `train`, for evaluation during training."""
    test: Source | None = None
    """As `train`, for the evaluation after the last step."""
    paths: Source | None = None
    """As `train`, cut into train, valid and test by `split`."""
    split: str | None = None
    """Shares of train, valid and test in `paths`, such as "969,30,1"."""
    tokenizer: str | None = None
    """A SentencePiece .model, a Hugging Face tokenizer.json, a folder with vocab.json and merges.txt, or "byte"."""
    seed: int = Field(default=1234, ge=0)
    """Seed of the order of documents and samples."""
    cache_dir: str | None = None
    """Folder for the orders of large corpora (from a million documents and samples), 13 bytes a document for each epoch.
    Beside the data if absent, or where that is read-only in the node's folder for temporary files."""
    reset_positions: bool = False
    """Positions count from the beginning of each document of a sample, not of the sample (Megatron: reset-position-ids)."""
    reset_attention: bool = False
    """A token attends to earlier tokens of its own document alone, not of all the sample (Megatron: reset-attention-mask).
    Takes a mask of micro_batch_size x n_positions^2 numbers, and attention that is slower than the plain causal one."""
    mask_document_ends: bool = False
    """No loss where the next token is the first of another document, which nothing foretells (Megatron: eod-mask-loss)."""


class OptimizerConfig(Section):
    """The update rule."""

    type: Literal["adamw", "adam", "sgd"] = "adamw"
    """adamw decays weights apart from the gradient (Loshchilov and Hutter), adam adds the decay to it."""
    learning_rate: float = Field(default=3e-4, gt=0)
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of the moments' averages (adam, adamw)."""
    eps: float = Field(default=1e-8, gt=0)
    """Added to the root of the second moment (adam, adamw)."""
    momentum: float = Field(default=0.0, ge=0, lt=1)
    """Momentum (sgd)."""
    weight_decay: float = Field(default=0.1, ge=0)
    """Applied to matrices and embeddings; not to biases and norms."""
    clip_grad: float = Field(default=1.0, ge=0)
    """The gradient is scaled down to this global L2 norm; 0 turns clipping off."""


class LRScheduleConfig(Section):
    """Learning rate over steps: linear warm-up, then `type`, down to `min_lr`."""

    type: Literal["cosine", "linear", "constant", "inverse-sqrt", "warmup-stable-decay"] = "cosine"
    """Shape after the warm-up."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps of linear growth from 0."""
    decay_steps: int | None = Field(default=None, ge=1)
    """Step at which min_lr is reached (cosine, linear), or length of the last decay (warmup-stable-decay).
    The length of the run (a tenth of it for warmup-stable-decay) if absent."""
    min_lr: float = Field(default=0.0, ge=0)
    """Floor."""


class BatchRampConfig(Section):
    """A global batch that grows to training.global_batch_size (Megatron: rampup-batch-size). Every size is a multiple of
    micro-batch x data-parallel size. The learning rate goes on by steps, of which a ramp makes more."""

    start: int | None = Field(default=None, ge=1)
    """Sequences in the first steps; no ramp if absent."""
    increment: int = Field(default=1, ge=1)
    """Sequences that the batch grows by at a time."""
    samples: int = Field(default=0, ge=0)
    """Sequences over which it grows, each size for an equal part of them."""


class TrainingConfig(Section):
    """Length, batch and precision of the run."""

    steps: int | None = Field(default=None, ge=1)
    """Optimizer steps; one of steps, tokens and epochs."""
    tokens: int | None = Field(default=None, ge=1)
    """Tokens to train on; rounded up to whole steps."""
    epochs: float | None = Field(default=None, gt=0)
    """Passes over the training data; rounded down to whole steps, at least one."""
    max_hours: float | None = Field(default=None, gt=0)
    """Wall-clock hours after which this start of the run saves at the next step and ends with exit code 75, for a job
    script to start it again; no limit if absent."""
    micro_batch_size: int = Field(ge=1)
    """Sequences in one forward of one data-parallel rank."""
    global_batch_size: int = Field(ge=1)
    """Sequences in one optimizer step, over all ranks."""
    batch_ramp: BatchRampConfig = BatchRampConfig()
    """Smaller batches in the first steps; null for none."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Type of parameters and activations; gradients are summed and optimizer states kept in fp32 under each."""
    seed: int = Field(default=1234, ge=0)
    """Seed of the initial weights and of dropout."""
    recompute: Literal["none", "selective", "full"] = "none"
    """What the backward computes again instead of keeping: nothing, the attention core, or whole blocks."""
    recompute_layers: int = Field(default=1, ge=1)
    """Blocks that full recompute takes together: the input of each such group is all that is kept of it."""
    freeze: list[str] = []
    """Patterns of weights that stay as they are, such as "embedding.*", "layers.[0-3].*" or "layers.2.attention.*": they
    take no gradient and no optimizer state. A tied output layer is the token embedding, so freezes with it. A run may go
    on with other patterns; what is trained again begins with moments of zero."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Share of each label that is spread evenly over the vocabulary; evaluations report the plain loss without it."""

    @field_validator("batch_ramp", mode="before")
    @classmethod
    def _no_ramp(cls, value: Any) -> Any:
        return BatchRampConfig() if value is None else value


class EvaluationConfig(Section):
    """Loss on the validation split."""

    interval: int | None = Field(default=None, ge=1)
    """Steps between evaluations; only after the last step if absent."""
    steps: int = Field(default=10, ge=1)
    """Global batches in one evaluation."""
    micro_batch_size: int | None = Field(default=None, ge=1)
    """Sequences in one forward; training.micro_batch_size if absent."""


class CheckpointConfig(Section):
    """What is saved, and what a run starts from."""

    dir: str | None = None
    """Folder of the run's checkpoints; nothing is saved if absent."""
    interval: int | None = Field(default=None, ge=1)
    """Steps between checkpoints; only after the last step if absent."""
    keep: int = Field(default=0, ge=0)
    """Newest checkpoints to keep; 0 keeps all. The one that the run began with stays in any case."""
    keep_every: int | None = Field(default=None, ge=1)
    """Checkpoints whose step is a multiple of this stay as well."""
    resume: str = "auto"
    """"auto" goes on from the newest whole checkpoint in dir if there is one, "never" starts anew in a dir without any, a
    path loads that one."""


class ResilienceConfig(Section):
    """What happens when a step goes wrong. "stop" ends the run, "skip" drops the step's update and goes on with the next
    data, "rollback" goes back to the last checkpoint and passes over the step's data. All ranks decide the same."""

    on_nonfinite: Literal["stop", "skip", "rollback"] = "stop"
    """The loss or the gradient is NaN or infinite. The update is dropped in any case."""
    on_overflow: Literal["stop", "skip", "rollback"] = "skip"
    """Under fp16 the loss is finite and the gradient is not: the loss scale, which "skip" lowers, was too high."""
    on_spike: Literal["none", "stop", "skip", "rollback"] = "none"
    """The loss is further above the mean of the last `spike_window` steps than `spike_deviations` standard deviations (of
    at least a hundredth of the mean)."""
    spike_window: int = Field(default=100, ge=2)
    """Steps that a loss is compared with; until so many are made no loss is a spike."""
    spike_deviations: float = Field(default=6.0, gt=0)
    """Standard deviations."""
    most_skipped: int = Field(default=16, ge=1)
    """Steps in a row without an update, for whatever reason; one more ends the run."""
    most_rollbacks: int = Field(default=3, ge=0)
    """Rollbacks in one start of the run; one more ends it."""
    replica_check_interval: int | None = Field(default=None, ge=1)
    """Steps between checks that ranks which hold the same weights hold the same bits; none if absent."""
    straggler_factor: float = Field(default=1.5, gt=1)
    """A rank whose own work takes this many times that of the typical rank is named in the log."""


class WandbConfig(Section):
    """Weights & Biases, written by rank 0 alone."""

    project: str | None = None
    """Project; nothing is sent if absent. Offline where there is no network or no API key."""
    name: str | None = None
    """Display name of the run."""
    dir: str | None = None
    """Folder of the local files; the current one if absent."""


class LoggingConfig(Section):
    """What is reported while the run goes on."""

    interval: int = Field(default=10, ge=1)
    """Steps between log lines."""
    metrics_file: str | None = None
    """File that gets one JSON line per logged step and evaluation."""
    noise_scale_interval: int | None = Field(default=None, ge=1)
    """Steps between measurements of the gradient noise scale (McCandlish et al., arXiv 1812.06162), logged as noise_scale,
    tokens, with the suggested_batch_size, sequences, of that many; none if absent. A measurement takes the work of another
    forward and backward, one micro-batch at a time through the pipeline. Its running mean begins anew with each start."""
    wandb: WandbConfig = WandbConfig()
    """Weights & Biases."""


class Config(Section):
    """One file, one run."""

    model: ModelConfig
    """Shape of the transformer."""
    parallel: ParallelConfig = ParallelConfig()
    """Tensor x pipeline layout."""
    zero: ZeroConfig = ZeroConfig()
    """Sharding over data-parallel ranks."""
    data: DataConfig = DataConfig()
    """Corpora and tokenizer."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """Update rule."""
    lr_schedule: LRScheduleConfig = LRScheduleConfig()
    """Learning rate over steps."""
    training: TrainingConfig
    """Length, batch and precision."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """Held-out loss."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Saving and resuming."""
    resilience: ResilienceConfig = ResilienceConfig()
    """What happens when a step goes wrong."""
    logging: LoggingConfig = LoggingConfig()
    """Reports."""
    deepspeed: dict[str, Any] = Field(default_factory=dict)
    """Passed on to DeepSpeed; keys that megagpt sets itself are refused."""
