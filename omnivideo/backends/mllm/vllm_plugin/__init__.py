"""Plugins with which vLLM serves our MLLM and its vision head: a model, a connector and routes.

    vllm.general_plugins    register           in every process: registers the model's name, loads nothing
    vllm.endpoint_plugins   endpoint:Endpoint  in the API server: the routes of `protocol` (VLLM_PLUGINS names it)
    --kv-transfer-config    connector          in scheduler and workers: reads hidden states, runs the vision head

The model writes the last hidden state of every token into an additional cache layer. vLLM pages this layer, shares it
between prompts with a common prefix and evicts from it, as it does for attention layers. When the last token of a
prompt that requests visual tokens has been computed, the connector gathers the prompt's hidden states, cached ones
included, and runs the vision head on them; a preset without a vision head gets the states themselves, taken before the
final norm. `launch.build_command` sets all the flags.

This needs vLLM 0.32, because the cache layer and its layout are not a stable interface.
"""

# A stock Qwen3-VL without routing tokens and vision head, by the model type of its configuration.
FEATURE_ARCHITECTURES = {"qwen3_vl": "OmniVideoQwen3VL", "qwen3_vl_moe": "OmniVideoQwen3VLMoe"}
ARCHITECTURE, VILA_ARCHITECTURE = "OmniVideoMLLM", "OmniVideoVila"
GENERAL_PLUGIN, ENDPOINT_PLUGIN = "omnivideo", "omnivideo_endpoint"  # the entry points' names
CONNECTOR_CLASS, CONNECTOR_MODULE = "VisualTokensConnector", "omnivideo.backends.mllm.vllm_plugin.connector"
VISUAL_TOKENS_PARAM = "visual_tokens"  # in kv_transfer_params: the file for a request's visual tokens or states
FIRST_POSITION_PARAM = "first_position"  # the first position whose hidden states are written


def register() -> None:
    """Register the models by name; a module is imported when its model is built. vLLM may call this twice."""
    from vllm import ModelRegistry

    ModelRegistry.register_model(ARCHITECTURE, f"{__name__}.model:OmniVideoMLLM")
    for architecture in FEATURE_ARCHITECTURES.values():
        ModelRegistry.register_model(architecture, f"{__name__}.feature_model:{architecture}")
    ModelRegistry.register_model(VILA_ARCHITECTURE, f"{__name__}.vila_model:OmniVideoVila")
