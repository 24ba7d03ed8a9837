use spillway_core::units::Name;
use tempfile::TempDir;

use super::*;
use crate::store::{Leadership, StoreSettings};

const HOUR: Duration = Duration::from_secs(3_600);
const ASKER: [u8; 32] = [1; 32];
const OTHER: [u8; 32] = [2; 32];

struct Stand {
    store: Store,
    leadership: Leadership,
    now: SystemTime,
    _folder: TempDir,
}

async fn stand() -> Stand {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(&StoreSettings::Sqlite(folder.path().join("control.db"))).await.unwrap();
    let leadership = store.campaign(&Name::parse("c-0").unwrap(), "127.0.0.1:1").await.unwrap();
    Stand { store, leadership, now: SystemTime::now(), _folder: folder }
}

impl Stand {
    async fn token(&self, life: Duration) -> String {
        let dns = DnsName::host("edge.example").unwrap();
        let names = Names { dns: [dns].into(), addresses: [[192, 0, 2, 1].into()].into() };
        let id = SpiffeId::parse("spiffe://spillway.test/region/eu/gateway/gw-0").unwrap();
        let by = SpiffeId::parse("spiffe://spillway.test/operator/ada").unwrap();
        let order = Order { grant: Grant { id, names }, until: self.now + life, by };
        create(&self.store, &self.leadership.fence, &order, self.now).await.unwrap()
    }

    async fn used(&self, token: &str, asker: &[u8; 32], after: Duration) -> Result<Grant, Refusal> {
        let now = self.now + after;
        let found = find(&self.store, token, asker, now).await?;
        let grant = found.grant.clone();
        found.redeem(&self.store, &self.leadership.fence, asker, now).await?;
        Ok(grant)
    }
}

fn reason(outcome: Result<Grant, Refusal>) -> &'static str {
    outcome.map_or_else(|refusal| refusal.reason(), |_| "granted")
}

#[tokio::test]
async fn a_token_is_used_once_and_may_be_asked_again_by_the_same_key_for_a_moment() {
    let stand = stand().await;
    let token = stand.token(HOUR).await;
    assert_eq!((token.len(), token == stand.token(HOUR).await), (64, false));
    let second = Duration::from_secs(1);
    let grant = stand.used(&token, &ASKER, second).await.unwrap();
    assert_eq!(
        (grant.id.to_string().as_str(), grant.names.len()),
        ("spiffe://spillway.test/region/eu/gateway/gw-0", 2)
    );
    assert_eq!(reason(stand.used(&token, &OTHER, second).await), "token-used");
    assert_eq!(reason(stand.used(&token, &ASKER, second + RETRY).await), "granted");
    assert_eq!(reason(stand.used(&token, &ASKER, 2 * second + RETRY).await), "token-used");
}

#[tokio::test]
async fn a_token_that_nobody_made_or_that_has_ended_is_none() {
    let stand = stand().await;
    let token = stand.token(HOUR).await;
    assert_eq!(reason(stand.used(&"0".repeat(64), &ASKER, HOUR / 2).await), "token-unknown");
    assert_eq!(reason(stand.used("", &ASKER, HOUR / 2).await), "token-unknown");
    assert_eq!(reason(stand.used(&token, &ASKER, HOUR).await), "token-unknown");
    assert_eq!(reason(stand.used(&token, &ASKER, HOUR - Duration::from_millis(1)).await), "granted");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_many_who_use_a_token_at_once_one_wins() {
    let stand = stand().await;
    for _ in 0..5 {
        let token = stand.token(HOUR).await;
        let uses = (0..16u8).map(|asker| {
            let (store, fence, token, now) =
                (stand.store.clone(), stand.leadership.fence.clone(), token.clone(), stand.now);
            tokio::spawn(async move {
                let asker = [asker; 32];
                let found = find(&store, &token, &asker, now).await?;
                found.redeem(&store, &fence, &asker, now).await
            })
        });
        let mut won = 0;
        for used in uses.collect::<Vec<_>>() {
            match used.await.unwrap() {
                Ok(()) => won += 1,
                Err(refusal) => assert_eq!(refusal.reason(), "token-used"),
            }
        }
        assert_eq!(won, 1);
    }
}

#[tokio::test]
async fn who_leads_no_more_makes_and_redeems_none_and_ended_ones_are_swept() {
    let mut stand = stand().await;
    let (open, ended) = (stand.token(HOUR).await, stand.token(Duration::from_secs(1)).await);
    stand.now += Duration::from_secs(2);
    stand.token(HOUR).await;
    let keys = stand.store.list(PREFIX).await.unwrap();
    assert!(keys.len() == 2 && keys.iter().all(|(name, _)| *name != key(&ended)));
    assert!(
        keys.iter()
            .all(|(name, value)| !name.contains(&open) && !String::from_utf8_lossy(&value.bytes).contains(&open))
    );
    let old = stand.leadership.fence.clone();
    drop(stand.leadership);
    stand.leadership = loop {
        if let Ok(leadership) = stand.store.campaign(&Name::parse("c-1").unwrap(), "127.0.0.1:2").await {
            break leadership;
        }
    };
    let found = find(&stand.store, &open, &ASKER, stand.now).await.unwrap();
    let refused = found.redeem(&stand.store, &old, &ASKER, stand.now).await;
    assert!(matches!(refused, Err(Refusal::Store(StoreError::Fenced(_)))), "{refused:?}");
    assert_eq!(reason(stand.used(&open, &OTHER, Duration::ZERO).await), "granted");
}
