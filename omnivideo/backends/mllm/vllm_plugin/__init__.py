"""vLLM serves our MLLM, vision head included: an out-of-tree model, a connector and routes, all by vLLM's own seams.

    vllm.general_plugins    register          every process: the model's name, nothing loaded
    vllm.endpoint_plugins   endpoint:Endpoint the API server: the routes of `protocol` (named in VLLM_PLUGINS)
    --kv-transfer-config    connector         scheduler and workers: hidden states out of the cache, through the head

The model writes the last hidden state of every token into a cache layer of its own, which vLLM pages, shares between
prompts with a common beginning and evicts like any other.  When the last token of a prompt that wants visual tokens
has been computed, the connector gathers the prompt's rows, cached ones included, and puts them through the head.
`launch.build_command` gives all the flags.  Bound to vLLM 0.32: the cache layer and its layout are not a stable
interface.
"""

ARCHITECTURE = "OmniVideoMLLM"
GENERAL_PLUGIN, ENDPOINT_PLUGIN = "omnivideo", "omnivideo_endpoint"  # the entry points' names
CONNECTOR_CLASS, CONNECTOR_MODULE = "VisualTokensConnector", "omnivideo.backends.mllm.vllm_plugin.connector"
VISUAL_TOKENS_PARAM = "visual_tokens"  # in a request's kv_transfer_params: the name of the file for its visual tokens


def register() -> None:
    """vLLM calls this in every process, some of them twice.  The string keeps the model unloaded until it is built."""
    from vllm import ModelRegistry

    ModelRegistry.register_model(ARCHITECTURE, f"{__name__}.model:OmniVideoMLLM")
