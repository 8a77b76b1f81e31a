"""Shows which GPUs of the market serve a model in time, as a table."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from engine.profile import Profile
from engine.slo import Slo
from fleet.fits import PROMPT_TOKENS, Fit, not_for_rent
from process.safe_text import safe_text

SHOWN = 20
"""Lines of the table, the cheapest tokens first."""

MOST_GPUS = 8

_COLUMNS = (
    "GPUs",
    "offers",
    "from $/h",
    "KV tokens",
    "at once",
    "tokens/s",
    "ms a token",
    "s to first",
    "$/M tokens",
    "by",
)


def show_fits(fits: Sequence[Fit], profile: Profile, console: Console, slo: Slo | None = None) -> None:
    """Print the table and what it means."""
    slo = slo or Slo()
    table = Table(box=None)
    for name in _COLUMNS:
        table.add_column(name, no_wrap=True)
    for fit in fits[:SHOWN]:
        table.add_row(*(safe_text(cell) for cell in _cells(fit)))
    console.print(table)
    for sentence in _says(fits, profile, slo):
        console.print(sentence, highlight=False, markup=False)


def _cells(fit: Fit) -> tuple[str, ...]:
    usd = fit.usd_million
    return (
        f"{fit.num_gpus} x {fit.gpu_name}",
        str(fit.offers),
        f"{fit.usd_h:.3f}",
        f"{fit.kv_tokens:,}",
        str(fit.at_once),
        f"{fit.tokens_s:,.0f}",
        f"{1e3 * fit.token_s:.0f}" if fit.at_once else "-",
        f"{fit.first_token_s:.2f}",
        "too slow" if usd is None else f"{usd:.3f}",
        fit.by,
    )


def _says(fits: Sequence[Fit], profile: Profile, slo: Slo) -> list[str]:
    said = [
        f"In time: first token within {slo.first_token_s:g} s and {1e3 * slo.prompt_token_s:g} ms a prompt "
        f"token, the others within {1e3 * slo.output_token_s:.0f} ms; prompts of {PROMPT_TOKENS:.0f} tokens, "
        f"answers of {profile.expected_output_tokens:.0f}, an instance full all the time.",
    ]
    if not fits:
        said.append(f"No offer on the market holds {profile.name} in its memory.")
    if len(fits) > SHOWN:
        said.append(f"{len(fits) - SHOWN} dearer ones are not shown.")
    if others := not_for_rent(fits, profile, MOST_GPUS):
        said.append(f"Would hold it, but none was found: {', '.join(others)}.")
    return said
