"""What Feast serves in the bench: the group of tests/src/bench/sidecar/lookup.rs, field by field."""

from datetime import timedelta

from feast import Entity, FeatureView, Field, FileSource, ValueType
from feast.types import Float32

FIELDS = [f"f{field}" for field in range(8)]

site = Entity(name="site", join_keys=["site_id"], value_type=ValueType.STRING)

rows = FeatureView(
    name="site",
    entities=[site],
    ttl=timedelta(hours=24),
    schema=[Field(name=name, dtype=Float32) for name in FIELDS],
    source=FileSource(path="rows.parquet", timestamp_field="event_time"),
)
