"""The OpenAI-compatible HTTP gateway in front of SGLang. Imports neither torch nor sglang."""
