"""The command `prepare`: rent instances, load the model, stop them."""

import time
from dataclasses import replace

from fleet.outside.config import AutoscalerConfig
from fleet.outside.process import AutoscalerProcess
from fleet.states import State
from fleet_client.flags import within
from policies import Fixed
from process.errors import ConfigError

GIVEN_UP = frozenset({State.FAILED, State.DESTROYING})


def prepare(config: AutoscalerConfig, count: int) -> None:
    """Rent count instances, wait until each has loaded the model, stop them. Progress goes to stdout.

    It is the ordinary loop with a policy that wants them in all but not hot. Instances that an interrupted
    run left half done count among the new ones. Ctrl-C says what is still rented; all of it is labelled.
    """
    within("--count", count, 1, config.max_instances)
    process = AutoscalerProcess(replace(config, manage=True), no_balancers=True, policy=Fixed(0, 0))
    try:
        process.check_account()
        process.scaler.instances.set_manage(False)  # until it is known what is there
        process.start()
        process.start_health_checks()
        _prepare(process, count)
    except KeyboardInterrupt:
        print("\ninterrupted: waiting for the order under way", flush=True)
        process.stop()
        fleet = process.scaler.instances
        with process.scaler.lock:
            rented = [f"{i.id or 'ordered'} ({i.label}) {i.state}" for i in fleet]
        print(f"Still rented, all labelled {config.label}/…: {', '.join(rented) or 'nothing'}")
        print(
            "`python autoscaler_server.py destroy-fleet` ends them; `prepare` or an autoscaler goes on.",
            flush=True,
        )
        raise SystemExit(130) from None
    finally:
        process.stop()
        process.close()


def _prepare(process: AutoscalerProcess, count: int) -> None:
    fleet = process.scaler.instances
    wanted = kept_hot = 0
    shown = ""
    while True:
        time.sleep(0.5)
        with process.scaler.lock:
            if not fleet.knows_hot_set():
                continue
            seen = fleet.snapshot(process.scaler.demand, process.scaler.clock())
            if not wanted:
                # What is hot already stays hot, what is loaded stays loaded.
                loaded = sum(i.loaded and i.state not in GIVEN_UP for i in fleet)
                wanted, kept_hot = loaded + count, seen.hot
                if wanted > fleet.limits.max_instances:
                    raise ConfigError(
                        f"--count {count}: {loaded} are loaded already, and --max-instances is "
                        f"{fleet.limits.max_instances}"
                    )
                process.scaler.set_policy(Fixed(kept_hot, max(wanted, seen.total)))
                fleet.set_manage(True)
            states: dict[str, int] = {}
            for i in fleet:
                states[i.state] = states.get(i.state, 0) + 1
            notes = process.scaler.decisions[-1].notes if process.scaler.decisions else ()
            cold = sum(i.state is State.COLD and i.loaded for i in fleet)
            # A new one is hot for a moment before it is stopped: it is not ready before that.
            ready = cold + min(kept_hot, seen.hot)
        line = ", ".join(f"{n} {state}" for state, n in sorted(states.items())) or "nothing rented yet"
        line = f"prepared {min(ready, wanted)} of {wanted}: {line}" + "".join(f" ({n})" for n in notes)
        if line != shown:
            print(line, flush=True)
            shown = line
        if ready >= wanted:
            print(f"{cold} instances are stopped with {process.config.model} on their disks.", flush=True)
            return
