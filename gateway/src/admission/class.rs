//! How important a request is, and what it costs.

use spillway_core::inference::{Entities, InferRequest, Parameter, rows};
use spillway_core::limit::Class;

use super::Ask;

/// The class that a request asks for, as far as its tenant may.
pub fn of(request: &InferRequest, default: Class, highest: Class) -> Class {
    Class::of_priority(priority(request), default, highest)
}

/// Triton's `priority` of a request; 0: none. What is no whole number counts as absent.
pub fn priority(request: &InferRequest) -> u64 {
    match request.parameters.get("priority") {
        Some(Parameter::Uint(priority)) => *priority,
        Some(Parameter::Int(priority)) => u64::try_from(*priority).unwrap_or(0),
        _ => 0,
    }
}

/// What a request costs its tenant, and what each of its entities pays. One of several pays as if it came
/// alone: put into batches, it costs no less.
pub fn costs(ask: &Ask<'_>) -> (u32, u32) {
    let cost = ask.model.traffic.cost;
    let whole = cost.of(counted(ask));
    match ask.entities {
        Entities::Many(_) => (whole, cost.of(1)),
        Entities::None | Entities::One(_) => (whole, whole),
    }
}

/// The rows of a request: as many as it names entities, else as its inputs have.
fn counted(ask: &Ask<'_>) -> usize {
    rows(ask.model, ask.request, ask.entities).unwrap_or_else(|| {
        let batch = |name: &str, size: i64| {
            let batched = ask.model.input(name).is_some_and(|input| input.tensor.shape.first() == Some(&-1));
            batched.then(|| usize::try_from(size).ok()).flatten()
        };
        let rows = ask.request.inputs.iter().filter_map(|input| batch(&input.name, *input.shape.first()?));
        rows.max().unwrap_or(1)
    })
}

#[cfg(test)]
mod tests {
    use spillway_core::inference::Parameters;

    use super::*;

    #[test]
    fn a_priority_that_is_no_whole_number_is_none() {
        let class = |priority: Option<Parameter>| {
            let parameters =
                Parameters(priority.map(|priority| ("priority".to_owned(), priority)).into_iter().collect());
            of(&InferRequest { parameters, ..InferRequest::default() }, Class::Normal, Class::High)
        };
        for (priority, expected) in [
            (None, Class::Normal),
            (Some(Parameter::Uint(0)), Class::Normal),
            (Some(Parameter::Uint(1)), Class::High),
            (Some(Parameter::Int(2)), Class::High),
            (Some(Parameter::Int(3)), Class::Normal),
            (Some(Parameter::Uint(u64::MAX)), Class::Low),
            (Some(Parameter::Int(-1)), Class::Normal),
            (Some(Parameter::Text("1".into())), Class::Normal),
            (Some(Parameter::Double(1.0)), Class::Normal),
        ] {
            let shown = format!("{priority:?}");
            assert_eq!(class(priority), expected, "{shown}");
        }
    }
}
