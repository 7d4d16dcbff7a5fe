"""What vLLM calls when it starts: the entry point `vllm.general_plugins`."""


def register() -> None:
    """Tell vLLM which class serves an OSDN checkpoint, and transformers which reads its config.

    The model's module is named, not imported: vLLM imports it in the process that needs it.
    """
    from transformers import AutoConfig
    from vllm import ModelRegistry

    from osdn.model.configuration import OSDNConfig

    AutoConfig.register(OSDNConfig.model_type, OSDNConfig, exist_ok=True)
    ModelRegistry.register_model("OSDNForCausalLM", "osdn.integrations.vllm:OSDNForCausalLM")
