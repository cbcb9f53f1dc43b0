"""What the modules that stand in for others share."""

from __future__ import annotations

from typing import Any

from torch import nn


def twin_of(cls: type[nn.Module], module: nn.Module) -> Any:
    """A ``cls`` that shares everything ``module`` holds: parameters, buffers, hooks, training mode.

    Raises:
        TypeError: FSDP2 shards ``module``, and would go on to gather into it and not into its twin.
    """
    if getattr(module, "_is_fsdp_managed_module", False):
        raise TypeError(
            f"{type(module).__name__} is sharded by FSDP2; call quantize_ before fully_shard, or load the "
            f"whole state (torch.distributed.checkpoint.state_dict, full_state_dict=True) into a model that "
            f"is not sharded, and quantize or convert that"
        )
    twin = cls.__new__(cls)
    state = module.__dict__.copy()
    for name, value in state.items():
        if isinstance(value, dict):  # _parameters, _buffers, _modules and the hooks
            state[name] = value.copy()
    hooks = {key: _bound_to(hook, twin) for key, hook in module._load_state_dict_pre_hooks.items()}
    state["_load_state_dict_pre_hooks"] = type(module._load_state_dict_pre_hooks)(hooks)
    twin.__dict__.update(state)
    return twin


def in_place_of(module: nn.Module, twin: nn.Module) -> nn.Module:
    """``twin``, whose hooks the handles of ``module``'s remove from now on: ``module`` leaves the model."""
    if twin is not module:
        for name, hooks in list(vars(module).items()):
            # Those of load_state_dict know their module.
            if "_hooks" in name and name != "_load_state_dict_pre_hooks":
                vars(module)[name], vars(twin)[name] = vars(twin)[name], hooks
    return twin


def _bound_to(hook: Any, module: nn.Module) -> Any:
    """A hook of ``load_state_dict``, its module being ``module``."""
    return type(hook)(hook.hook, module) if getattr(hook, "with_module", False) else hook
