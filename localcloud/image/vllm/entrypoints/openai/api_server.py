"""What `python3 -m vllm.entrypoints.openai.api_server` finds on an instance of localcloud: not vLLM."""

from localcloud.paced.command import main

if __name__ == "__main__":
    main()
