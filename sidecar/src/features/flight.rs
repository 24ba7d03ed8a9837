//! Single flight: of all requests that miss the same row, one asks and the others share its answer.
//!
//! A leader that fails, or whose request is cancelled, hands over: its followers are told and may lead.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Instant;

use parking_lot::Mutex;
use spillway_core::feature::RowKey;
use tokio::sync::watch;

type Slots<T> = Vec<Option<T>>;

pub(super) struct Flights<T>(Arc<Mutex<HashMap<RowKey, Seat<T>, ahash::RandomState>>>);

struct Seat<T> {
    slots: watch::Receiver<Slots<T>>,
    index: usize,
    /// Before the leader asked anybody.
    began: Instant,
}

/// The rows that this request asks for. Dropped: what is not answered yet is handed over.
pub(super) struct Lead<T> {
    flights: Flights<T>,
    keys: Vec<RowKey>,
    sender: watch::Sender<Slots<T>>,
    receiver: watch::Receiver<Slots<T>>,
}

/// A row that another request, or this one, already asks for.
pub(super) struct Follow<T>(Seat<T>);

impl<T> Clone for Flights<T> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<T> Default for Flights<T> {
    fn default() -> Self {
        Self(Arc::default())
    }
}

impl<T: Clone> Flights<T> {
    /// For each key, in order, either a place in the lead or someone to follow.
    pub fn join<'a>(&self, keys: impl Iterator<Item = &'a RowKey>) -> (Lead<T>, Vec<Result<usize, Follow<T>>>) {
        let (sender, receiver) = watch::channel(Vec::new());
        let mut lead = Lead { flights: self.clone(), keys: Vec::new(), sender, receiver: receiver.clone() };
        let mut places = Vec::new();
        let began = Instant::now();
        let mut flights = self.0.lock();
        for key in keys {
            if let Some(seat) = flights.get(key) {
                places.push(Err(Follow(Seat { slots: seat.slots.clone(), ..*seat })));
                continue;
            }
            let index = lead.keys.len();
            flights.insert(key.clone(), Seat { slots: receiver.clone(), index, began });
            lead.keys.push(key.clone());
            places.push(Ok(index));
        }
        drop(flights);
        lead.sender.send_modify(|slots| slots.resize_with(lead.keys.len(), || None));
        (lead, places)
    }
}

impl<T> Flights<T> {
    /// The row was overwritten: reads that begin now do not share an answer from before.
    pub fn forget(&self, key: &RowKey) {
        self.0.lock().remove(key);
    }

    /// As if every row were.
    pub fn forget_all(&self) {
        self.0.lock().clear();
    }
}

impl<T> Lead<T> {
    /// Gives followers the answers so far, by place in the lead.
    pub fn publish(&self, answers: impl Iterator<Item = (usize, T)>) {
        self.sender.send_modify(|slots| {
            for (index, answer) in answers {
                if let Some(slot) = slots.get_mut(index) {
                    *slot = Some(answer);
                }
            }
        });
    }
}

impl<T> Drop for Lead<T> {
    fn drop(&mut self) {
        // Before the sender goes: whoever finds it gone must not find its seats.
        let mut flights = self.flights.0.lock();
        for key in &self.keys {
            // A row that was overwritten meanwhile may have another leader by now.
            if flights.get(key).is_some_and(|seat| seat.slots.same_channel(&self.receiver)) {
                flights.remove(key);
            }
        }
    }
}

impl<T> Follow<T> {
    /// Whether the leader began no earlier than at this time.
    pub fn began_since(&self, arrived: Instant) -> bool {
        self.0.began >= arrived
    }
}

impl<T: Clone> Follow<T> {
    /// The leader's answer; `None` if the leader left without one.
    pub async fn wait(&mut self) -> Option<T> {
        let index = self.0.index;
        let slots = self.0.slots.wait_for(|slots| slots.get(index).is_some_and(Option::is_some)).await.ok()?;
        slots.get(index).cloned().flatten()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use spillway_core::resource::Scope;
    use spillway_core::units::Name;

    use super::*;

    fn key(entity: &str) -> RowKey {
        RowKey::new(Scope::Shared, "", entity.as_bytes(), &Name::parse("g").unwrap()).unwrap()
    }

    #[tokio::test]
    async fn followers_share_the_leaders_answer_as_soon_as_it_is_there() {
        let flights = Flights::<u32>::default();
        let keys = [key("a"), key("b")];
        let (lead, places) = flights.join(keys.iter());
        assert!(matches!(places[..], [Ok(0), Ok(1)]));
        let (_other, mut others) = flights.join(keys.iter());
        lead.publish([(1, 7)].into_iter());
        let Err(follow) = &mut others[1] else { panic!("b is being asked for") };
        assert_eq!(follow.wait().await, Some(7), "b does not wait for a");
        let Err(follow) = &mut others[0] else { panic!("a is being asked for") };
        assert!(tokio::time::timeout(Duration::from_millis(5), follow.wait()).await.is_err());
    }

    #[tokio::test]
    async fn a_leader_that_leaves_hands_over() {
        let flights = Flights::<u32>::default();
        let keys = [key("a")];
        let (lead, _) = flights.join(keys.iter());
        let (_, mut places) = flights.join(keys.iter());
        drop(lead);
        let Err(follow) = &mut places[0] else { panic!("a is being asked for") };
        assert_eq!(follow.wait().await, None);
        let (_lead, places) = flights.join(keys.iter());
        assert!(matches!(places[..], [Ok(0)]), "the follower may lead now");
    }

    #[tokio::test]
    async fn reads_after_a_write_do_not_share_an_answer_from_before() {
        let flights = Flights::<u32>::default();
        let keys = [key("a")];
        let (before, _) = flights.join(keys.iter());
        flights.forget(&keys[0]);
        let (_after, places) = flights.join(keys.iter());
        assert!(matches!(places[..], [Ok(0)]));
        drop(before);
        let (_, places) = flights.join(keys.iter());
        assert!(matches!(places[..], [Err(_)]), "the older leader took only its own seat away");
    }

    #[tokio::test]
    async fn after_a_flush_no_answer_from_before_is_shared() {
        let flights = Flights::<u32>::default();
        let keys = [key("a")];
        let (_before, _) = flights.join(keys.iter());
        flights.forget_all();
        let arrived = Instant::now();
        let (_lead, places) = flights.join(keys.iter());
        assert!(matches!(places[..], [Ok(0)]));
        let (_, places) = flights.join(keys.iter());
        let [Err(follow)] = &places[..] else { panic!("a is being asked for") };
        assert!(follow.began_since(arrived) && !follow.began_since(Instant::now()));
    }

    #[tokio::test]
    async fn an_ended_flight_leaves_nothing_behind() {
        let flights = Flights::<u32>::default();
        let keys = [key("a"), key("a")];
        let (lead, places) = flights.join(keys.iter());
        assert!(matches!(places[..], [Ok(0), Err(_)]), "twice in one call: asked once");
        lead.publish([(0, 1)].into_iter());
        drop(lead);
        assert!(flights.0.lock().is_empty());
    }
}
