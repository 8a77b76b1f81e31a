"""Write docs/flags.md from the declarations of the flags: `python -m tests.flags_page`, or `make flags`."""

from collections.abc import Iterable

import autoscaler_server
import loadbalancer_server
import sim
from fleet.outside.config import SERVE_ONLY, AutoscalerConfig
from fleet.outside.operator_commands import ACT, SHOW, SWITCH, OperatorConfig
from fleet_client import gateway
from fleet_client.flags import Flag, Parser, flags_in
from localcloud import __main__ as localcloud
from simulation.virtual import command as virtual
from tests.paths import ROOT

PAGE = ROOT / "docs" / "flags.md"

BEGINNING = """\
# Flags

<!-- Made by `make flags` from the declarations in the code; a test compares the two. -->

Each flag below may be given in three places. The command line goes before the environment, the environment
before the file, the file before the default. `--help` of each program says the same in short.

- **Command line**: `--max-instances 4`. A switch is `--local`, or `--no-manage` where it is on by default. A
  flag that may be repeated, as `--loadbalancer`, replaces what environment and file say.
- **Environment**: `AUTOSCALER_MAX_INSTANCES=4`; the last column has the names. A switch is `true` or `false`,
  several values have spaces between, and an empty variable says nothing. A name that is nearly right is
  refused. (Kubernetes sets `AUTOSCALER_PORT` and the like for services of these names; `enableServiceLinks:
  false` stops it.)
- **File**: `--config fleet.toml`, or its path in the environment, as `AUTOSCALER_CONFIG`. A file is for one
  program. It has the flags' names without the dashes before them; paths are as on the command line, and may
  begin with `~`:

  ```toml
  max-instances = 4
  loadbalancer = ["http://127.0.0.1:8200", "http://127.0.0.1:8201"]
  manage = false
  ```

A name that is not known, a value of a wrong type and one out of its range are one line, which names the file
or the variable, and exit status 2. Keys and salts are in files of mode 0600, one a line. The one flag whose
value may be a secret, `--notify`, is then refused on the command line and in a file that others can read.
Blank lines and those that begin with `#` are passed over; what else is no key is refused with its line.
"""

END = """
## Exit status

0 done; 1 some requests failed or something was left behind (sim.py); 2 with one line for what the operator
must mend; 130 interrupted.
"""

HEAD = "| flag | default | unit | range | meaning | environment |\n|---|---|---|---|---|---|\n"


def page() -> str:
    """Return the text of docs/flags.md."""
    serve = [one for one in flags_in(AutoscalerConfig) if one.name in SERVE_ONLY]
    all_three = [one for one in flags_in(AutoscalerConfig) if one.name not in SERVE_ONLY]
    return "".join(
        [
            BEGINNING,
            "\n## `autoscaler_server.py`\n\nFor serving, and for its commands `prepare --count N`, which "
            "rents and loads N instances,\n`secrets`, and `destroy-fleet`, which asks without `--yes`:\n\n",
            _table(all_three, autoscaler_server.ENVIRONMENT),
            "\nFor serving alone; in a file the two commands pass them over:\n\n",
            _table(serve, autoscaler_server.ENVIRONMENT),
            f"\nFor the commands that ask one which runs already ({', '.join(SHOW | ACT | SWITCH)}):\n\n",
            _table(flags_in(OperatorConfig), autoscaler_server.OPERATOR_ENVIRONMENT),
            _section("`loadbalancer_server.py`", loadbalancer_server.parser()),
            _section("`gateway.py`, installed `fleet-gateway`", gateway.parser()),
            _section("`sim.py`, against a fleet that runs, or with `--local` one of its own", sim.parser()),
            _section("`sim.py --virtual`, which has flags of its own", virtual.parser()),
            _section("`python -m localcloud`", localcloud.parser()),
            END,
        ]
    )


def _section(title: str, parser: Parser) -> str:
    return f"\n## {title}\n\n{_table(parser.flags.values(), parser.environment)}"


def _table(flags: Iterable[Flag], prefix: str) -> str:
    return HEAD + "".join(_row(one, prefix) for one in flags)


def _row(one: Flag, prefix: str) -> str:
    stand_in = "" if one.stand_in is None else f" {one.stand_in}"
    no = f", `--no-{one.key}`" if one.kind is bool and one.default is not False else ""
    cells = [
        f"`{one.option}{'' if one.choices else stand_in}`{no}",
        one.default_shown,
        one.unit_shown,
        one.bounds_shown,
        one.meaning,
        f"`{prefix}{one.name.upper()}`",
    ]
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |\n"


if __name__ == "__main__":
    PAGE.write_text(page())
