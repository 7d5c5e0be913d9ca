"Spiking visual prompts for frozen vision backbones: LoRSP and Spike-NVPT."

from importlib import import_module

from wrapt import register_post_import_hook

__version__ = "0.1.0"

# timm knows the pocket models as soon as both packages are imported, in whatever order; timm alone takes seconds to import
_hook = register_post_import_hook(lambda timm: import_module(f"{__name__}.backbones.pocket"), "timm")

_EXPORTS = {
    "get_prompted_model": "model",
    "PromptedModel": "model",
    "LoRSPConfig": "methods.lorsp",
    "SpikeNVPTConfig": "methods.spike_nvpt",
    "LoRSPNetworkConfig": "methods.lorsp_network",
    "NoPromptConfig": "baselines.no_prompt",
    "AutoVPConfig": "baselines.autovp",
    "BiasTuningConfig": "baselines.bias_tuning",
    "EVPConfig": "baselines.evp",
    "FrozenFactorsConfig": "baselines.frozen_factors",
    "FullFinetuningConfig": "baselines.full_finetuning",
    "LoRAConfig": "baselines.lora",
    "LoRVPConfig": "baselines.lor_vp",
    "QuantisedLoRVPConfig": "baselines.quantised_lor_vp",
    "SMMConfig": "baselines.smm",
    "VPConfig": "baselines.vp",
    "VPTConfig": "baselines.vpt",
    "Prompt": "prompts.base",
    "PromptConfig": "prompts.base",
    "register_method": "prompts.base",
    "ConfigError": "config",
}
__all__ = ["__version__", *_EXPORTS]


def __getattr__(name):
    if name not in _EXPORTS:
        raise AttributeError(f"module 'spikeprompt' has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_EXPORTS[name]}"), name)


def __dir__():
    return sorted(__all__)
