"""The fluid model: a fleet over days of traffic in milliseconds."""
