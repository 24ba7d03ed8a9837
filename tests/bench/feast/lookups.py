"""Feast's own look-ups in process: writes the bench's rows, then measures what it is told to on standard input.

usage: lookups.py FOLDER ROWS      FOLDER holds feature_store.yaml and definitions.py; rows.parquet and registry.db are written.
One JSON line when all rows are in the online store. Then for each line `{"entities": N, "seconds": S}` one JSON line with
`count`, `p50_us`, `p99_us` and `cpu_us`, of calls of get_online_features with to_dict, without which nobody has a value. Every
value of every answer is checked, outside of the time that counts. Ends with its input.
"""

import json
import math
import os
import sys
import time
from datetime import datetime, timedelta, timezone

import pandas as pd
from feast import FeatureStore
from feast.version import get_version

WARM_UP_SECONDS = 0.2
US = 1e6


def entity(row):
    return f"example-{row:05}.test"


def value(row, field):
    """Exact in FP32, and another for each row and field."""
    return row + field / 8


def main():
    folder, rows = sys.argv[1], int(sys.argv[2])
    os.chdir(folder)
    sys.path.insert(0, folder)
    import definitions

    fields = definitions.FIELDS
    frame = pd.DataFrame(
        {
            "site_id": [entity(row) for row in range(rows)],
            "event_time": datetime.now(timezone.utc) - timedelta(seconds=1),
            **{
                name: pd.Series([value(row, field) for row in range(rows)], dtype="float32")
                for field, name in enumerate(fields)
            },
        }
    )
    frame.to_parquet("rows.parquet")
    store = FeatureStore(repo_path=folder)
    store.apply([definitions.site, definitions.rows])
    store.write_to_online_store("site", frame)
    features = [f"site:{name}" for name in fields]
    print(json.dumps({"ready": get_version()}), flush=True)

    def look_up(first, entities):
        """One look-up of neighbouring rows; returns seconds and CPU seconds."""
        asked = [{"site_id": entity(row)} for row in range(first, first + entities)]
        cpu, start = time.process_time(), time.perf_counter()
        found = store.get_online_features(features=features, entity_rows=asked).to_dict()
        took, used = time.perf_counter() - start, time.process_time() - cpu
        for field, name in enumerate(fields):
            expected = [value(row, field) for row in range(first, first + entities)]
            if found[name] != expected:
                sys.exit(f"wrong values of {name}: {found[name]} in place of {expected}")
        return took, used

    for line in sys.stdin:
        asked = json.loads(line)
        entities, first = asked["entities"], 0
        times, cpu = [], 0.0
        begin = time.perf_counter() + WARM_UP_SECONDS
        end = begin + asked["seconds"]
        while (now := time.perf_counter()) < end:
            took, used = look_up(first, entities)
            first = (first + entities) % (rows - entities + 1)
            if now >= begin:
                times.append(took)
                cpu += used
        times.sort()

        def quantile(share):
            return times[max(math.ceil(share * len(times)), 1) - 1] * US

        report = {"count": len(times), "p50_us": quantile(0.5), "p99_us": quantile(0.99), "cpu_us": cpu / len(times) * US}
        print(json.dumps(report), flush=True)


main()
