"""The command `destroy-fleet`: end every instance that carries the fleet's label, after asking."""

import logging
import time
from collections.abc import Callable
from dataclasses import replace

from fleet.outside.config import AutoscalerConfig
from fleet.outside.process import AutoscalerProcess
from policies import Fixed
from process.errors import CloudError, ConfigError

log = logging.getLogger("autoscaler")


def destroy_fleet(config: AutoscalerConfig, *, ask: Callable[[str], str] | None) -> None:
    """End every instance that carries the fleet's label, and make sure that none is left.

    ask: asks a person a question and returns the answer; None: do not ask.
    """
    process = AutoscalerProcess(replace(config, manage=False), no_balancers=True, policy=Fixed(0, 0))
    try:
        process.check_account()
        _destroy_fleet(process, ask)
    except KeyboardInterrupt:
        print("\ninterrupted: run destroy-fleet again to be sure that nothing is left", flush=True)
        raise SystemExit(130) from None
    finally:
        process.stop()
        process.close()


def _destroy_fleet(process: AutoscalerProcess, ask: Callable[[str], str] | None) -> None:
    scaler, label = process.scaler, process.config.label
    try:
        rows = process.vast.list_instances(label + "/")
    except CloudError as e:
        raise ConfigError(f"the cloud cannot be used: {e}") from e
    if not rows:
        print(f"nothing is rented with the label {label}/…", flush=True)
    elif ask is not None:
        for r in rows:
            print(f"  {r.id}  {r.label}  {r.gpu_name}  {r.actual_status}  {r.price_now_usd_h:.3f} $/h")
        try:
            answer = ask(f"destroy these {len(rows)} instances and their disks? [y/N] ")
        except EOFError:
            raise ConfigError("destroy-fleet asks before it destroys: answer, or give --yes") from None
        if answer.strip().lower() not in ("y", "yes"):
            print("nothing was destroyed", flush=True)
            return
    with scaler.lock:
        scaler.instances.observe(rows, (), scaler.clock())  # a later listing that lacks them hides none
    shown = ""
    process.start()
    while True:
        scaler.destroy("destroy-fleet")
        with scaler.lock:
            left = [f"{i.id or 'ordered'} {i.state}" for i in scaler.instances]
        if not left and _lists_none(process):
            print(f"destroyed: {len(rows)} instances; the listing shows none any more", flush=True)
            return
        line = f"{len(left)} left: {', '.join(left)}"
        if left and line != shown:
            print(line, flush=True)
            shown = line
        time.sleep(0.5)


def _lists_none(process: AutoscalerProcess) -> bool:
    """Return whether the cloud lists no instance of the fleet any more; False when it cannot be asked."""
    try:
        return not process.vast.list_instances(process.config.label + "/")
    except CloudError as e:
        log.warning("is anything left? %s", e)
        return False
