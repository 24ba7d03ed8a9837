//! Hearing of changes: one stream to one member at a time.
//!
//! The rule: whoever listens is told after each reconnection too, since something may have changed meanwhile. A stream
//! that says nothing when it is asked is given up.

use std::sync::Arc;
use std::time::Duration;

use etcd_client::{Client, Error, WatchOptions};
use tokio::sync::watch;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep, timeout};

use super::super::DEADLINE;
use super::members::Members;

/// How often the member is asked whether it is there.
const ASK_EVERY: Duration = Duration::from_secs(2);
/// It is not there if it says nothing for so long.
const SILENCE: Duration = Duration::from_secs(5);
const RECONNECT_AFTER: Duration = Duration::from_millis(200);

/// Counts `sender` up with each change of keys that begin so, until nobody listens.
pub async fn follow(members: Arc<Members>, prefix: String, sender: Arc<watch::Sender<u64>>) {
    tokio::select! {
        () = sender.closed() => {}
        () = async {
            loop {
                let (index, client) = members.preferred().await;
                let ended = match client {
                    Ok(client) => listen(client, &prefix, &sender).await,
                    Err(error) => Err(error),
                };
                if let Err(error) = ended {
                    tracing::debug!(%error, prefix, "a watch has ended; there will be another");
                }
                members.failed(index).await;
                sleep(RECONNECT_AFTER).await;
            }
        } => {}
    }
}

async fn listen(client: Client, prefix: &str, sender: &watch::Sender<u64>) -> Result<(), Error> {
    let late = || Error::WatchError("the member does not answer".into());
    let options = WatchOptions::new().with_prefix();
    let mut client = client.watch_client();
    let mut stream = timeout(DEADLINE, client.watch(prefix, Some(options))).await.map_err(|_| late())??;
    let mut ticks = interval(ASK_EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut heard = Instant::now();
    loop {
        tokio::select! {
            message = stream.message() => {
                let Some(message) = message? else { return Ok(()) };
                heard = Instant::now();
                if message.canceled() {
                    return Err(Error::WatchError(message.cancel_reason().to_owned()));
                }
                // What was written before the watch began is told with its beginning.
                if message.created() || !message.events().is_empty() {
                    sender.send_modify(|changes| *changes += 1);
                }
            }
            _ = ticks.tick() => {
                if heard.elapsed() > SILENCE {
                    return Err(late());
                }
                timeout(DEADLINE, stream.request_progress()).await.map_err(|_| late())??;
            }
        }
    }
}
