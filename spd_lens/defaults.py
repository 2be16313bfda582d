"""The one default that the library's lowest part and its settings share."""

DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
"""Small enough for a laptop, Apache-2.0, Llama architecture with grouped-query attention."""
