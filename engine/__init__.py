"""Models and GPUs: profiles, step times, the latency objective, simulated model servers. No I/O, no clock."""
