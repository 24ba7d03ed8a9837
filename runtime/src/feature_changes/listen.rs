//! The task that hears a region's changes and says how far it has come.
//!
//! ```text
//! deaf --subscribed, lease, counter--> hearing --lease lost, messages do not come--> deaf
//! ```
//! It begins each time under a new id: what an earlier call of its own still does in Redis is no lease of it.

use std::sync::Arc;
use std::time::Duration;

use fred::clients::SubscriberClient;
use fred::interfaces::{ClientLike, EventInterface, PubsubInterface};
use fred::types::Message;
use spillway_core::feature::{Ear, Heard};
use tokio::sync::SetOnce;
use tokio::sync::broadcast::error::RecvError;
use tokio::time::{Instant, MissedTickBehavior, sleep_until, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use super::{Changes, Given, Hearing, Listener, Metrics, PATIENCE, pace};
use crate::store::RedisFailed;
use crate::store::redis::keep_connected;

/// How often the lease is renewed and the counter compared with what was heard.
const POLL: Duration = Duration::from_secs(1);
/// After a call that failed.
const RETRY: Duration = Duration::from_millis(100);

/// A listener's task. Dropped, it ends at once and leaves its lease to run out.
pub struct Listening {
    stop: CancellationToken,
    stopped: Arc<SetOnce<()>>,
    _task: AbortOnDropHandle<()>,
}

impl Listening {
    /// Goes deaf and gives the lease back, so that no writer waits for it.
    pub async fn end(&self) {
        self.stop.cancel();
        // Its last call to Redis is bounded; a task that has ended sets it too.
        let _ = timeout(2 * PATIENCE, self.stopped.wait()).await;
    }
}

/// Listens until the handle is dropped or ended. What it knows goes to `hearing`.
pub fn listen(
    changes: Arc<Changes>,
    subscriber: SubscriberClient,
    listener: impl Listener,
    hearing: Hearing,
    metrics: Metrics,
) -> Listening {
    let (stop, stopped) = (CancellationToken::new(), Arc::new(SetOnce::new()));
    let task = Task {
        changes,
        subscriber,
        listener,
        hearing,
        metrics,
        ear: Ear::default(),
        id: String::new(),
        since: 0,
        subscribed: false,
        hears: false,
        owes: false,
        due: Instant::now(),
    };
    let (token, done) = (stop.clone(), stopped.clone());
    let task = tokio::spawn(async move {
        task.run(token).await;
        let _ = done.set(());
    });
    Listening { stop, stopped, _task: AbortOnDropHandle::new(task) }
}

struct Task<L> {
    changes: Arc<Changes>,
    subscriber: SubscriberClient,
    listener: L,
    hearing: Hearing,
    metrics: Metrics,
    ear: Ear,
    /// Of the lease; a new one for each.
    id: String,
    /// When Redis' list of leases began.
    since: u64,
    subscribed: bool,
    /// What the listener was told last.
    hears: bool,
    /// Whether Redis does not know yet how far we are, and when it may be told again.
    owes: bool,
    due: Instant,
}

impl<L: Listener> Task<L> {
    async fn run(mut self, stop: CancellationToken) {
        let mut messages = self.subscriber.message_rx();
        let mut reconnects = self.subscriber.reconnect_rx();
        let mut errors = self.subscriber.error_rx();
        let _connected = keep_connected(self.subscriber.clone());
        let mut polls = tokio::time::interval(POLL);
        polls.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let soon = tokio::select! {
                () = stop.cancelled() => return self.lost().await,
                message = messages.recv() => {
                    match message {
                        Ok(message) => self.message(&message),
                        Err(RecvError::Lagged(_)) => self.missed(),
                        Err(RecvError::Closed) => return self.lost().await,
                    }
                    None
                }
                () = sleep_until(self.due), if self.hears && self.owes => {
                    self.say().await;
                    (!self.hears).then_some(RETRY)
                }
                Ok(_) = reconnects.recv() => {
                    self.subscribed = false;
                    self.lost().await;
                    Some(Duration::ZERO)
                }
                Ok(_) = errors.recv(), if self.subscribed => {
                    if !self.subscriber.is_connected() {
                        self.subscribed = false;
                        self.lost().await;
                    }
                    None
                }
                _ = polls.tick() => self.poll().await.is_err().then_some(RETRY),
            };
            if let Some(soon) = soon {
                polls.reset_after(soon);
            }
        }
    }

    /// Fails when it is to be tried again soon.
    async fn poll(&mut self) -> Result<(), RedisFailed> {
        if !self.subscribed && self.subscriber.is_connected() {
            let subscribe = self.subscriber.subscribe(self.changes.channel());
            self.subscribed = matches!(timeout(PATIENCE, subscribe).await, Ok(Ok(())));
        }
        if !self.subscribed || !self.subscriber.is_connected() {
            self.subscribed = false;
            self.lost().await;
            // Until it connects again, or longer.
            return Ok(());
        }
        if !self.ear.is_leased(self.hearing.now()) {
            self.lost().await;
            self.begin().await?;
        }
        let number = self.changes.number(self.since).await?;
        if self.ear.counter(number) == Heard::Gap {
            // Messages that get lost may mean a connection that is dead and does not know: the next poll asks.
            self.subscribed = !self.hears;
            self.listener.flush(number);
        }
        self.tell();
        self.say().await;
        // If not, Redis knew nothing of the lease any more.
        if self.hears { Ok(()) } else { Err(RedisFailed) }
    }

    /// A new lease, so that writers wait for us from now on.
    async fn begin(&mut self) -> Result<(), RedisFailed> {
        self.id = format!("{:016x}", rand::random::<u64>());
        let asked = self.hearing.now();
        let given = self.changes.begin(&self.id).await?;
        self.since = given.since;
        self.ear.leased(asked);
        self.metrics.listed(given.listeners);
        Ok(())
    }

    /// How far we have come, to Redis; with that the lease goes on. While we hear alone.
    async fn say(&mut self) {
        let asked = self.hearing.now();
        let next = match self.changes.renew(&self.id, self.ear.number()).await {
            Ok(Some(Given { listeners, .. })) => {
                self.owes = false;
                self.ear.renewed(asked);
                self.tell();
                self.metrics.listed(listeners);
                pace(listeners)
            }
            Ok(None) => {
                self.lost().await;
                RETRY
            }
            // The lease lasts a while yet.
            Err(RedisFailed) => RETRY,
        };
        self.due = Instant::now() + next;
    }

    fn message(&mut self, message: &Message) {
        if *message.channel != *self.changes.channel() {
            return;
        }
        let text = message.value.as_str();
        let Some((number, rows)) = text.as_deref().and_then(parse) else { return self.missed() };
        if self.ear.message(number) == Heard::Gap || !self.listener.changed(number, rows) {
            self.listener.flush(number);
        }
        self.hearing.applied(self.ear.number());
        self.owes = true;
    }

    /// Messages came faster than they were taken, or one of them is none.
    fn missed(&mut self) {
        self.ear.missed();
        self.listener.flush(self.ear.number());
    }

    /// To who reads, after everything was applied.
    fn tell(&mut self) {
        self.hearing.applied(self.ear.number());
        let until = self.ear.hears_until();
        if until.is_some() && !self.hears {
            self.hears = true;
            self.listener.hearing(true);
        }
        self.hearing.until(until);
    }

    /// Deaf from now on; and no writer has to wait for us.
    async fn lost(&mut self) {
        self.hearing.until(None);
        self.ear.lost();
        if self.hears {
            self.hears = false;
            self.listener.hearing(false);
            self.metrics.leases_lost.inc();
        }
        let id = std::mem::take(&mut self.id);
        if !id.is_empty() {
            // Where Redis cannot be told, the lease runs out.
            let _ = self.changes.end(&id).await;
        }
    }
}

/// `<number> <row>[\n<row>…]`
fn parse(text: &str) -> Option<(u64, &str)> {
    let (number, rows) = text.split_once(' ')?;
    Some((number.parse().ok()?, rows))
}
