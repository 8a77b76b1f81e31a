"""The paced engine: a stand-in for vLLM that answers with placeholder text at a real model's speed."""
