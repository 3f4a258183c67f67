"""The config that DeepSpeed gets, derived from ours, so that no value is written twice. Does not import torch."""

from typing import Any

from megagpt.config.schema import Config


def deepspeed_config(config: Config, dp_cp_size: int) -> dict[str, Any]:
    """Return the dict for `deepspeed.initialize`; the user's `deepspeed` section sets what megagpt leaves open.

    `dp_cp_size`: data-parallel times context-parallel size.
    ZeRO 0 runs as DeepSpeed's stage 1 over groups of one rank (see `mpu.py`): DeepSpeed's own stage 0 keeps no fp32
    master weights and counts a tied embedding twice in the gradient norm.
    """
    training, zero = config.training, config.zero
    sharding: dict[str, Any] = {"stage": max(zero.stage, 1), "overlap_comm": False}
    if zero.offload_optimizer != "none":
        sharding["offload_optimizer"] = {"device": zero.offload_optimizer}
    if zero.offload_param != "none":
        sharding["offload_param"] = {"device": zero.offload_param}
    owned = {
        # DeepSpeed only checks this number; context ranks can make dp_cp_size larger than the batch.
        "train_micro_batch_size_per_gpu": max(1, training.global_batch_size // dp_cp_size),
        "gradient_accumulation_steps": 1,  # our schedule accumulates; one DeepSpeed step is one optimizer step
        # Which weights the norm counts: `deepspeed_internals.mark_for_gradient_norm`; over which ranks: `mpu.py`.
        "gradient_clipping": config.optimizer.clip_grad,
        "zero_optimization": sharding,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
    }
    if training.precision != "fp32":
        owned[training.weight_precision] = {"enabled": True}
    return _merged(config.deepspeed, owned)


def _merged(base: dict[str, Any], override: dict[str, Any]) -> dict[str, Any]:
    """Return `base` updated by `override`, section by section."""
    merged = dict(base)
    for key, value in override.items():
        section = base.get(key)
        merged[key] = _merged(section, value) if isinstance(value, dict) and isinstance(section, dict) else value
    return merged
