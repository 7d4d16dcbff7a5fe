"""What vLLM calls when it starts: the entry point `vllm.general_plugins`."""

from typing import Any

CPU_BLOCK = 128  # tokens; vLLM's own default on a CPU


def register() -> None:
    """Tell vLLM which class serves an OSDN checkpoint, and transformers which reads its config.

    The model's module is named, not imported: vLLM imports it in the process that needs it.
    """
    from transformers import AutoConfig
    from vllm import ModelRegistry
    from vllm.logger import init_logger
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig
    from vllm.platforms import current_platform

    from osdn.model.configuration import OSDNConfig

    class OSDNEngineConfig(VerifyAndUpdateConfig):
        """vLLM's settings that OSDN models need otherwise than by default."""

        @classmethod
        def verify_and_update_config(cls, vllm_config: Any) -> None:
            refuse(vllm_config)
            cache = vllm_config.cache_config
            if current_platform.is_cpu():
                fix_block_size(cache)
            if vllm_config.speculative_config is not None and cache.enable_prefix_caching:
                # On a CPU vLLM has no kernel that moves states when both are on.
                init_logger("vllm.osdn").warning("speculation: prefix caching is turned off")
                cache.enable_prefix_caching = False

    AutoConfig.register(OSDNConfig.model_type, OSDNConfig, exist_ok=True)
    ModelRegistry.register_model("OSDNForCausalLM", "osdn.integrations.vllm:OSDNForCausalLM")
    MODELS_CONFIG_MAP["OSDNForCausalLM"] = OSDNEngineConfig


def refuse(vllm_config: Any) -> None:
    """Raise for what OSDN models are not served with, before any process is started.

    Raises:
        ValueError: tensor or pipeline parallelism, or speculation with another method than ngram.
    """
    for option in ("tensor_parallel_size", "pipeline_parallel_size"):
        if (size := getattr(vllm_config.parallel_config, option)) != 1:
            raise ValueError(f"{option}: OSDN models are served with 1, got {size}")
    drafts = vllm_config.speculative_config
    if drafts is not None and drafts.method != "ngram":
        raise ValueError(
            "speculative_config: OSDN models are served with the method 'ngram', got "
            f"{drafts.method!r}"
        )


def fix_block_size(cache: Any) -> None:
    """One block size for the scheduler and for the pages of states (vLLM 0.32 on a CPU).

    A state is kept, for later prompts with the same prefix, when a piece of a prompt ends where a
    block ends. vLLM's CPU platform sets the default block size to 128 after the pages of states
    took 16, and once more after the engine is built. The scheduler then cuts prompts by 128, and
    the pages kept as states after 16, 32, ... tokens hold states after other numbers of tokens:
    later prompts get wrong tokens. A size given by the user is left as it is, so that is what
    ours becomes. This can go when vLLM resolves the size once.
    """
    if not cache.user_specified_block_size:
        cache.block_size, cache.user_specified_block_size = CPU_BLOCK, True
