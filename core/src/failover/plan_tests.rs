use proptest::prelude::*;

use super::*;

const NOW: Duration = Duration::from_secs(1_000);

/// A healthy region of this planned weight and capacity.
fn region(planned: f64, capacity: f64) -> Region {
    Region { planned, share: 1.0, capacity: Some(capacity), load: None, overridden: None }
}

fn out(planned: f64) -> Region {
    Region { share: 0.0, ..region(planned, 100.0) }
}

fn ordered(act: Act, region: Region) -> Region {
    Region { overridden: Some(Override { act, until: NOW + Duration::from_secs(1) }), ..region }
}

fn named(regions: impl IntoIterator<Item = Region>) -> BTreeMap<Name, Region> {
    let names = (0..).map(|index| Name::parse(&format!("r{index}")).unwrap());
    names.zip(regions).collect()
}

fn plan_for(demand: Option<f64>, regions: impl IntoIterator<Item = Region>) -> Plan {
    let traffic = Traffic { demand, classes: [0.1, 0.2, 0.3, 0.4] };
    Plan::of(1, &named(regions), &traffic, NOW).unwrap()
}

fn weights(plan: &Plan) -> Vec<f64> {
    plan.regions.values().map(|allotment| allotment.weight).collect()
}

fn factors(plan: &Plan) -> Vec<f64> {
    plan.regions.values().map(|allotment| allotment.capacity_factor).collect()
}

#[track_caller]
fn assert_near(found: &[f64], expected: &[f64]) {
    let near = |(one, other): (&f64, &f64)| (one - other).abs() < 1e-9;
    assert!(found.len() == expected.len() && found.iter().zip(expected).all(near), "{found:?}, not {expected:?}");
}

#[test]
fn while_nothing_is_lost_the_planned_weights_are_answered_whatever_the_capacity() {
    let plan = plan_for(Some(300.0), [region(2.0, 1.0), region(1.0, 0.0), region(1.0, 900.0)]);
    assert_near(&weights(&plan), &[0.5, 0.25, 0.25]);
    assert_eq!((plan.basis, factors(&plan)), (Basis::Healthy, vec![1.0; 3]));
    assert_near(&[plan.regions.values().next().unwrap().load.unwrap()], &[150.0]);
}

#[test]
fn lost_load_goes_to_where_there_is_headroom_in_proportion() {
    // 100 lost; headroom 200 - 100 and 400 - 100.
    let plan = plan_for(Some(300.0), [out(1.0), region(1.0, 200.0), region(1.0, 400.0)]);
    assert_near(&weights(&plan), &[0.0, 125.0 / 300.0, 175.0 / 300.0]);
    assert_eq!((&plan.shed, factors(&plan)), (&Shed::default(), vec![1.0, 1.5, 1.5]));
}

#[test]
fn what_fits_exactly_is_not_shed() {
    let plan = plan_for(Some(300.0), [out(1.0), region(1.0, 130.0), region(1.0, 170.0)]);
    assert_near(&weights(&plan), &[0.0, 130.0 / 300.0, 170.0 / 300.0]);
    assert_eq!(plan.shed, Shed::default());
}

#[test]
fn what_fits_nowhere_is_spread_by_weight_and_shed_from_the_lowest_class_up() {
    // Headroom 40 and 0 for 100: 60 do not fit, 30 go to each.
    let plan = plan_for(Some(300.0), [out(1.0), region(1.0, 140.0), region(1.0, 100.0)]);
    assert_near(&weights(&plan), &[0.0, 170.0 / 300.0, 130.0 / 300.0]);
    assert_near(&[plan.shed.share], &[60.0 / 300.0]);
    let shed: Vec<f64> = plan.regions.values().map(|allotment| allotment.shed.share).collect();
    assert_near(&shed, &[0.0, 30.0 / 170.0, 30.0 / 130.0]);
    // Low is 40 % of the load.
    let low = [0.0, 30.0 / 170.0 / 0.4, 30.0 / 130.0 / 0.4];
    for (allotment, low) in plan.regions.values().zip(low) {
        assert_near(&allotment.shed.classes, &[0.0, 0.0, 0.0, low]);
    }
}

#[test]
fn show_3_survivors_with_70_percent_of_the_headroom_shed_the_lowest_class_alone() {
    // Three regions of 100 at 60 %: survivors have 80 of headroom; here 70 % of what 60 need.
    let survivor = || region(1.0, 60.0 + 0.7 * 30.0);
    let plan = plan_for(Some(180.0), [out(1.0), survivor(), survivor()]);
    assert_near(&weights(&plan), &[0.0, 0.5, 0.5]);
    assert_near(&plan.shed.classes, &[0.0, 0.0, 0.0, 0.1 / 0.4]);
}

#[test]
fn classes_are_cut_from_below() {
    let shed = |share, classes| Shed::of(share, &classes).classes;
    for (share, classes, expected) in [
        (0.0, [0.1, 0.2, 0.3, 0.4], [0.0; 4]),
        (0.2, [0.1, 0.2, 0.3, 0.4], [0.0, 0.0, 0.0, 0.5]),
        (0.4, [0.1, 0.2, 0.3, 0.4], [0.0, 0.0, 0.0, 1.0]),
        (0.55, [0.1, 0.2, 0.3, 0.4], [0.0, 0.0, 0.5, 1.0]),
        (0.95, [1.0, 2.0, 3.0, 4.0], [0.5, 1.0, 1.0, 1.0]),
        (1.0, [0.1, 0.2, 0.3, 0.4], [1.0; 4]),
        (0.3, [1.0, 0.0, 0.0, 0.0], [0.3, 1.0, 1.0, 1.0]),
        (0.3, [0.0; 4], [0.0, 0.0, 0.3, 1.0]),
        (0.3, [f64::NAN, -1.0, 0.0, f64::INFINITY], [0.0, 0.0, 0.3, 1.0]),
    ] {
        assert_near(&shed(share, classes), &expected);
    }
}

#[test]
fn a_region_that_ramps_up_has_as_much_of_its_capacity_as_of_its_weight() {
    // It keeps 5 of its 100; the other 95 go to headrooms of 5 (of 10) and 95 (of 195 in all).
    let ramp = Region { share: 0.05, ..region(1.0, 200.0) };
    let plan = plan_for(Some(200.0), [ramp, region(1.0, 195.0)]);
    let carried = 95.0;
    assert_near(&weights(&plan), &[(5.0 + carried * 0.05) / 200.0, (100.0 + carried * 0.95) / 200.0]);
    assert_eq!(plan.shed, Shed::default());
}

#[test]
fn a_region_of_unknown_capacity_takes_the_part_of_its_weight_and_is_never_said_to_shed() {
    let unknown = Region { capacity: None, ..region(2.0, 0.0) };
    // 90 of 360 are lost: 60 to the unknown by weight; 30 to the other, with headroom for 10.
    let plan = plan_for(Some(360.0), [out(1.0), unknown.clone(), region(1.0, 100.0)]);
    assert_near(&weights(&plan), &[0.0, 240.0 / 360.0, 120.0 / 360.0]);
    let shed: Vec<f64> = plan.regions.values().map(|allotment| allotment.shed.share).collect();
    assert_near(&shed, &[0.0, 0.0, 20.0 / 120.0]);
    for bad in [f64::NAN, f64::INFINITY, -1.0] {
        let plan =
            plan_for(Some(360.0), [out(1.0), Region { capacity: Some(bad), ..unknown.clone() }, unknown.clone()]);
        assert_near(&weights(&plan), &[0.0, 0.5, 0.5]);
    }
}

#[test]
fn without_a_known_demand_weights_decide() {
    let regions = [out(1.0), region(1.0, 10.0), region(3.0, 10.0)];
    let plan = plan_for(None, regions.clone());
    assert_near(&weights(&plan), &[0.0, 0.25, 0.75]);
    assert_eq!((plan.demand, plan.shed), (None, Shed::default()));
    let idle = plan_for(Some(0.0), regions);
    assert_near(&weights(&idle), &[0.0, 0.5 * 0.2 + 0.2, 0.5 * 0.2 + 0.6]);
}

#[test]
fn the_demand_is_the_held_one_or_the_sum_of_the_loads_where_that_is_more() {
    let loaded = |load| Region { load, ..region(1.0, 100.0) };
    for (held, loads, expected) in [
        (None, [None, None], None),
        (Some(f64::NAN), [None, Some(-1.0)], None),
        (None, [Some(40.0), None], Some(40.0)),
        (Some(30.0), [Some(40.0), Some(5.0)], Some(45.0)),
        (Some(90.0), [Some(40.0), Some(5.0)], Some(90.0)),
        (Some(90.0), [None, Some(f64::INFINITY)], Some(90.0)),
    ] {
        assert_eq!(plan_for(held, loads.map(loaded)).demand, expected);
    }
}

#[test]
fn t66_some_region_is_always_answered() {
    let drained = |region| ordered(Act::Drain, region);
    let up = |planned| region(planned, 100.0);
    for (regions, basis, expected) in [
        ([out(1.0), up(1.0), up(2.0)], Basis::Healthy, [0.0, 1.0 / 3.0, 2.0 / 3.0]),
        ([out(1.0), up(0.0), out(2.0)], Basis::Standby, [0.0, 1.0, 0.0]),
        ([out(1.0), up(0.0), up(0.0)], Basis::Standby, [0.0, 0.5, 0.5]),
        ([out(1.0), drained(up(1.0)), up(0.0)], Basis::Standby, [0.0, 0.0, 1.0]),
        ([out(1.0), drained(up(1.0)), out(1.0)], Basis::Drained, [0.0, 1.0, 0.0]),
        ([out(1.0), drained(up(0.0)), out(1.0)], Basis::Drained, [0.0, 1.0, 0.0]),
        ([out(1.0), out(1.0), out(2.0)], Basis::Blind, [0.25, 0.25, 0.5]),
        ([out(1.0), drained(out(1.0)), out(3.0)], Basis::Blind, [0.25, 0.0, 0.75]),
        ([drained(out(1.0)), drained(out(1.0)), out(0.0)], Basis::Blind, [0.5, 0.5, 0.0]),
        ([out(0.0), out(f64::NAN), out(-1.0)], Basis::Blind, [1.0 / 3.0; 3]),
        ([out(f64::INFINITY), up(f64::NAN), out(0.0)], Basis::Standby, [0.0, 1.0, 0.0]),
    ] {
        // Without a known demand, weights alone decide.
        let plan = plan_for(None, regions.clone());
        assert_eq!(plan.basis, basis, "{regions:?}");
        assert_near(&weights(&plan), &expected);
    }
    assert_eq!(Plan::of(1, &BTreeMap::new(), &Traffic::default(), NOW), None);
}

#[test]
fn without_a_healthy_region_nothing_is_said_to_be_shed() {
    let plan = plan_for(Some(1e9), [out(1.0), out(1.0)]);
    assert_eq!((plan.shed.clone(), factors(&plan)), (Shed::default(), vec![1.0; 2]));
}

#[test]
fn an_ordered_weight_takes_the_planned_ones_place_until_it_ends() {
    let regions = [ordered(Act::Weight(3.0), region(1.0, 100.0)), region(1.0, 100.0)];
    assert_near(&weights(&plan_for(Some(10.0), regions.clone())), &[0.75, 0.25]);
    let later = Plan::of(1, &named(regions.clone()), &Traffic::default(), NOW + Duration::from_secs(1)).unwrap();
    assert_near(&weights(&later), &[0.5, 0.5]);
    let [first, second] = regions;
    let sick = plan_for(None, [Region { share: 0.0, ..first.clone() }, second.clone()]);
    assert_near(&weights(&sick), &[0.0, 1.0]);
    for bad in [f64::NAN, -1.0, f64::INFINITY, 0.0] {
        let plan = plan_for(None, [ordered(Act::Weight(bad), first.clone()), second.clone()]);
        assert_near(&weights(&plan), &[0.0, 1.0]);
    }
}

#[test]
fn a_drained_regions_load_is_carried_as_if_it_were_lost() {
    let plan = plan_for(Some(300.0), [ordered(Act::Drain, region(1.0, 900.0)), region(1.0, 150.0), region(1.0, 300.0)]);
    assert_near(&weights(&plan), &[0.0, 120.0 / 300.0, 180.0 / 300.0]);
    assert_near(&factors(&plan), &[1.0, 1.5, 1.5]);
    assert!(plan.regions.values().next().unwrap().terms.drained);
}

#[test]
fn a_node_makes_the_plan_again_under_its_own_view_of_health() {
    let all_up = || [region(1.0, 200.0), region(1.0, 200.0), region(1.0, 400.0)];
    let plan = plan_for(Some(300.0), all_up());
    assert_eq!(plan.under(|_| None), plan);
    assert_eq!(plan.under(|_| Some(1.0)), plan);
    let first = plan.regions.keys().next().unwrap().clone();
    let lost = plan.under(|region| (*region == first).then_some(0.0));
    let [_, second, third] = all_up();
    assert_eq!(lost, plan_for(Some(300.0), [Region { share: 0.0, ..region(1.0, 200.0) }, second, third]));
    assert_eq!(lost.under(|_| Some(1.0)), plan, "and back again");
    assert_eq!(plan.under(|_| Some(f64::NAN)).basis, Basis::Blind);
}

#[test]
fn what_moves_is_what_regions_lose() {
    let [even, tilted, lost] = [[1.0, 1.0], [3.0, 1.0], [0.0, 1.0]]
        .map(|planned| plan_for(None, planned.map(|planned| region(planned, 100.0))));
    assert_near(
        &[tilted.moved_since(&even), lost.moved_since(&tilted), even.moved_since(&even), even.moved_since(&lost)],
        &[0.25, 0.75, 0.0, 0.5],
    );
}

#[test]
fn t62_t67_a_plan_that_is_older_or_unusable_is_refused_with_all_reasons() {
    let good = Plan { version: 7, ..plan_for(None, [region(1.0, 1.0), region(1.0, 1.0)]) };
    let known = |_: &Name| true;
    assert_eq!(good.check(None, known), Ok(()));
    assert_eq!(good.check(Some(6), known), Ok(()));
    for served in [7, 8] {
        assert_eq!(good.check(Some(served), known), Err(vec![UnfitPlan::Older { offered: 7, served }]));
    }
    let with = |weights: [f64; 2]| {
        let mut plan = good.clone();
        plan.regions.values_mut().zip(weights).for_each(|(allotment, weight)| allotment.weight = weight);
        plan
    };
    assert_eq!(with([0.5, 0.25]).check(None, known), Err(vec![UnfitPlan::Sum { sum: 0.75 }]));
    assert_eq!(with([0.0, 0.0]).check(None, known), Err(vec![UnfitPlan::Weights(UnfitWeights::NoWeight)]));
    assert_eq!(with([f64::NAN, -1.0]).check(Some(9), |_| false).unwrap_err().len(), 6);
    for (spoil, what) in [
        ((|one| one.terms.planned = f64::NAN) as fn(&mut Allotment), "the planned weight"),
        (|one| one.terms.share = 1.5, "the share"),
        (|one| one.terms.capacity = Some(-1.0), "the capacity"),
        (|one| one.load = Some(f64::INFINITY), "the load"),
        (|one| one.shed.share = -0.5, "what is shed"),
        (|one| one.shed.classes[3] = f64::NAN, "what is shed"),
        (|one| one.capacity_factor = f64::NAN, "the capacity factor"),
    ] {
        let mut plan = good.clone();
        let (region, allotment) = plan.regions.iter_mut().next().unwrap();
        spoil(allotment);
        let fault = UnfitPlan::Region { region: region.clone(), what };
        assert_eq!(plan.check(None, known), Err(vec![fault]));
    }
    let endless = Plan { demand: Some(f64::INFINITY), ..good.clone() };
    assert_eq!(endless.check(None, known), Err(vec![UnfitPlan::Demand { demand: f64::INFINITY }]));
    let empty = Plan { regions: BTreeMap::new(), ..good };
    assert_eq!(empty.check(None, known), Err(vec![UnfitPlan::Weights(UnfitWeights::NoRegion)]));
    assert_eq!(empty.under(|_| Some(1.0)), empty);
}

fn any_number() -> impl Strategy<Value = f64> {
    prop_oneof![Just(0.0), 0.0..1_000.0, 0.0..1e-6, prop::num::f64::ANY]
}

fn any_region() -> impl Strategy<Value = Region> {
    let act = prop_oneof![3 => Just(None), 1 => Just(Some(Act::Drain)), 1 => any_number().prop_map(Act::Weight).prop_map(Some)];
    let share = prop_oneof![Just(0.0), Just(1.0), Just(0.05), any_number()];
    let capacity = proptest::option::of(any_number());
    (any_number(), share, capacity, proptest::option::of(any_number()), act).prop_map(
        |(planned, share, capacity, load, act)| {
            let overridden = act.map(|act| Override { act, until: NOW + Duration::from_secs(1) });
            Region { planned, share, capacity, load, overridden }
        },
    )
}

/// Regions whose numbers are all usable.
fn measured_region() -> impl Strategy<Value = Region> {
    let share = prop_oneof![Just(0.0), Just(1.0), 0.01..1.0];
    (0.1..10.0, share, 0.0..500.0).prop_map(|(planned, share, capacity)| Region { share, ..region(planned, capacity) })
}

fn sum(numbers: impl Iterator<Item = f64>) -> f64 {
    numbers.sum()
}

proptest! {
    /// A process that goes through any states of its regions, with what no measurement should be.
    #[test]
    fn no_input_is_too_odd(
        states in proptest::collection::vec(
            (proptest::collection::vec(any_region(), 1..6), proptest::option::of(any_number()), any::<[f64; 4]>()),
            1..6,
        ),
        views in proptest::collection::vec(any_number(), 6),
    ) {
        for (regions, demand, classes) in states {
            let plan = Plan::of(3, &named(regions), &Traffic { demand, classes }, NOW).unwrap();
            let view = |name: &Name| views.get(name.as_str()[1..].parse::<usize>().unwrap()).copied();
            for plan in [plan.under(view), plan] {
                prop_assert!((sum(weights(&plan).into_iter()) - 1.0).abs() < 1e-9, "{plan:?}");
                prop_assert_eq!(plan.check(Some(2), |_| true), Ok(()));
                for allotment in plan.regions.values() {
                    prop_assert!((0.0..=1.0 + 1e-9).contains(&allotment.weight), "{plan:?}");
                    prop_assert!(allotment.load.is_none_or(f64::is_finite));
                    prop_assert!((0.0..=1.0).contains(&allotment.shed.share), "{plan:?}");
                    prop_assert!(allotment.shed.classes.iter().all(|share| (0.0..=1.0).contains(share)), "{plan:?}");
                }
                prop_assert!((0.0..=1.0 + 1e-9).contains(&plan.shed.share), "{plan:?}");
            }
        }
    }

    #[test]
    fn water_filling_conserves_load_and_passes_a_capacity_only_by_what_is_shed(
        regions in proptest::collection::vec(measured_region(), 1..6),
        demand in 0.0..1_000.0,
    ) {
        let plan = plan_for(Some(demand), regions);
        let loads = plan.regions.values().map(|allotment| allotment.load.unwrap());
        prop_assert!((sum(loads) - demand).abs() < 1e-6, "{plan:?}");
        if plan.basis == Basis::Blind {
            return Ok(());
        }
        for allotment in plan.regions.values() {
            let (terms, load) = (&allotment.terms, allotment.load.unwrap());
            let served = load * (1.0 - allotment.shed.share);
            prop_assert!(served <= terms.capacity.unwrap() * terms.share + 1e-6, "{plan:?}");
            prop_assert!(terms.share > 0.0 || allotment.weight == 0.0, "{plan:?}");
            prop_assert!(allotment.weight >= terms.planned * terms.share - 1e-9, "{plan:?}: keeps its own");
            prop_assert!(allotment.shed.classes.is_sorted(), "{plan:?}: the lowest first");
            // What is cut of the classes is what is shed.
            let cut: f64 = allotment.shed.classes.iter().zip(plan.classes).map(|(cut, part)| cut * part).sum();
            prop_assert!((cut - allotment.shed.share).abs() < 1e-6, "{plan:?}");
        }
        let own_fits = plan.regions.values().all(|allotment| {
            let terms = &allotment.terms;
            demand * terms.planned * terms.share <= terms.capacity.unwrap() * terms.share
        });
        let room: f64 = plan.regions.values().map(|one| one.terms.capacity.unwrap() * one.terms.share).sum();
        prop_assert!(!own_fits || plan.shed.share * demand <= (demand - room).max(0.0) + 1e-6, "{plan:?}: no more than needed");
    }

    #[test]
    fn more_headroom_never_gets_less(
        regions in proptest::collection::vec(measured_region(), 1..6),
        demand in 0.0..1_000.0,
        which: prop::sample::Index,
        more in 0.0..500.0,
    ) {
        let before = plan_for(Some(demand), regions.clone());
        let (mut regions, which) = (regions.clone(), which.index(regions.len()));
        let capacity = regions[which].capacity.unwrap();
        regions[which].capacity = Some(capacity + more);
        let after = plan_for(Some(demand), regions);
        prop_assert!(weights(&after)[which] >= weights(&before)[which] - 1e-9, "{before:?} {after:?}");
        prop_assert!(after.shed.share <= before.shed.share + 1e-9, "{before:?} {after:?}");
    }
}
