"""Charges a card once, whatever the network does and however often this program dies.

python -m config.payments.client jobs.db add 2000
python -m config.payments.client jobs.db run http://127.0.0.1:8080
"""

import argparse
import json
import sys

from config.clients.jobs import Job, Jobs, work
from config.clients.sending import Patience, Result, send

LONGEST_S = 20 * 3600  # shorter than the retention of the rule, 24 h


def charge(base_url: str, job: Job, patience: Patience) -> Result:
    """Send a job's order under the job's key."""
    headers = {
        "Content-Type": "application/json",
        "Authorization": "Bearer sk_test",  # of the account; the same for every try
        "Idempotency-Key": job.key,
    }
    return send(f"{base_url}/v1/charges", job.body, headers, patience)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m config.payments.client")
    parser.add_argument("jobs", help="the file of jobs")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("add", help="order a charge").add_argument("amount", type=int)
    run = commands.add_parser("run", help="carry out what is open")
    run.add_argument("base_url")
    run.add_argument("--timeout", type=float, default=10.0, metavar="S", help="patience of one try")
    asked = parser.parse_args()
    jobs = Jobs(asked.jobs)
    if asked.command == "add":
        print(jobs.add(json.dumps({"amount": asked.amount, "currency": "eur"}).encode()))
        return 0
    patience = Patience(timeout_s=asked.timeout)
    return work(jobs, LONGEST_S, lambda job: charge(asked.base_url, job, patience))


if __name__ == "__main__":
    sys.exit(main())
