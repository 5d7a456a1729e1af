"""Exemplars: beside a metric, the newest traced request that it counted, which leads from a graph to a trace."""

import time
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from prometheus_client.core import Metric
from prometheus_client.samples import Exemplar, Sample

from oncegate.observe.families import BOUNDS, BUCKETS_S, SEPARATOR
from oncegate.observe.outcome import RequestReport


class Exemplars:
    """The newest traced request of each sample that has one: each bucket of its time, its outcome, its settlement."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        # By sample: the trace's id, the value that was observed, and when (seconds since 1970).
        self._newest: dict[str, Sequence[Any]] = {}

    def add(self, trace_id: str, report: RequestReport, seconds: float) -> None:
        """Take a request that is traced."""
        counted, now_s = (trace_id, 1.0, self._clock()), self._clock()
        self._newest[_key("request_seconds_bucket", BOUNDS[bisect_left(BUCKETS_S, seconds)])] = trace_id, seconds, now_s
        self._newest[_key("requests_total", report.outcome.label)] = counted
        for settlement in report.settlements:
            self._newest[_key("settled_total", settlement.label)] = counted

    def snapshot(self) -> dict[str, Any]:
        """Return what there is, for `merge` in another process."""
        return dict(self._newest)

    def merge(self, snapshot: Mapping[str, Sequence[Any]]) -> None:
        """Take those of another process that are newer."""
        for sample, newest in snapshot.items():
            if sample not in self._newest or self._newest[sample][2] < newest[2]:
                self._newest[sample] = newest

    def added_to(self, family: Metric) -> Metric:
        """Return a family whose samples have their exemplars. Only the format of OpenMetrics shows them."""
        if not self._newest:
            return family
        family.samples = [self._with_exemplar(sample) for sample in family.samples]
        return family

    def _with_exemplar(self, sample: Sample) -> Sample:
        found = self._newest.get(SEPARATOR.join((sample.name, *sample.labels.values())))
        if found is None:
            return sample
        trace_id, value, when_s = found
        return sample._replace(exemplar=Exemplar({"trace_id": trace_id}, value, when_s))


def _key(name: str, label: str) -> str:
    return f"oncegate_{name}{SEPARATOR}{label}"
