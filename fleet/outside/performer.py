"""Sends the autoscaler's commands to the cloud."""

import logging
import re
from collections.abc import Callable
from dataclasses import replace

from engine.profile import Profile
from fleet.commands import (
    AccountFault,
    AskPage,
    Command,
    Create,
    Destroy,
    LookForOffers,
    Performed,
    Reply,
    Start,
    Stop,
)
from fleet.outside import start_script
from process.errors import CloudError, ConfigError
from vast.account_secrets import RegistryLogin
from vast.client import Vast
from vast.errors import ApiError, CloudAuthError, NoSuchInstance, OfferGone, RateLimited

log = logging.getLogger("autoscaler")

# --- outside world ---------------------------------------------------------------------------------


class Performer:
    """Sends commands through the vastai CLI, one at a time, and says how each went; decides nothing."""

    def __init__(
        self,
        vast: Vast,
        profile: Profile,
        master_token: Callable[[str], str],
        ready_url: str | None = None,
        query: str = "",
        ssh_public_key: str = "",
        login: RegistryLogin | None = None,
    ) -> None:
        """Prepare to send commands. master_token: a function from an instance's label to its master token.

        ready_url: the URL at which an instance reports that it is ready. query: the search for
        offers; empty: the profile's own. ssh_public_key: instances accept it. login: to the registry of the
        image.
        """
        self._ready_url = ready_url
        self._query = query or profile.offer_query()
        self._ssh_public_key = ssh_public_key
        self._login = login
        self._vast = vast
        self._profile = profile
        self._master_token = master_token

    def perform(self, command: Command) -> Performed:
        """Send a command to the cloud; return what became of it, and never raise for the cloud's sake.

        A clear refusal is REFUSED; an answer that may hide an effect is UNKNOWN.
        """
        try:
            return self._ask(command)
        except OfferGone as e:
            # With one attempt per create (vast.py) this is a plain answer; the label would show it if not.
            return Performed(Reply.REFUSED, str(e), offer_gone=True)
        except RateLimited as e:
            return Performed(Reply.REFUSED, str(e))
        except CloudAuthError as e:
            return Performed(Reply.REFUSED, str(e), refusal=refusal_of(e))
        except NoSuchInstance as e:
            reply = Reply.DONE if isinstance(command, Destroy) else Reply.REFUSED
            return Performed(reply, str(e), absent=True)
        except ApiError as e:
            # 200 is `success: false`: the service itself says that nothing was done.
            refused = e.status == 200 or (400 <= e.status < 500 and e.status != 408)
            if not refused:
                return Performed(Reply.UNKNOWN, str(e))
            return Performed(Reply.REFUSED, str(e), refusal=refusal_of(e))
        except CloudError as e:
            return Performed(Reply.UNKNOWN, str(e))
        except (ValueError, ConfigError) as e:
            # vast.py and the start script refuse what cannot be sent before anything is.
            return Performed(Reply.REFUSED, f"not sent: {e}")

    def _ask(self, command: Command) -> Performed:
        p = self._profile
        if isinstance(command, Create):
            master = self._master_token(command.label)
            there = replace(p, env=p.env_on(command.offer.gpu_name, command.offer.num_gpus))
            start = start_script.render(there, master, self._ready_url, self._ssh_public_key)
            new_id = self._vast.create(
                command.offer.id,
                image=p.image.name,
                disk_gb=p.disk_gb,
                label=command.label,
                env=start.env,
                onstart=start.onstart,
                login=self._login,
            )
            self._attach_key(new_id)
            return Performed(Reply.DONE, new_id=new_id)
        if isinstance(command, Start):
            self._vast.start(command.id)
        elif isinstance(command, Stop):
            self._vast.stop(command.id)
        elif isinstance(command, Destroy):
            self._vast.destroy(command.id)
        elif isinstance(command, LookForOffers):
            offers = self._vast.search_offers(self._query, storage_gb=p.disk_gb)
            return Performed(Reply.DONE, offers=tuple(offers))
        elif isinstance(command, AskPage):
            return Performed(Reply.DONE, row=self._vast.show_instance(command.id))
        return Performed(Reply.DONE)

    def _attach_key(self, new_id: int) -> None:
        """Have a new instance accept the fleet's ssh key; without that its start script does it, later."""
        try:
            if self._ssh_public_key:
                self._vast.attach_ssh_key(new_id, self._ssh_public_key)
        except (CloudError, ValueError) as e:
            log.warning("%d: the ssh key could not be attached: %s", new_id, e)


def refusal_of(e: ApiError) -> AccountFault | None:
    """Return what the cloud holds against the account, by its words and status; None: nothing, or not known.

    Sources: docs/reference/vast-contract.md 1.2 and 2.2, and docs.vast.ai/api-reference/permissions.
    """
    words = e.msg.lower()
    if "spend_rate_limit" in words or "spend rate" in words:
        return AccountFault.SPEND_LIMIT
    if "credit" in words:
        return AccountFault.CREDIT
    if "permission" in words or (e.status == 403 and "not your own" not in words):
        return AccountFault.SCOPE
    if isinstance(e, CloudAuthError):
        return AccountFault.KEY
    if e.status in (400, 404) and re.search(r"\b(image|template)", words):
        return AccountFault.IMAGE
    return None
