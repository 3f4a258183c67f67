"""What DeepSpeed is told: made of our config, so that no fact is written twice. Needs no torch."""

from typing import Any

from megagpt.config.schema import Config


def deepspeed_config(config: Config, data_parallel_size: int) -> dict[str, Any]:
    """The dict for `deepspeed.initialize`; the user's own `deepspeed` section fills in what megagpt leaves open.

    ZeRO 0 runs as DeepSpeed's stage 1 over groups of one rank (see `zero_groups.py`): its own stage 0 keeps no
    fp32 master weights and counts a tied embedding twice in the clip norm.
    """
    training, zero = config.training, config.zero
    sharding: dict[str, Any] = {"stage": max(zero.stage, 1), "overlap_comm": False}
    if zero.offload_optimizer != "none":
        sharding["offload_optimizer"] = {"device": zero.offload_optimizer}
    if zero.offload_param != "none":
        sharding["offload_param"] = {"device": zero.offload_param}
    ours = {
        # Of no effect but on DeepSpeed's own arithmetic; context ranks may be more than samples.
        "train_micro_batch_size_per_gpu": max(1, training.global_batch_size // data_parallel_size),
        "gradient_accumulation_steps": 1,  # our schedule accumulates; one DeepSpeed step is one optimizer step
        "gradient_clipping": config.optimizer.clip_grad,
        "zero_optimization": sharding,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
    }
    if training.precision != "fp32":
        ours[training.precision] = {"enabled": True}
    return _merged(config.deepspeed, ours)


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`base` with the values of `over` laid on it, section by section."""
    merged = dict(base)
    for key, value in over.items():
        below = base.get(key)
        merged[key] = _merged(below, value) if isinstance(value, dict) and isinstance(below, dict) else value
    return merged
