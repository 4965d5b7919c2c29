"""nybble as a quantizer of transformers: quantizes while loading, and loads what is quantized."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers.quantizers import HfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name
from transformers.utils import logging

from nybble import state
from nybble.errors import DeviceError
from nybble.hf import checks, choice, conversions
from nybble.hf.config import METHOD
from nybble.hf.loading import STORED_NAMES, Deserialize, Quantize, make_dense
from nybble.nn.coverage import Coverage
from nybble.nn.experts import QuantizedExperts
from nybble.nn.quantized import QuantizedModule
from nybble.nn.replace import dequantize_model

logger = logging.get_logger("nybble.hf")


class NybbleHfQuantizer(HfQuantizer):  # type: ignore[misc]
    """What transformers calls while it loads and saves a model.

    Weights are quantized one at a time, as soon as each is read; a quantized checkpoint is taken
    as it is. Only the quantized form of a weight stays in memory.

    Attributes:
        coverage: What became of each parameter; None before a model was loaded.
    """

    requires_calibration = False
    is_trainable = True
    serialized_names = {"weight": STORED_NAMES}  # noqa: RUF012 (transformers reads the class's)

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        """Take a `NybbleConfig`, a `ServedConfig` or transformers' `BitsAndBytesConfig`."""
        super().__init__(quantization_config, **kwargs)
        self.coverage: Coverage | None = None
        self._has_experts = False
        self.reference: str | None = None  # whose bytes quantizing must give, as in nybble.quantize
        self.compute: str | None = None  # of layers that only the checkpoint says are quantized
        self.repair = False  # whether the checkpoint has weights that bitsandbytes damaged

    @property
    def is_compileable(self) -> bool:
        """Whether generate may compile the model: which expert is asked depends on the data."""
        return not self._has_experts

    def is_serializable(self) -> bool:
        """Saving writes quantized weights as they are."""
        return True

    def validate_environment(self, *_: Any, device_map: Any = None, **__: Any) -> None:
        """Refuse what cannot be done before a model is built."""
        if isinstance(device_map, dict) and "disk" in device_map.values():
            raise DeviceError(
                "device_map puts modules on the disk, where quantized weights cannot stay; give"
                " max_memory more room, choose a smaller format, or name cpu for those modules"
            )

    def update_device_map(self, device_map: Any) -> Any:
        """With no device_map: the current accelerator if there is one, else the CPU."""
        if device_map is not None:
            return device_map
        device = torch.accelerator.current_accelerator(check_available=True)
        if device is None:
            return {"": "cpu"}
        return {"": f"{device.type}:{torch.accelerator.current_device_index()}"}

    def adjust_max_memory(self, max_memory: dict[Any, Any]) -> dict[Any, Any]:
        """Leave room for the dense weight that is being quantized."""
        if self.pre_quantized:
            return max_memory
        return {device: size * 0.9 for device, size in max_memory.items()}

    def param_needs_quantization(self, model: nn.Module, param_name: str, **_: Any) -> bool:
        """Whether a parameter is the weight of a quantized module."""
        module, name = get_module_from_name(model, param_name)
        return isinstance(module, QuantizedModule) and name == "weight"

    def get_new_dtype(self, converter: Any, param: Any, dtype: Any) -> Any:
        """Stored parts of a quantized weight are never cast; a dense weight is, in its turn."""
        for operation in getattr(converter, "operations", ()):
            if isinstance(operation, (Deserialize, conversions.SplitExperts)):
                operation.dtype = dtype
                return None
        return super().get_new_dtype(converter, param, dtype)

    def get_quantize_ops(self) -> Quantize:
        """The operation on a dense weight that is to be quantized."""
        return Quantize(self)

    def get_load_operations(self) -> dict[str, type]:
        """The operation on a stored quantized weight."""
        return {"deserialize": Deserialize}

    def update_weight_conversions(self, weight_conversions: list[Any], model: nn.Module) -> Any:
        """Quantized experts keep the names that each expert has in the checkpoint."""
        kept = conversions.for_quantized_experts(weight_conversions, model)
        return super().update_weight_conversions(kept, model)

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Iterable[str] | None = None, **_: Any
    ) -> None:
        wanted = choice.of(self.quantization_config, self.pre_quantized)
        if self.pre_quantized:
            found = checks.before_loading(checkpoint_files)
            self.repair = bool(found.damaged)
            wanted = replace(wanted, experts=found.quantized_experts)
        self.reference, self.compute = wanted.reference, wanted.compute
        self.coverage = choice.apply(wanted, model)
        self._has_experts = any(isinstance(m, QuantizedExperts) for m in model.modules())
        if self.pre_quantized:
            logger.info("%s", f"{type(model).__name__}: quantized weights are served by nybble")

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        if hasattr(model, "_weight_conversions"):
            model._weight_conversions = conversions.for_saving(model._weight_conversions)
        fresh = []
        for path, module in list(model.named_modules()):
            if isinstance(module, QuantizedModule) and not _is_loaded(module):
                fresh.append(path)
                _initialize(model, path, module)
        if fresh:
            logger.warning(
                "%s", f"not in the checkpoint, so newly initialized and not quantized: {fresh}"
            )
        return model

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[Any, dict[str, Any]]:
        """In files of nybble's own method, int8 codes do not look like a dense weight."""
        own = self.quantization_config.to_dict().get("quant_method") == METHOD
        if not own or not any(
            isinstance(module, QuantizedModule) and module.format == "int8"
            for module in model.modules()
        ):
            return None, {}
        return state.flat_int8(model.state_dict()), {}

    def _dequantize(self, model: Any, dtype: torch.dtype | str | None = None) -> Any:
        # save_pretrained leaves text in the config, from which this dtype comes.
        to: torch.dtype | None = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        dequantize_model(model, to)
        return model

    def remove_quantization_config(self, model: Any) -> None:
        """Forget that a model was quantized: from now on it is saved like any other."""
        super().remove_quantization_config(model)
        if hasattr(model, "_weight_conversions"):
            del model._weight_conversions  # those of this load knew single experts


def _is_loaded(module: QuantizedModule) -> bool:
    return module.absmax.device.type != "meta"


def _initialize(model: Any, path: str, module: QuantizedModule) -> None:
    device = module.weight.device
    dense = make_dense(model, path, module)
    weight = torch.empty(dense.weight.shape, dtype=module.dtype, device=device)  # type: ignore[arg-type]
    dense.weight = nn.Parameter(weight)
    with torch.no_grad():
        model._init_weights(dense)
