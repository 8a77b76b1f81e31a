"""Models and GPUs: profiles, how long a step takes, the latency objective, model servers in time. Pure."""
