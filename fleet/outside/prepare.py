"""The command `prepare`: rent instances, have them load the model, stop them."""

import contextlib
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import replace

from fleet.holds import Hold, HoldKind
from fleet.outside.config import AutoscalerConfig
from fleet.outside.process import AutoscalerProcess
from fleet.states import GIVEN_UP, State
from fleet_client.flags import within
from policies import Fixed
from process.errors import ConfigError
from process.progress import in_words

LEFT_S = 60.0
"""Steps in which the time left is told, seconds: a line of progress is printed when it has changed."""

LOOK_EVERY_S = 0.5
"""Seconds between two looks at the progress."""


Listening = Callable[[AutoscalerProcess], AbstractContextManager[None]]


def prepare(config: AutoscalerConfig, count: int, listening: Listening | None = None) -> None:
    """Rent count instances, wait until each has loaded the model, stop them. Progress goes to stdout.

    It is the ordinary loop with a policy that wants them in all but not hot. Instances that an interrupted
    run left half done count among the new ones, however far they come before the first look. Ctrl-C says what
    is still rented; all of it is labelled. listening: a context in which instances that say that they are
    ready are heard, where they send it.
    """
    within("--count", count, 1, config.max_instances)
    process = AutoscalerProcess(replace(config, manage=True), no_balancers=True, policy=Fixed(0, 0))
    try:
        process.check_account()
        if refused := process.check_beforehand():
            raise ConfigError("; ".join(refused))
        process.scaler.instances.set_manage(False)  # until it is known what is there
        half_done = frozenset(i.label for i in process.scaler.instances if not i.loaded)
        process.start()
        process.start_health_checks()
        with contextlib.nullcontext() if listening is None else listening(process):
            _wait(process, *_set_target(process, count, half_done))
    except KeyboardInterrupt:
        print("\ninterrupted: waiting for the order under way", flush=True)
        process.stop()
        with process.scaler.lock:
            rented = [f"{i.id or 'ordered'} ({i.label}) {i.state}" for i in process.scaler.instances]
        print(f"Still rented, all labelled {config.label}/…: {', '.join(rented) or 'nothing'}")
        print(
            "`python autoscaler_server.py destroy-fleet` ends them; `prepare` or an autoscaler goes on.",
            flush=True,
        )
        raise SystemExit(130) from None
    finally:
        process.stop()
        process.close()


def _set_target(process: AutoscalerProcess, count: int, half_done: frozenset[str]) -> tuple[int, int]:
    """Let the autoscaler load count more, once the fleet is known; return (loaded in the end, staying hot).

    half_done: labels of instances that count among the new ones, even where they are hot by now. Every other
    instance that is hot stays hot, and what is loaded stays loaded. Raises ConfigError when that is too many.
    """
    scaler, fleet = process.scaler, process.scaler.instances
    while True:
        time.sleep(LOOK_EVERY_S)
        with scaler.lock:
            if not fleet.knows_hot_set():
                continue
            seen = fleet.snapshot(scaler.demand, scaler.clock())
            prepared = [i for i in fleet if i.loaded and i.state not in GIVEN_UP and i.label not in half_done]
            loaded, hot = len(prepared), sum(i.state is State.HOT for i in prepared)
            wanted, most = loaded + count, fleet.limits.max_instances
            if wanted > most:
                raise ConfigError(
                    f"--count {count}: {loaded} are loaded already, and --max-instances is {most}"
                )
            scaler.set_policy(Fixed(hot, max(wanted, seen.total)))
            fleet.set_manage(True)
            return wanted, hot


def _lasting(holds: Iterable[Hold], now: float) -> Hold | None:
    """Return what a person has to mend before anything can be prepared; None: nothing of that kind."""
    of_person = (HoldKind.DEPLOYMENT, HoldKind.REFUSED)
    return next((h for h in holds if h.kind in of_person and h.trial_at > now), None)


def _wait(process: AutoscalerProcess, wanted: int, kept_hot: int) -> None:
    """Print the progress until `wanted` instances are loaded, of which kept_hot stay hot."""
    scaler, shown = process.scaler, ""
    begun = time.monotonic()
    while True:
        with scaler.lock:
            states = Counter(i.state for i in scaler.instances)
            cold = sum(i.state is State.COLD and i.loaded for i in scaler.instances)
            notes = scaler.decisions[-1].notes if scaler.decisions else ()
            if not states and (hold := _lasting(scaler.instances.holds, scaler.clock())):
                raise ConfigError(hold.note)
            left_s = scaler.instances.durations.load_s - (time.monotonic() - begun)
        # A new one is hot for a moment before it is stopped: it is not ready before that.
        ready = cold + min(kept_hot, states[State.HOT])
        line = ", ".join(f"{n} {state}" for state, n in sorted(states.items())) or "nothing rented yet"
        line = f"prepared {min(ready, wanted)} of {wanted}: {line}" + "".join(f" ({n})" for n in notes)
        if ready < wanted and left_s > LEFT_S:  # they load beside each other
            line += f", about {in_words(LEFT_S * math.ceil(left_s / LEFT_S))} left"
        if line != shown:
            print(line, flush=True)
            shown = line
        if ready >= wanted:
            print(f"{cold} instances are stopped with {process.config.model} on their disks.", flush=True)
            return
        time.sleep(LOOK_EVERY_S)
