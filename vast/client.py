"""Vast.ai as typed calls: what is for rent, what we have, and what can be done with it.

Each method is one command of the vastai CLI (vast/cli.py runs it and raises what the run shows) and one
reading of what it printed. A command counts as done only when its own words say so: the JSON that it
prints on success, or for those that ignore `--raw` the exact sentence (vast-contract 2). A listing is
returned whole or not at all: `{}`, or fewer rows than it claims to have, raises.

Every change is sent once: the CLI's own retry would turn a lost reply into a refusal. So RateLimited,
CloudAuthError and the other 4xx mean that nothing was done. After CloudTimeout, TransportError,
ProtocolError or a 5xx it may have been done, and only the listing tells.
"""

import logging
import re
from collections.abc import Collection

from process.errors import ConfigError
from vast.account_secrets import RegistryLogin
from vast.cli import (
    ACCOUNT,
    ATTACH,
    CHANGE,
    CREATE,
    DESTROY,
    LISTING,
    LOGS,
    ONCE,
    SEARCH,
    SHOW,
    SSH_KEYS,
    Cli,
    Endpoint,
    api_error,
    in_words,
)
from vast.errors import CloudAuthError, NoSuchInstance, ProtocolError, short, unexpected
from vast.rows import (
    PAGE_ROWS,
    Fields,
    Offer,
    Row,
    has_label_prefix,
    offer_of,
    parse_json,
    parse_list,
    row_of,
)

log = logging.getLogger("vast")

ONSTART_LIMIT_BYTES = (
    4_000  # strictest documented: 4,048 with args, longer ones never start (vast-contract 9)
)
ENV_LIMIT = 30_000  # characters of --env; documented for all variables: 32,768 (vast-contract 9)
ENV_ENTRIES = 256  # variables and ports; vast-contract 9
LABEL_LIMIT = 256  # at create; vast-contract 2.2
PORTS_LIMIT = 64  # -p options of one instance; vast-contract 2.2
MOST_OFFERS = (
    256  # of a search, the best by the service's score per dollar: the cheapest alone are slow cards
)
LISTING_TIMEOUT_S = 60.0  # of a listing of many pages
LOGS_TIMEOUT_S = 30.0  # vast-contract 3


# --- what is refused before it is sent -------------------------------------------------------------

# What parse_env of the CLI keeps; it drops all else without a word (vast-contract 2.2). Quotes inside a
# value are refused too, because it strips them at the ends.
_ENV_OPTION = re.compile(
    r"""-e\ [A-Za-z_][A-Za-z0-9_]*=(?:[^\s"']*|"[^"'\n]*"|'[^"'\n]*')(?=\ |\Z)
      | -p\ (?P<ports>\d{1,5}:\d{1,5}(?:/tcp|/udp)?)(?=\ |\Z)
      | -h\ [A-Za-z0-9.-]+(?=\ |\Z)
      | -v\ [A-Za-z0-9:./_]+(?=\ |\Z)
      | -n\ [a-z0-9-]+(?=\ |\Z)""",
    re.VERBOSE,
)


def check_env(env: str) -> None:
    """Raise ValueError when the vastai command would drop or change a part of these `--env` options.

    The error shows no value.
    """
    if len(env) > ENV_LIMIT:
        raise ValueError(f"env: at most {ENV_LIMIT} characters, got {len(env)}")
    at, ports, entries = 0, 0, 0
    while at < len(env):
        option = _ENV_OPTION.match(env, at)
        if option is None:
            raise ValueError(
                f"env, character {at + 1} of {len(env)}: expected -e NAME=VALUE, -p PORT:PORT, -h, -v or -n, "
                "with single spaces between; vastai would drop what is there without a word"
            )
        ports += option["ports"] is not None
        entries += 1
        at = option.end() + 1
    if env.endswith(" "):
        raise ValueError("env ends with a space")
    if ports > PORTS_LIMIT:
        raise ValueError(f"env: at most {PORTS_LIMIT} ports, got {ports}")
    if entries > ENV_ENTRIES:
        raise ValueError(f"env: at most {ENV_ENTRIES} entries, got {entries}")


def _check_label(label: str) -> None:
    """Raise ValueError for an instance label that the vastai command could not take as one argument."""
    if not re.fullmatch(r"[A-Za-z0-9_][!-~]*", label) or len(label) > LABEL_LIMIT:
        raise ValueError(
            f"label {label!r}: expected 1 to {LABEL_LIMIT} printable characters without spaces, "
            "the first a letter, a digit or _"
        )


# --- outside world ---------------------------------------------------------------------------------


class Vast:
    """The account at Vast.ai. Safe to use from several threads; every method runs the vastai command."""

    def __init__(self, cli: Cli) -> None:
        """Make a client of the account that runs its calls by `cli`; nothing is asked yet."""
        self._cli = cli

    def search_offers(
        self,
        query: str,
        storage_gb: float,
        order: str = "dlperf_per_dphtotal-",
        limit: int = MOST_OFFERS,
        exclude_machines: Collection[int] = (),
    ) -> list[Offer]:
        """Return the machines for rent, on demand, that fit the query (vast-contract 2.1), sorted by `order`.

        An offer's price, dph_total, includes storage_gb. limit: the most offers. An offer that lacks a price
        or a name is left out; when all do, ProtocolError.
        """
        words = ["search", "offers"]
        command = in_words(words)
        if exclude_machines:
            query += f" machine_id notin [{','.join(str(m) for m in sorted(exclude_machines))}]"
        flags = ["--type=on-demand", f"--storage={storage_gb:g}", f"--order={order}", f"--limit={limit}"]
        answer = parse_list(command, "offers", self._cli.run(SEARCH, words, [query, *flags, "--raw"]))
        offers: list[Offer] = []
        flaw: ProtocolError | None = None
        for data in answer:
            try:
                offers.append(offer_of(Fields(command, "offer", data)))
            except ProtocolError as e:
                flaw = e
        if flaw is not None:
            if not offers:
                raise flaw
            log.warning("%d of %d offers left out: %s", len(answer) - len(offers), len(answer), flaw)
        return [o for o in offers if o.machine_id not in exclude_machines]

    def create(
        self,
        offer_id: int,
        image: str,
        disk_gb: float,
        label: str,
        env: str,
        onstart: str,
        price_usd_h: float | None = None,
        login: RegistryLogin | None = None,
    ) -> int:
        """Rent an offered machine as a new instance; return the instance's id.

        The order is sent once: after any failure the listing must be searched for the label. env: see
        check_env. onstart: the start script's text. price_usd_h: a bid per machine, which makes it
        interruptible. login: to the registry of the image. Raises ValueError before anything is sent, and
        OfferGone.
        """
        check_env(env)
        _check_label(label)
        size = len(onstart.encode())
        if size > ONSTART_LIMIT_BYTES:
            raise ValueError(f"onstart: at most {ONSTART_LIMIT_BYTES} bytes, got {size}")
        words = ["create", "instance", str(offer_id)]
        command = in_words(words)
        flags = [f"--image={image}", f"--disk={disk_gb:g}", f"--label={label}", f"--env={env}"]
        # Without --cancel-unavail a lost race leaves a stopped instance that bills (vast-contract 2.2).
        flags += ["--ssh", "--direct", "--cancel-unavail", "--raw", ONCE]
        if price_usd_h is not None:
            flags.append(f"--bid_price={price_usd_h:g}")
        secrets: tuple[str, ...] = ()
        if login is not None:
            flags.append(f"--login={login.words}")
            secrets = (login.password,)
        printed = self._cli.run(CREATE, words, flags, script=onstart, secrets=secrets)
        answer = Fields(command, "answer", parse_json(command, printed))
        if answer.flag("success") is False:
            msg = answer.maybe_text("msg") or answer.maybe_text("error") or "no message"
            raise api_error(command, CREATE, 200, msg)
        return answer.whole("new_contract")

    def list_instances(self, label_prefix: str | None = None) -> list[Row]:
        """Return every instance of the account whose label has that prefix (None: every one), or CloudError.

        No part of a list is ever returned. The labels are compared here: a filter at the service would hide a
        row that it misreads, and its silence would look like an instance that is gone.
        """
        words = ["show", "instances"]
        command = in_words(words)
        page, total, more = self._first_page(words)
        if more:
            # The interval of this endpoint is 1 s and the CLI pauses only before a retry: with 6 attempts
            # these pauses add up to 2 s, so that the second page and the next outlast it.
            printed = self._cli.run(LISTING, words, ["--raw", "--retry=6"], timeout_s=LISTING_TIMEOUT_S)
            page = parse_list(command, "instances", printed)
            if len(page) < total:
                _, total, _ = self._first_page(words)  # one may have been destroyed between the two
        listed: dict[int, Fields] = {}
        flaw: ProtocolError | None = None
        left_out = 0
        for data in page:
            try:
                f = Fields(command, "instance", data)
                listed[f.whole("id")] = f
            except ProtocolError as e:
                flaw, left_out = e, left_out + 1
        if flaw is not None:
            if not listed:
                raise flaw
            # An instance of ours that is not in what is left is asked for by its own page.
            log.warning("%d of %d rows left out: %s", left_out, len(page), flaw)
        if len(listed) + left_out < total:
            raise unexpected(command, f"the {total} instances that it claims", f"{len(listed)}")
        return [row_of(f) for f in listed.values() if has_label_prefix(f, label_prefix)]

    def show_instance(self, instance_id: int) -> Row | None:
        """Return what the service says of one instance; None when it says that there is no such instance.

        Anything but a clear answer raises CloudError: on its word an instance is gone (vast-contract 2.4).
        """
        words = ["show", "instance", str(instance_id)]
        command = in_words(words)
        try:
            answer = Fields(command, "page", parse_json(command, self._cli.run(SHOW, words, ["--raw"])))
        except NoSuchInstance:
            return None
        if answer.is_null("instances"):
            return None
        if answer.maybe_whole("id") != instance_id:
            raise unexpected(command, f"the page of {instance_id}", "another, or none")
        return row_of(answer)

    def _first_page(self, words: list[str]) -> tuple[list[object], int, bool]:
        """Return the first page of the listing: (rows, how many there are in all, whether more follow).

        With --limit the CLI shows the service's own envelope. Without, an outage that answers `{}` prints
        `[]`, which looks like an account without instances (vast-contract 1.1).
        """
        command = in_words(words)
        printed = self._cli.run(LISTING, words, ["--raw", f"--limit={PAGE_ROWS}"])
        f = Fields(command, "listing", parse_json(command, printed))
        if f.flag("success") is False:
            raise unexpected(command, "success", f"success: false {short(f.maybe_text('msg') or '')!r}")
        rows = f.rows("instances")
        on_page = f.maybe_whole("instances_found")
        if on_page is not None and len(rows) < on_page:
            raise unexpected(command, f"the {on_page} rows that the page claims", f"{len(rows)}")
        return rows, f.whole("total_instances"), f.maybe_text("next_token") is not None

    def start(self, instance_id: int) -> None:
        """Ask the service to run a stopped instance.

        The instance may wait for its GPU for ever: only the listing tells.
        """
        self._say(CHANGE, ["start", "instance", str(instance_id)], f"starting instance {instance_id}.")

    def stop(self, instance_id: int) -> None:
        """Ask the service to stop an instance. It keeps the instance's disk, and bills it."""
        self._say(CHANGE, ["stop", "instance", str(instance_id)], f"stopping instance {instance_id}.")

    def label(self, instance_id: int, label: str) -> None:
        """Change the label of an instance."""
        _check_label(label)
        words = ["label", "instance", str(instance_id)]
        self._say(CHANGE, words, f"label for {instance_id} set to {label}.", [label])

    def destroy(self, instance_id: int) -> None:
        """Ask the service to delete an instance and its data; one that is gone already is no error.

        Only the listing proves that it is gone. Without --raw, with which nothing is printed whatever
        happened; with -y, without which nothing is destroyed and the exit status is 0 (vast-contract 0, rows
        3 and 4).
        """
        words = ["destroy", "instance", str(instance_id)]
        try:
            self._say(DESTROY, words, f"destroying instance {instance_id}.", ["-y"], raw=False)
        except NoSuchInstance:
            log.debug("instance %d was gone before it was destroyed", instance_id)

    def _say(
        self,
        endpoint: Endpoint,
        words: list[str],
        sentence: str,
        flags: Collection[str] = (),
        *,
        raw: bool = True,
    ) -> None:
        """Run a vastai command that prints exactly `sentence` once it is done, else raise ProtocolError.

        raw: pass --raw, so that errors are JSON.
        """
        stdout = self._cli.run(endpoint, words, [*flags, ONCE, *(["--raw"] if raw else [])])
        if stdout.strip() != sentence:
            got = repr(short(stdout)) if stdout.strip() else "nothing"
            raise unexpected(in_words(words), repr(sentence), got)

    def logs(self, instance_id: int, tail: int = 100) -> str:
        """Return the last `tail` lines of the log of an instance's container.

        That takes 1 to 10 s; CloudTimeout when the service did not get the log.
        """
        words = ["logs", str(instance_id)]
        flags = [f"--tail={tail}", "--raw"]
        stdout = self._cli.run(LOGS, words, flags, timeout_s=LOGS_TIMEOUT_S)
        if not stdout:
            raise unexpected(in_words(words), "a log, or at least an empty line", "nothing")
        return stdout.removesuffix("\n")

    def credit(self) -> float:
        """Return the dollars left in the account; at 0 and below the service stops every instance."""
        words = ["show", "user"]
        answer = parse_json(in_words(words), self._cli.run(ACCOUNT, words, ["--raw"]))
        return Fields(in_words(words), "account", answer).number("credit")

    def check_key(self) -> None:
        """Raise ConfigError when the service refuses the API key, CloudError when it cannot be asked now."""
        try:
            self.credit()
        except CloudAuthError as e:
            raise ConfigError(f"the cloud refuses the API key: {e}") from e

    def attach_ssh_key(self, instance_id: int, public_key: str) -> None:
        """Have an instance accept an ssh public key; some hosts never take those of the account."""
        words = ["attach", "ssh", str(instance_id)]
        said = self._cli.run(ATTACH, words, [" ".join(public_key.split()), ONCE])
        if "'success': True" not in said:  # it prints a Python dict (vast-contract 2.9)
            raise unexpected(in_words(words), "{'success': True, …}", short(said))

    def register_ssh_key(self, public_key: str) -> None:
        """Add an ssh public key to the account unless it has it: instances created from now on accept it."""
        parts = public_key.split()
        if len(parts) < 2 or not parts[0].startswith(("ssh-", "ecdsa-", "sk-")) or "\n" in public_key.strip():
            raise ValueError("expected one line of an ssh public key: TYPE BASE64 COMMENT")
        words = ["show", "ssh-keys"]
        for data in parse_list(in_words(words), "keys", self._cli.run(SSH_KEYS, words, ["--raw"])):
            f = Fields(in_words(words), "key", data)
            # Documented as `key` in the listing and as `public_key` in the answer to a create.
            known = (f.maybe_text("key") or f.maybe_text("public_key") or "").split()
            if known[:2] == parts[:2] and f.maybe_text("deleted_at") is None:
                return
        words = ["create", "ssh-key"]
        # Never without the argument: it would replace the user's own key (vast-contract 2.9).
        stdout = self._cli.run(SSH_KEYS, words, [" ".join(parts), ONCE])
        if not re.search(r"^ssh-key created .*'success': True", stdout, re.MULTILINE):
            raise unexpected(in_words(words), "'ssh-key created … success'", repr(short(stdout)))
