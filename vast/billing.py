"""The bill of the account, as the vastai command shows it: what was charged, and what hosts ask for going on.

`show invoices-v1 --charges` needs the scope billing_read of the API key; the others need those of instances.
A day's charges may come late: what an answer does not have is not known to be nothing.
"""

from vast.cli import Cli, Endpoint, in_words
from vast.errors import unexpected
from vast.rows import Charges, Fields, PriceIncrease, charges_of, parse_json, price_increase_of

CHARGES = Endpoint("show invoices-v1", 2.0)
INCREASES = Endpoint("price increases", 2.0)

PAGE = 100
"""Charges on one page: the most that the command asks for."""

MOST_PAGES = 50
"""Pages that are read of one answer: 5,000 instances in the window."""

# --- outside world ---------------------------------------------------------------------------------


class Billing:
    """Asks for the account's charges and price increases. Safe to use from several threads."""

    def __init__(self, cli: Cli) -> None:
        """Ask by that command; nothing is asked yet."""
        self._cli = cli

    def charges(self, from_s: float, to_s: float) -> list[Charges]:
        """Return what the account was charged for each instance on the days that touch the window (UTC)."""
        words = ["show", "invoices-v1"]
        command = in_words(words)
        found: list[Charges] = []
        token: str | None = None
        for _ in range(MOST_PAGES):
            flags = ["--charges", "--charge-type=instance", f"--limit={PAGE}", "--raw"]
            flags += [f"--start-date={int(from_s)}", f"--end-date={int(to_s)}"]
            if token is not None:
                flags.append(f"--next-token={token}")
            f = Fields(command, "answer", parse_json(command, self._cli.run(CHARGES, words, flags)))
            if f.flag("success") is False:
                raise unexpected(command, "success", f.maybe_text("msg") or "success: false")
            rows = (charges_of(Fields(command, "charge", row)) for row in f.rows("results"))
            found += [row for row in rows if row is not None]
            token = f.maybe_text("next_token")
            if token is None:
                return found
        raise unexpected(command, f"at most {MOST_PAGES} pages", "more")

    def price_increases(self) -> list[PriceIncrease]:
        """Return the higher prices that hosts ask for and that are not answered yet."""
        words = ["show", "pending-price-increases"]
        command = in_words(words)
        answer = parse_json(command, self._cli.run(INCREASES, words, ["--raw"]))
        rows = answer if isinstance(answer, list) else Fields(command, "answer", answer).rows(PENDING)
        return [price_increase_of(Fields(command, "price increase", row)) for row in rows]

    def answer_price_increase(self, instance_id: int, *, accept: bool) -> None:
        """Accept the higher price for an instance, or reject it: then its contract ends as it was agreed."""
        words = ["accept" if accept else "reject", "price-increase", str(instance_id)]
        command = in_words(words)
        answer = parse_json(command, self._cli.run(INCREASES, words, ["--yes", "--raw", "--retry=1"]))
        if Fields(command, "answer", answer).flag("success") is not True:
            raise unexpected(command, "success", "success: false")


PENDING = "pending_price_increases"
