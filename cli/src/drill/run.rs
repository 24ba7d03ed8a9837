//! One run of a drill: what is seen goes to the record, what follows from it is done.
//!
//! ```text
//! clients ──requests──┐
//! control ──statuses──┤                ┌─ inject, renew, remove ─▶ injector
//! DNS ──────answers───┼─▶ this loop ───┤        (a task for each call; how it ended comes back as an event)
//! operator ─interrupt─┤   Recorder     └─ report
//! clock ──────────────┘   Course
//! ```

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, bail};
use rustls::pki_types::ServerName;
use spillway_core::audit::Timestamp;
use spillway_core::drill::fault::named;
use spillway_core::drill::report::{About, seconds};
use spillway_core::drill::{
    Announcement, Course, Drill, Event, Lease, Mark, Order, Recorder, Report, Request, Sample, Situation, Stage,
    choose_target, preflight,
};
use spillway_core::units::Name;
use spillway_proto::control::{SetDrillRequest, StatusResponse};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::client::{self, World};
use super::control::{Control, sight, situation};
use super::heartbeat::Beating;
use super::injector::{Injectors, RemoteError};
use super::keep;
use super::notice;
use super::place::Place;
use super::resolver::{Resolver, subnet_of};
use crate::injector::Fault;

/// How long clients run before the preflight: each has asked several times.
const WARM_UP: Duration = Duration::from_secs(6);
const TICK: Duration = Duration::from_secs(1);
/// How often the control plane is asked: what marks are exact to.
const STATUS_EVERY: Duration = Duration::from_millis(250);
/// How often DNS is asked for one of the watched subnets each, and how many are looked at and watched.
const ANSWERS_EVERY: Duration = Duration::from_millis(500);
const LOOKED_AT: u32 = 64;
const WATCHED: usize = 8;
/// Requests, statuses and answers that wait for this loop.
const QUEUE: usize = 4_096;

/// What to run, and where.
pub struct Setup {
    pub drill: Drill,
    /// Instead of the drill's own.
    pub target: Option<Name>,
    pub place: Place,
    /// Reports of earlier runs.
    pub runs: PathBuf,
}

/// Runs a drill to its report. Each message of `interrupts` is the operator's wish to end it; the second ends it without
/// a report, and the injector takes the fault away.
pub async fn run(setup: Setup, interrupts: mpsc::Receiver<()>) -> Result<Report> {
    let Setup { drill, target, place, runs } = setup;
    let injectors = Injectors::open(&place).await?;
    let mut control = Control::new(place.control.clone(), &place.operator)?;
    let lease = rand::random();
    let status = control.status().await;
    let mut before = match &status {
        Ok(status) => situation(status, lease),
        Err(problem) => {
            eprintln!("{problem:#}");
            Situation::default()
        }
    };
    let reach = injectors.reach().await.context("the injector")?;
    (before.processes, before.links) = (reach.processes, reach.links);
    before.drills.extend(reach.drills);
    let target = target.or_else(|| drill.target.clone());
    let target = target.or_else(|| choose_target(&before).filter(|_| drill.needs_target()));
    let regions = control.gateways().await.unwrap_or_default();
    if regions.is_empty() {
        eprintln!("no region has gateways: who moved cannot be told");
    }
    let began = Instant::now();
    let world = Arc::new(World {
        began,
        load: drill.load.clone(),
        resolver: Resolver::new(place.dns.clone(), &place.service)?,
        port: place.port,
        server_name: ServerName::try_from(place.server_name.clone()).context("the name in gateways' certificates")?,
        tls: client::tls(&place.client)?,
        model: place.model.clone(),
        entity: place.entity.clone(),
        regions,
    });
    let heartbeat = match (&drill.heartbeat, &target) {
        (Some(heartbeat), Some(target)) => Beating::start(&place, target, heartbeat)?,
        _ => None,
    };
    let mut run = Run {
        course: Course::new(&drill, Duration::ZERO),
        recorder: Recorder::new(&drill, target),
        drill,
        began,
        wall: SystemTime::now(),
        before,
        injectors,
        lease,
        faults: Vec::new(),
        status: None,
        sample: Sample::default(),
        seen: false,
        settled_since: None,
        kept_alive: Duration::ZERO,
        heartbeat,
        interrupted: false,
        told: Vec::new(),
        calls: JoinSet::new(),
        stage: watch::Sender::new(Stage::Preflight.name()),
    };
    let teller = Control::new(place.control.clone(), &place.operator)?;
    run.watch(world, (control, teller), interrupts).await?;
    let about = About {
        began: Timestamp::from(run.wall).to_string(),
        data: run.heartbeat.as_ref().map(Beating::loss),
        clients: usize::try_from(run.drill.load.clients).unwrap_or(usize::MAX),
        earlier: keep::earlier(&runs),
    };
    let Stage::Done(end) = run.course.stage() else { bail!("the run did not end") };
    let report = Report::new(&run.drill, end, &run.recorder, about, run.now());
    // Who cannot be told forgets it.
    let mut control = Control::new(place.control, &place.operator)?;
    let _ = control.ended(lease, report.outcome.name()).await;
    keep::save(&runs, &report)?;
    Ok(report)
}

/// What came of a call of the injector.
enum Called {
    Heard(Event),
    Renewed,
    Lost,
}

struct Run {
    drill: Drill,
    course: Course,
    recorder: Recorder,
    began: Instant,
    wall: SystemTime,
    before: Situation,
    injectors: Injectors,
    lease: u64,
    /// With names instead of patterns.
    faults: Vec<Fault>,
    status: Option<StatusResponse>,
    /// Since the last tick.
    sample: Sample,
    seen: bool,
    settled_since: Option<Duration>,
    /// When the injector confirmed the lease last.
    kept_alive: Duration,
    heartbeat: Option<Beating>,
    interrupted: bool,
    /// Marks that the operator knows of.
    told: Vec<Mark>,
    /// Calls of the injector, and what came of each.
    calls: JoinSet<Called>,
    /// As everybody is told it.
    stage: watch::Sender<&'static str>,
}

impl Run {
    /// `control`: for statuses, and for what is told.
    async fn watch(
        &mut self,
        world: Arc<World>,
        control: (Control, Control),
        mut interrupts: mpsc::Receiver<()>,
    ) -> Result<()> {
        let (requests, mut request) = mpsc::channel(QUEUE);
        let (statuses, mut status) = mpsc::channel(QUEUE);
        let (answers, mut answer) = mpsc::channel(QUEUE);
        let (heard, mut announced) = mpsc::channel(QUEUE);
        let (watched, subnets) = watch::channel(Vec::new());
        let mut sources = JoinSet::new();
        for number in 0..world.load.clients {
            sources.spawn(client::run(number, world.clone(), requests.clone()));
        }
        drop(requests);
        let (control, teller) = control;
        sources.spawn(statuses_of(control, statuses));
        let announcement = SetDrillRequest {
            lease: self.lease,
            drill: self.drill.name.to_string(),
            target: self.recorder.target().map(ToString::to_string).unwrap_or_default(),
            stage: String::new(),
        };
        sources.spawn(notice::tell(teller, announcement, self.stage.subscribe(), heard));
        sources.spawn(answers_of(world, subnets, answers));
        let mut of_target = Vec::new();
        let mut tick = tokio::time::interval(TICK);
        self.say("preflight: clients warm up");
        while !matches!(self.course.stage(), Stage::Done(_)) {
            let order = tokio::select! {
                Some(request) = request.recv() => { self.note_request(&request); None }
                Some(status) = status.recv() => { self.note_status(status); None }
                Some(announced) = announced.recv() => self.note_announced(announced),
                Some((subnet, region)) = answer.recv() => {
                    self.recorder.answer(subnet, &region, self.now());
                    if Some(&region) == self.recorder.target() && of_target.len() < WATCHED && !of_target.contains(&subnet) {
                        of_target.push(subnet);
                        watched.send_replace(of_target.clone());
                    }
                    None
                }
                Some(done) = self.calls.join_next() => match done {
                    Ok(Called::Heard(event)) => self.step(event),
                    Ok(Called::Renewed) => { self.kept_alive = self.now(); None }
                    // It is tried again.
                    Ok(Called::Lost) | Err(_) => None,
                },
                Some(()) = interrupts.recv() => self.interrupt()?,
                _ = tick.tick() => self.tick(),
            };
            if let Some(order) = order {
                self.obey(order);
            }
            let stage = self.course.stage().name();
            self.stage.send_if_modified(|told| std::mem::replace(told, stage) != stage);
        }
        Ok(())
    }

    fn now(&self) -> Duration {
        self.began.elapsed()
    }

    fn note_request(&mut self, request: &Request) {
        self.recorder.request(request);
        self.sample.requests += 1;
        self.sample.failed += u64::from(request.outcome.is_err());
    }

    fn note_status(&mut self, status: StatusResponse) {
        self.recorder.sight(sight(&status), self.now());
        let told = status.drills.iter().any(|drill| drill.lease == self.lease);
        if self.before.announced == Announcement::Taken && !told {
            // Another node leads, and does not know of it yet.
            self.stage.send_modify(|_| {});
        }
        self.status = Some(status);
        self.seen = true;
    }

    fn note_announced(&mut self, announced: Announcement) -> Option<Order> {
        match announced {
            // It was taken before: whoever takes note now will hear of it.
            Announcement::Unanswered if self.before.announced == Announcement::Taken => None,
            Announcement::Refused(why) if self.before.announced == Announcement::Taken => {
                self.step(Event::Displaced(why))
            }
            announced => {
                self.before.announced = announced;
                None
            }
        }
    }

    fn interrupt(&mut self) -> Result<Option<Order>> {
        if self.interrupted {
            bail!("interrupted twice: the injector removes the fault within {} s", Lease::LIFE.as_secs());
        }
        self.interrupted = true;
        self.say("interrupted");
        Ok(self.step(Event::Interrupted))
    }

    fn tick(&mut self) -> Option<Order> {
        let now = self.now();
        if *self.course.stage() == Stage::Preflight && now >= WARM_UP {
            return self.judge();
        }
        let doubted = self.seen.then(|| self.recorder.doubted());
        let sample = Sample { doubted, ..std::mem::take(&mut self.sample) };
        self.seen = false;
        self.settled_since = self.recorder.is_settled(now).then(|| self.settled_since.unwrap_or(now));
        let settled = self.settled_since.is_some_and(|since| now.saturating_sub(since) >= self.drill.settle);
        self.tell_marks();
        let order = if self.course.stage().may_be_broken() && now.saturating_sub(self.kept_alive) >= Lease::LIFE {
            self.step(Event::LeaseLost)
        } else {
            self.step(Event::Seen { sample, settled })
        };
        if order.is_some() {
            return order;
        }
        if *self.course.stage() == Stage::Recovering && self.recorder.is_back() {
            return self.step(Event::FailedBack);
        }
        let before = self.course.stage().clone();
        let order = self.course.tick(now);
        if before == Stage::Restoring && *self.course.stage() == Stage::Recovering {
            self.say("nobody confirmed the removal, but the lease is over: the injector goes on by itself");
            self.recorder.removed(now);
        } else if before != *self.course.stage() {
            self.say(self.course.stage().name());
        }
        order
    }

    fn judge(&mut self) -> Option<Order> {
        if let Some(status) = &self.status {
            let now = situation(status, self.lease);
            let Situation { processes, links, announced, mut drills, .. } = std::mem::take(&mut self.before);
            drills.extend(now.drills);
            drills.sort_unstable();
            drills.dedup();
            self.before = Situation { processes, links, announced, drills, ..now };
        }
        (self.before.requests, self.before.failed) = self.recorder.counts();
        let refusals = preflight(&self.drill, self.recorder.target(), &self.before);
        self.step(Event::Judged(refusals))
    }

    fn step(&mut self, event: Event) -> Option<Order> {
        let before = self.course.stage().name();
        if event == Event::Removed {
            self.recorder.removed(self.now());
        }
        let order = self.course.step(event, self.now());
        let stage = self.course.stage().name();
        if stage != before {
            let why = self.course.abort().map(|abort| format!(", aborted: {abort}")).unwrap_or_default();
            self.say(&format!("{stage}{why}"));
        }
        order
    }

    fn obey(&mut self, order: Order) {
        let (injectors, lease) = (self.injectors.clone(), self.lease);
        match order {
            Order::Inject => {
                let now = self.now();
                self.kept_alive = now;
                self.faults = self.named_faults();
                self.recorder.injected(now);
                if let Some(heartbeat) = &self.heartbeat {
                    heartbeat.injected();
                }
                let (name, faults) = (self.drill.name.to_string(), self.faults.clone());
                self.calls.spawn(async move {
                    Called::Heard(match injectors.inject(lease, &name, &faults).await {
                        Ok(()) => Event::Injected,
                        Err(problem) => Event::NotInjected(problem.to_string()),
                    })
                });
            }
            Order::Renew => drop(self.calls.spawn(async move {
                match injectors.renew(lease).await {
                    Ok(()) => Called::Renewed,
                    Err(RemoteError::Over) => Called::Heard(Event::LeaseLost),
                    Err(RemoteError::Failed(_)) => Called::Lost,
                }
            })),
            Order::Remove => {
                if let Some(heartbeat) = &self.heartbeat {
                    heartbeat.removed();
                }
                self.calls.spawn(async move {
                    match injectors.remove(lease).await {
                        Ok(()) | Err(RemoteError::Over) => Called::Heard(Event::Removed),
                        Err(RemoteError::Failed(_)) => Called::Lost,
                    }
                });
            }
            Order::Report => {}
        }
    }

    fn named_faults(&self) -> Vec<Fault> {
        let target = self.recorder.target();
        let names =
            |patterns: &[_], known: &[String]| named(patterns, target, known).into_iter().map(str::to_owned).collect();
        let (processes, links) = (&self.before.processes, &self.before.links);
        let faults = self.drill.faults.iter().map(|fault| Fault {
            act: fault.act,
            on: names(&fault.on, if fault.act.is_of_links() { links } else { processes }),
            from: names(&fault.from, processes),
        });
        faults.collect()
    }

    fn tell_marks(&mut self) {
        let timeline = self.recorder.timeline(self.now());
        for mark in Mark::ALL {
            if let Some(at) = timeline.at(mark).filter(|_| !self.told.contains(&mark)) {
                self.told.push(mark);
                let at = seconds(u64::try_from(at.as_millis()).unwrap_or(u64::MAX));
                self.say(&format!("  {:<2} {} at {at}", mark.number(), mark.name()));
            }
        }
    }

    fn say(&self, line: &str) {
        let target = self.recorder.target().map(|target| format!(" {target}")).unwrap_or_default();
        eprintln!("[{:6.1} s] {}{target}: {line}", self.now().as_secs_f64(), self.drill.name);
    }
}

/// What the control plane says, again and again.
async fn statuses_of(mut control: Control, statuses: mpsc::Sender<StatusResponse>) {
    loop {
        if let Ok(status) = control.status().await
            && statuses.send(status).await.is_err()
        {
            return;
        }
        tokio::time::sleep(STATUS_EVERY).await;
    }
}

/// What DNS says: to many subnets once, then to those that are watched again and again.
async fn answers_of(world: Arc<World>, watched: watch::Receiver<Vec<u32>>, answers: mpsc::Sender<(u32, Name)>) {
    let ask = async |subnet: u32, turn: usize| {
        let Ok(answer) = world.resolver.ask(subnet_of(subnet), turn).await else { return true };
        let region = answer.addresses.first().and_then(|address| world.regions.get(address));
        match region {
            Some(region) => answers.send((subnet, region.clone())).await.is_ok(),
            None => true,
        }
    };
    let pause = WARM_UP / (2 * LOOKED_AT);
    for subnet in 0..LOOKED_AT {
        if !ask(subnet, 0).await {
            return;
        }
        tokio::time::sleep(pause).await;
    }
    for turn in 0.. {
        let subnets = watched.borrow().clone();
        for subnet in &subnets {
            if !ask(*subnet, turn).await {
                return;
            }
        }
        tokio::time::sleep(ANSWERS_EVERY).await;
    }
}
