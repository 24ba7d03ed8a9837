//! The store of a control plane of several nodes: an etcd cluster of version 3.5, over TLS with a client certificate.
//!
//! The rule: a commit is one transaction that also compares that the election key is still the one that its writer
//! made. A commit is sent once, so it goes to a member that has just answered; what only reads is asked of one member
//! after the other.

mod election;
mod members;
mod watching;

use std::sync::Arc;

use bytes::Bytes;
use etcd_client::{Client, Compare, CompareOp, GetOptions, KeyValue, KvClient, SortOrder, SortTarget, Txn, TxnOp};
use parking_lot::Mutex;
use spillway_core::units::Name;
use tokio::sync::watch;
use tokio_util::task::AbortOnDropHandle;

use self::members::Members;
use super::settings::EtcdSettings;
use super::{Condition, Fence, Leader, Leadership, OpenError, StoreError, Value, Write};

/// Keys that are asked for at once: each may have as much as a commit.
const PAGE: i64 = 16;
/// Enough for a page.
const LARGEST_ANSWER: usize = 32 << 20;
/// The key of the election. Its value says who won it.
const LEADER: &str = "leader";

/// Cheap to clone; all clones are the same.
#[derive(Clone, Debug)]
pub struct Etcd(Arc<Cluster>);

#[derive(Debug)]
struct Cluster {
    members: Arc<Members>,
    /// What all keys begin with.
    prefix: String,
    watches: Mutex<Vec<Watch>>,
}

#[derive(Debug)]
struct Watch {
    prefix: String,
    sender: Arc<watch::Sender<u64>>,
    _task: AbortOnDropHandle<()>,
}

impl Etcd {
    pub fn open(settings: &EtcdSettings) -> Result<Self, OpenError> {
        let prefix = format!("{}/", settings.prefix);
        let members = Arc::new(Members::new(settings, format!("{prefix}{LEADER}")));
        members.check_identity().map_err(OpenError::Etcd)?;
        Ok(Self(Arc::new(Cluster { members, prefix, watches: Mutex::default() })))
    }

    pub async fn get(&self, key: &str) -> Result<Option<Value>, StoreError> {
        Ok(self.look(key).await?.map(|found| value(&found)))
    }

    /// The key with all that etcd knows of it.
    async fn look(&self, key: &str) -> Result<Option<KeyValue>, StoreError> {
        let key = self.key(key);
        let get = |client: Client| {
            let key = key.clone();
            async move { kv(&client).get(key, None).await }
        };
        Ok(self.0.members.read(get).await?.take_kvs().pop())
    }

    pub async fn list(&self, prefix: &str) -> Result<Vec<(String, Value)>, StoreError> {
        let first = self.key(prefix).into_bytes();
        let end = after_all(&first);
        let page = |client: Client| {
            let (mut from, end) = (first.clone(), end.clone());
            async move {
                let mut all = Vec::new();
                let mut revision = 0;
                loop {
                    let options = GetOptions::new().with_range(end.clone()).with_limit(PAGE).with_revision(revision);
                    let mut answer = kv(&client).get(from, Some(options)).await?;
                    // All pages are of one moment.
                    revision = answer.header().map_or(0, |header| header.revision());
                    let more = answer.more();
                    all.append(&mut answer.take_kvs());
                    let Some(last) = all.last().filter(|_| more) else { return Ok(all) };
                    from = [last.key(), &[0]].concat();
                }
            }
        };
        Ok(self.entries(&self.0.members.read(page).await?))
    }

    pub async fn last(&self, prefix: &str, most: usize) -> Result<Vec<(String, Value)>, StoreError> {
        let first = self.key(prefix).into_bytes();
        let options = GetOptions::new()
            .with_range(after_all(&first))
            .with_sort(SortTarget::Key, SortOrder::Descend)
            .with_limit(i64::try_from(most).unwrap_or(i64::MAX));
        let get = |client: Client| {
            let (first, options) = (first.clone(), options.clone());
            async move { kv(&client).get(first, Some(options)).await }
        };
        Ok(self.entries(self.0.members.read(get).await?.kvs()))
    }

    pub async fn commit(&self, fence: &Fence, conditions: &[Condition], writes: Vec<Write>) -> Result<u64, StoreError> {
        let mut compares = vec![holds(fence)];
        let mut looks = vec![TxnOp::get(&*fence.key, None)];
        for condition in conditions {
            let (key, revision) = match condition {
                Condition::Absent(key) => (self.key(key), 0),
                Condition::At(key, revision) => (self.key(key), signed(*revision)),
            };
            compares.push(Compare::mod_revision(key.clone(), CompareOp::Equal, revision));
            looks.push(TxnOp::get(key, Some(GetOptions::new().with_keys_only())));
        }
        let write = |write: &Write| match write {
            Write::Put(key, value) => TxnOp::put(self.key(key), value.clone(), None),
            Write::Delete(key) => TxnOp::delete(self.key(key), None),
        };
        let writes: Vec<TxnOp> = writes.iter().map(write).collect();
        let transaction = Txn::new().when(compares).and_then(writes).or_else(looks);
        let answer = self.0.members.write(|client| async move { kv(&client).txn(transaction).await }).await?;
        if answer.succeeded() {
            let header = answer.header().ok_or_else(|| StoreError::Unavailable("an answer without a header".into()))?;
            return Ok(unsigned(header.revision()));
        }
        let found: Vec<Option<KeyValue>> = answer
            .op_responses()
            .into_iter()
            .map(|looked| match looked {
                etcd_client::TxnOpResponse::Get(mut looked) => looked.take_kvs().pop(),
                _ => None,
            })
            .collect();
        if !found.first().is_some_and(|found| is_of(found.as_ref(), fence)) {
            return Err(StoreError::Fenced(fence.epoch));
        }
        let differs = conditions.iter().zip(found.iter().skip(1)).find_map(|(condition, found)| {
            let found = found.as_ref().map(|found| unsigned(found.mod_revision()));
            let (key, holds) = match condition {
                Condition::Absent(key) => (key, found.is_none()),
                Condition::At(key, revision) => (key, found == Some(*revision)),
            };
            (!holds).then(|| key.clone())
        });
        Err(differs
            .map_or_else(|| StoreError::Unavailable("an answer that contradicts itself".into()), StoreError::Conflict))
    }

    pub fn watch(&self, prefix: &str) -> watch::Receiver<u64> {
        let mut watches = self.0.watches.lock();
        watches.retain(|watch| watch.sender.receiver_count() > 0);
        if let Some(known) = watches.iter().find(|watch| watch.prefix == prefix) {
            return known.sender.subscribe();
        }
        let (sender, receiver) = watch::channel(0);
        let sender = Arc::new(sender);
        let key = self.key(prefix);
        let task = tokio::spawn(watching::follow(Arc::clone(&self.0.members), key, Arc::clone(&sender)));
        watches.push(Watch { prefix: prefix.to_owned(), sender, _task: AbortOnDropHandle::new(task) });
        receiver
    }

    pub async fn campaign(&self, node: &Name, address: &str) -> Result<Leadership, StoreError> {
        election::campaign(self, node, address).await
    }

    pub async fn leader(&self) -> Result<Option<Leader>, StoreError> {
        self.look(LEADER).await?.map(|found| election::leader(&found)).transpose()
    }

    fn entries(&self, found: &[KeyValue]) -> Vec<(String, Value)> {
        let entry = |found: &KeyValue| {
            let key = found.key_str().ok()?.strip_prefix(&self.0.prefix)?.to_owned();
            Some((key, value(found)))
        };
        found.iter().filter_map(entry).collect()
    }

    fn key(&self, key: &str) -> String {
        format!("{}{key}", self.0.prefix)
    }
}

fn kv(client: &Client) -> KvClient {
    client.kv_client().max_decoding_message_size(LARGEST_ANSWER)
}

/// The election key is there, and no other election made it.
fn holds(fence: &Fence) -> Compare {
    Compare::create_revision(&*fence.key, CompareOp::Equal, signed(fence.epoch))
}

fn is_of(found: Option<&KeyValue>, fence: &Fence) -> bool {
    found.is_some_and(|found| unsigned(found.create_revision()) == fence.epoch)
}

fn value(found: &KeyValue) -> Value {
    Value { bytes: Bytes::copy_from_slice(found.value()), revision: unsigned(found.mod_revision()) }
}

/// The first key behind all that begin so.
fn after_all(prefix: &[u8]) -> Vec<u8> {
    let mut end = prefix.to_vec();
    while let Some(last) = end.pop() {
        if last < u8::MAX {
            end.push(last + 1);
            return end;
        }
    }
    // etcd's word for no end.
    vec![0]
}

/// etcd counts revisions from 1 in signed numbers.
fn unsigned(revision: i64) -> u64 {
    u64::try_from(revision).unwrap_or(0)
}

fn signed(revision: u64) -> i64 {
    i64::try_from(revision).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_ends_behind_its_prefix() {
        assert_eq!(after_all(b"spillway/a/"), b"spillway/a0");
        assert_eq!(after_all(b"a\xff\xff"), b"b");
        assert_eq!(after_all(b""), b"\0");
    }
}
