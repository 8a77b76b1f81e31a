"""The paced engine: a stand-in for vLLM that keeps time and has no model."""
