"""The first day of an operator, by the commands of docs/vast-ai.md, on a harsh local cloud."""
