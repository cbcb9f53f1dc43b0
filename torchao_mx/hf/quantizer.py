"""The quantizer "torchao_mx" for transformers 4 and 5; ``hooks_v4.py`` and ``hooks_v5.py`` add the loading.

Stored configs say "mxfp4", as the published ones do, so any loader of gpt-oss can read a saved model.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.quantizers.auto import register_quantization_config
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from torchao_mx.hf.layouts import gpt_oss
from torchao_mx.hf.save import adapters_in, packed_state_dict
from torchao_mx.hf.transformers_internals import holds_adapters_of_peft

NAME = "torchao_mx"


@register_quantization_config(NAME)
class MXQuantizationConfig(QuantizationConfigMixin):
    """The ``model.config.quantization_config`` of a model that was loaded packed; stored as "mxfp4".

    Args:
        modules_to_not_convert: the modules that are not packed, from the checkpoint's config.
    """

    def __init__(
        self,
        quant_method: str = NAME,
        modules_to_not_convert: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        self.quant_method = NAME
        self.modules_to_not_convert = list(modules_to_not_convert or gpt_oss.UNPACKED_MODULES)

    def to_dict(self) -> dict[str, Any]:
        return gpt_oss.quantization_config(self)


class MXQuantizer(HfQuantizer):
    """The part that both versions share: models are trainable, never offloaded, and stored packed."""

    is_trainable = True
    is_qat_trainable = True
    requires_calibration = False
    requires_parameters_quantization = False

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Refuse to offload; called again with the devices that ``device_map="auto"`` resolves to."""
        places = {str(d) for d in device_map.values()} if isinstance(device_map, dict) else set()
        if "disk" in places or ("cpu" in places and len(places) > 1):
            raise ValueError(
                f"device_map places parts of the model on {', '.join(sorted(places))}; packed weights are "
                f"not offloaded: use more or larger GPUs, or device_map='cpu' for the whole model"
            )

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    def get_state_dict_and_metadata(
        self, model: PreTrainedModel, *args: Any, **kwargs: Any
    ) -> tuple[dict[str, torch.Tensor] | None, dict]:
        """What transformers' save_pretrained writes; None if it saves PEFT's adapters by itself.

        For a model with this library's adapters, only the adapters, from which Trainer resumes: it saves
        during training, where an error would lose the run.
        """
        if holds_adapters_of_peft(model):
            return None, {}
        adapters = adapters_in(model)
        if not adapters:
            return packed_state_dict(model), {}
        warnings.warn(
            f"{type(model).__name__} is saved as its adapters alone, from which Trainer resumes; use "
            f"torchao_mx.hf.save_adapter to save them for other programs, torchao_mx.hf.save_pretrained with "
            f"merge_adapters=True to save the whole model",
            stacklevel=2,
        )
        return adapters, {}

    def _convert_model_for_quantization(self, model: PreTrainedModel) -> None:
        """Do nothing; in v4 the base class would import accelerate to look for Llama 4."""
