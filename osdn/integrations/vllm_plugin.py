"""What vLLM calls when it starts: the entry point `vllm.general_plugins`."""

from typing import Any


def register() -> None:
    """Tell vLLM which class serves an OSDN checkpoint, and transformers which reads its config.

    The model's module is named, not imported: vLLM imports it in the process that needs it.
    """
    from transformers import AutoConfig
    from vllm import ModelRegistry
    from vllm.logger import init_logger
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig

    from osdn.model.configuration import OSDNConfig

    class WithoutPrefixCaching(VerifyAndUpdateConfig):
        """vLLM turns prefix caching on for every hybrid; ours gave wrong tokens with it."""

        @classmethod
        def verify_and_update_config(cls, vllm_config: Any) -> None:
            if vllm_config.cache_config.enable_prefix_caching:
                init_logger("vllm.osdn").warning("OSDN models: prefix caching is turned off")
                vllm_config.cache_config.enable_prefix_caching = False

    AutoConfig.register(OSDNConfig.model_type, OSDNConfig, exist_ok=True)
    ModelRegistry.register_model("OSDNForCausalLM", "osdn.integrations.vllm:OSDNForCausalLM")
    MODELS_CONFIG_MAP["OSDNForCausalLM"] = WithoutPrefixCaching
