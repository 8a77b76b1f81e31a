"""How a command ends."""

import pytest

from fleet_client import flags
from process.errors import ConfigError


@pytest.mark.parametrize(
    ("fault", "code", "said"),
    [
        (None, 0, ""),
        (ConfigError("--port 0: wanted 1"), 2, "--port 0: wanted 1\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
    ids=["fine", "config-error", "ctrl-c"],
)
def test_a_main_ends_with_one_line_at_most(
    fault: BaseException | None, code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def main() -> None:
        if fault is not None:
            raise fault

    with pytest.raises(SystemExit) as ended:
        flags.run_main(main)
    assert ended.value.code == code
    assert capsys.readouterr().err.endswith(said)
    assert capsys.readouterr().err.count("\n") <= 1
