"""Charges an account exactly once, whatever dies on the way: this program, oncegate, or the API.

python -m config.payments-postgres.client jobs.db add acct_1 2000
python -m config.payments-postgres.client jobs.db run http://127.0.0.1:8080
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
        "Authorization": "Bearer sk_test",  # of the client; the same for every try
        "Idempotency-Key": job.key,
    }
    return send(f"{base_url}/v1/charges", job.body, headers, patience)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m config.payments-postgres.client")
    parser.add_argument("jobs", help="the file of jobs")
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser("add", help="order a charge")
    add.add_argument("account")
    add.add_argument("amount", type=int)
    commands.add_parser("run", help="carry out what is open").add_argument("base_url")
    asked = parser.parse_args()
    jobs = Jobs(asked.jobs)
    if asked.command == "add":
        print(jobs.add(json.dumps({"account": asked.account, "amount": asked.amount}).encode()))
        return 0
    return work(jobs, LONGEST_S, lambda job: charge(asked.base_url, job, Patience()))


if __name__ == "__main__":
    sys.exit(main())
