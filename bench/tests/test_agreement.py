"""The same load for sim.py and AIPerf: as many requests, as long, at the same times."""

import json
from pathlib import Path

from bench.agreement import FIGURES, write_load
from localcloud.paced.completion_request import count_tokens
from simulation.report import RunInfo, build
from simulation.traces.reading import read


def test_both_get_the_same_requests_at_the_same_times(tmp_path: Path) -> None:
    ours, theirs = write_load(tmp_path, seconds=60, seed=1)
    sent = list(read(ours))
    lines = [json.loads(line) for line in theirs.read_text().splitlines()]
    assert len(sent) == len(lines) > 60
    for request, line in zip(sent, lines, strict=True):
        assert abs(request.at_s - line["timestamp"] / 1e3) <= 0.0011
        assert request.output_tokens == line["output_length"]
        # A token of AIPerf's tokenizer is a character here.
        assert request.prompt_tokens == count_tokens("x" * line["input_length"])


def test_what_is_compared_is_in_every_report() -> None:
    run = RunInfo("", False, "vllm-13", 1, True, 0.0, 1.0, False, {}, 0.0, 0)
    report = build(run, [], [], None)
    for _, _, path in FIGURES.values():
        found = report
        for key in path:
            found = found[key]
