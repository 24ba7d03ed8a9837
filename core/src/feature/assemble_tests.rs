use std::sync::Arc;
use std::time::Duration;

use super::*;
use crate::inference::Datatype;
use crate::resource::{Consistency, FieldDefinition, FieldValue, Scope, TensorSpec};

fn name(text: &str) -> Name {
    Name::parse(text).unwrap()
}

fn group(fields: &[(&str, Option<f64>)]) -> FeatureGroup {
    let field = |(field, default): &(&str, Option<f64>)| FieldDefinition {
        name: name(field),
        datatype: Datatype::Fp32,
        default: default.map(FieldValue::Float),
    };
    FeatureGroup {
        scope: Scope::Shared,
        schema_version: 1,
        fields: fields.iter().map(field).collect(),
        fresh_for: Duration::from_secs(60),
        retain_for: Duration::from_secs(60),
        consistency: Consistency::LocalOne,
    }
}

fn input(features: &[(&str, &str)]) -> InputBinding {
    let features: Vec<_> =
        features.iter().map(|(group, field)| FeatureRef { group: name(group), field: name(field) }).collect();
    let shape = vec![-1, i64::try_from(features.len()).unwrap()];
    InputBinding { tensor: TensorSpec { name: "x".into(), datatype: Datatype::Fp32, shape }, features }
}

fn row(layout: &Layout, event_us: i64, values: [Option<f64>; 2]) -> Row {
    layout.encode(event_us, &values.map(|value| value.map(FieldValue::Float))).unwrap()
}

fn floats(tensor: &[u8]) -> Vec<f32> {
    tensor.chunks_exact(4).map(|bytes| f32::from_le_bytes(bytes.try_into().unwrap())).collect()
}

struct Fixture {
    groups: [FeatureGroup; 2],
    layouts: [Arc<Layout>; 2],
    names: [Name; 2],
}

impl Fixture {
    fn new() -> Self {
        let groups =
            [group(&[("age", Some(-1.0)), ("size", None)]), group(&[("hits", Some(9.5)), ("rank", Some(0.0))])];
        let layouts = [0, 1].map(|index| Arc::new(Layout::of(&groups[index])));
        Self { groups, layouts, names: [name("site"), name("page")] }
    }

    fn gather(&self, features: &[(&str, &str)]) -> Option<Gather> {
        let groups = [0, 1].map(|index| (&self.names[index], &self.groups[index], self.layouts[index].clone()));
        Gather::of(&input(features), &groups)
    }
}

#[test]
fn columns_of_many_groups_are_gathered_row_by_row() {
    let fixture = Fixture::new();
    let gather = fixture.gather(&[("page", "rank"), ("site", "age"), ("page", "hits")]).unwrap();
    let rows = [
        [row(&fixture.layouts[0], 50, [Some(1.0), Some(2.0)]), row(&fixture.layouts[1], 40, [Some(3.0), Some(4.0)])],
        [row(&fixture.layouts[0], 30, [Some(5.0), None]), row(&fixture.layouts[1], 60, [Some(7.0), Some(8.0)])],
    ];
    let mut tensor = BytesMut::from(&b"head"[..]);
    let cell = |entity: usize, group: usize| Some(Cell { row: &rows[entity][group], stale: entity == 1 && group == 0 });
    let gathered = gather.write(2, cell, MissingFeature::Refuse, &mut tensor).unwrap();
    assert_eq!(floats(&tensor[4..]), [4.0, 1.0, 3.0, 8.0, 5.0, 7.0]);
    assert_eq!(gathered, Gathered { defaults: 0, stale: true, oldest_event_us: Some(30) });
    assert_eq!(gather.length(2), 24);
}

#[test]
fn t45_a_missing_feature_is_the_declared_default_or_a_refusal_never_a_zero() {
    let fixture = Fixture::new();
    let null = row(&fixture.layouts[0], 50, [None, Some(2.0)]);
    let cell = |entity: usize, _| (entity == 0).then_some(Cell { row: &null, stale: false });
    let gather = fixture.gather(&[("site", "age")]).unwrap();

    let mut tensor = BytesMut::new();
    let gathered = gather.write(2, cell, MissingFeature::Default, &mut tensor).unwrap();
    assert_eq!(floats(&tensor), [-1.0, -1.0], "null and absent are both missing");
    assert_eq!(gathered, Gathered { defaults: 2, stale: false, oldest_event_us: None });

    let mut tensor = BytesMut::from(&b"head"[..]);
    let missing = gather.write(2, cell, MissingFeature::Refuse, &mut tensor).unwrap_err();
    assert_eq!(tensor, b"head"[..], "nothing half-written");
    assert_eq!(missing.count, 2);
    assert_eq!(missing.to_string(), "missing: site.age of row 0, site.age of row 1");

    let without_default = fixture.gather(&[("site", "size")]).unwrap();
    let missing = without_default.write(100, |_, _| None, MissingFeature::Default, &mut BytesMut::new()).unwrap_err();
    assert_eq!((missing.count, missing.first.len()), (100, NAMED));
}

#[test]
fn rows_of_another_schema_are_missing() {
    let fixture = Fixture::new();
    let other = row(&fixture.layouts[1], 50, [Some(1.0), Some(2.0)]);
    let gather = fixture.gather(&[("site", "age")]).unwrap();
    let cell = |_, _| Some(Cell { row: &other, stale: false });
    let mut tensor = BytesMut::new();
    assert_eq!(gather.write(1, cell, MissingFeature::Default, &mut tensor).unwrap().defaults, 1);
    assert_eq!(floats(&tensor), [-1.0]);
}

#[test]
fn an_input_that_the_groups_do_not_cover_has_no_gather() {
    let fixture = Fixture::new();
    assert!(fixture.gather(&[]).is_none());
    assert!(fixture.gather(&[("site", "nothing")]).is_none());
    assert!(fixture.gather(&[("nobody", "age")]).is_none());
}
