//! Asks DNS who is in one pool, again and again, as its times to live say.

use std::sync::Arc;
use std::time::Duration;

use spillway_core::members::{MOST, Roster, Round, refresh_after, retry_after};
use spillway_core::resource::DnsSource;
use spillway_core::units::Name;

use super::Membership;
use super::resolver::{Heard, Servers};

pub struct Follower {
    membership: Arc<Membership>,
    pool: Name,
    source: DnsSource,
    /// What this source said last.
    last: Roster,
    /// Rounds in a row in which some question had no answer.
    failures: u32,
    /// The last round was cut: said once.
    is_cut: bool,
    /// Whom to ask; found out anew after a failure, as the system's servers may have changed.
    servers: Option<Servers>,
}

impl Follower {
    pub fn new(membership: Arc<Membership>, pool: Name, source: DnsSource) -> Self {
        membership.metrics.began(&pool);
        Self { membership, pool, source, last: Roster::default(), failures: 0, is_cut: false, servers: None }
    }

    /// Ends only by being dropped.
    pub async fn follow(mut self) {
        loop {
            let wait = self.round().await;
            tokio::time::sleep(wait).await;
        }
    }

    /// One round of questions, and the time until the next.
    async fn round(&mut self) -> Duration {
        let Heard { round, ttl, problem } = self.ask().await;
        self.membership.metrics.asked(match &round {
            Some(round) if !round.partial => "whole",
            Some(_) => "partial",
            None => "kept",
        });
        let answered = round.is_some();
        if let Some(round) = round {
            self.take(round);
        }
        let Some(reason) = problem else {
            if self.failures > 0 {
                tracing::info!(pool = %self.pool, "members are resolved again");
            }
            self.failures = 0;
            return refresh_after(ttl);
        };
        self.failures = self.failures.saturating_add(1);
        self.servers = None;
        if self.failures == 1 {
            let members = self.last.pods.len();
            tracing::warn!(pool = %self.pool, reason, members, "members cannot be resolved, the last answer stays");
        }
        let retry = retry_after(self.failures, rand::random());
        // What was answered is not asked for later than it says.
        if answered { retry.min(refresh_after(ttl)) } else { retry }
    }

    fn take(&mut self, round: Round) {
        let metrics = &self.membership.metrics;
        metrics.ignored(&round);
        if round.cut > 0 && !self.is_cut {
            let (pool, cut) = (&self.pool, round.cut);
            tracing::warn!(%pool, cut, most = MOST, "more members than a pool may have; the last by name are left out");
        }
        self.is_cut = round.cut > 0;
        self.last = round.roster;
        let members = self.last.pods.len();
        metrics.heard(&self.pool, members);
        if self.membership.set(&self.pool, &self.source, &self.last) {
            metrics.changes.inc();
            tracing::info!(pool = %self.pool, members, "members changed");
        }
    }

    async fn ask(&mut self) -> Heard {
        let resolver = &self.membership.resolver;
        let servers = match self.servers.take().map_or_else(|| resolver.servers(), Ok) {
            Ok(servers) => self.servers.insert(servers),
            Err(error) => {
                tracing::debug!(%error, "no DNS servers");
                return Heard::nothing("no-servers");
            }
        };
        match &self.source {
            DnsSource::Hosts { name, port } => resolver.hosts(servers, name, *port).await,
            DnsSource::Services { name } => resolver.services(servers, name, &self.last).await,
        }
    }
}
