"""The fluid model, in which work is a liquid: a fleet over days of traffic, simulated in milliseconds."""
