"""What `python3 -m vllm.entrypoints.cli.main serve` finds on an instance of localcloud: not vLLM."""

from localcloud.paced.command import serve_command

if __name__ == "__main__":
    serve_command()
