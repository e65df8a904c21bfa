"""What a request means in a small world, by its vocabulary: for presets whose MLLM cannot plan.

The words of the world are data, in prompts/keywords. A request all of whose words are known becomes actions in the
MLLM's own wording; for any other the user is told what is unknown, or asked.
"""
