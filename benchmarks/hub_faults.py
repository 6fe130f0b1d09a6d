"""Count the faults injected into publications, and how each ended; prints the table of docs/benchmarks/hub_faults.md.

    python benchmarks/hub_faults.py

The real clients publish to the Hub of tests/loopback_hub.py, once for every request of a publication and every kind of
fault, to a new repository and to an existing one. The same call afterwards has completed every untouched one.
"""

import sys
import tempfile
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "hub"))

from hub_client import PUBLISHER, QUIET, HubClient, check_that_tokens_stayed_secret
from loopback_hub import LoopbackHub
from test_hub_faults import MAIN, PASSING, REFUSING, SILENT, Tally, short_patience, sweep


def main() -> None:
    with LoopbackHub() as hub, tempfile.TemporaryDirectory() as home:
        hub.add_user(MAIN, "ada")
        with HubClient(hub, Path(home), MAIN, HF_DEBUG="1", **QUIET) as client:
            client.run(PUBLISHER, shared=True)
            tallies = sweep(hub, client, PASSING + REFUSING, every_kind=True)
            with short_patience(client, 5.0):
                tallies |= sweep(hub, client, SILENT, every_kind=True)
            check_that_tokens_stayed_secret(hub, client)
    print("| fault | times | ended complete | untouched, complete when repeated |\n|---|---:|---:|---:|")
    total = Tally()
    for label, tally in tallies.items():
        print(f"| {label} | {tally.complete + tally.untouched} | {tally.complete} | {tally.untouched} |")
        total = Tally(total.complete + tally.complete, total.untouched + tally.untouched)
    print(f"| all | {total.complete + total.untouched} | {total.complete} | {total.untouched} |")


if __name__ == "__main__":
    main()
